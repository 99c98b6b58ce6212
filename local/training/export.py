"""Write a run's folder, which is a bundle of one: the kernel's own code reads its manifest, encoder and bank."""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from kernel.encoders import is_out_of_memory, open_encoder
from kernel.inputs import InputError, sha256, shorten
from kernel.manifest import MANIFEST, CompetitionSpec, GivenSettings, Manifest, Member, write_manifest
from kernel.views import VIEWS
from local.banks.estimators import commonest_classes, save_banks
from local.banks.metadata_prior import write_prior
from local.banks.selection import BankPlan, SelectedBank
from local.base.files import write_table, write_tensors
from local.base.repository import commit, versions
from local.base.run_folder import VALIDATION_FILE
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, settings_of, write_recipe
from local.training.finetuning import Tuning
from local.training.inputs import Inputs
from local.training.log import log_row
from local.training.plots import plot_class_distribution, plot_training_curve

ENCODER_FILE, BANK_FILE, PRIOR_FILE = "encoder.safetensors", "bank.safetensors", "prior.safetensors"
CANDIDATES_FILE = "candidates.csv"


def refuse_unopenable(inputs: Inputs, out: Path) -> None:
    """Save the encoder beside `out`, open it as the kernel will, and compare the embeddings of one photo.

    So what would fail after the last photo fails before the first one.

    Args:
        inputs: with the encoder on the CPU.

    Raises:
        InputError: the kernel cannot open the encoder, or its embeddings are others.
    """
    encoder, spec, name = inputs.encoder, inputs.spec, inputs.recipe.encoder.encoder
    folder = out.with_name(f".{out.name}.check")
    photo = torch.randint(
        0, 256, (1, 3, *[encoder.preprocessing.decoded_size] * 2), generator=torch.Generator().manual_seed(0)
    )
    # The other views have the encoder's own size. Each takes as long as a photo: at 1024 pixels on a CPU, minutes.
    views = [VIEWS[view] for view in ("plain", "larger") if view == "plain" or view in inputs.recipe.bank.views]
    encoder.module.eval()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)
        arguments = json.loads(json.dumps(spec.arguments))  # as they are read from the manifest
        saved = dataclasses.replace(spec, arguments=arguments, precision="full")
        with torch.random.fork_rng(devices=[]):  # opening draws weights, which must not change what comes after
            opened = open_encoder(folder / ENCODER_FILE, saved, encoder.devices)
        expected, found = (each.embed(photo.to(torch.uint8), views) for each in (encoder, opened))
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (OSError, SafetensorError)):
            raise
        cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{name}: the kernel could not open {spec.architecture} as it is here ({shorten(cause)}); "
            "choose another encoder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not expected.isfinite().all():
        raise InputError(f"{name} gives embeddings that are not finite: its weights are damaged")
    if not torch.allclose(found, expected, atol=1e-3):
        raise InputError(
            f"{name}: the kernel would build {spec.architecture} differently, with other embeddings; "
            "choose another encoder"
        )


def export_run(folder: Path, inputs: Inputs, tuning: Tuning, plan: BankPlan, bank: SelectedBank) -> None:
    """Write the files of a run's folder, except metrics.json and those that training has written already."""
    recipe = dataclasses.replace(inputs.recipe, bank=bank.settings)
    write_tensors(inputs.encoder.module.state_dict(), folder / ENCODER_FILE)
    save_banks(bank.banks, folder / BANK_FILE)
    files = [ENCODER_FILE, BANK_FILE]
    if bank.metadata_prior:
        write_prior(bank.metadata_prior, folder / PRIOR_FILE)
        files.append(PRIOR_FILE)
    if bank.candidates:
        write_table(bank.candidates, folder / CANDIDATES_FILE)
    if bank.predictions:
        bank.predictions.write(folder / VALIDATION_FILE)
    write_recipe(recipe, folder / "recipe.toml")
    class_ids = plan.split.labelled.class_ids[plan.reference]
    if tuning.log or bank.scores:
        log = tuning.log or [log_row(0, "", 0.0, bank.scores)]
        write_table(log, folder / "log.csv")
        plot_training_curve(log, tuning.epoch, folder / "training-curve.png")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    labelled = inputs.labelled
    manifest = Manifest(
        commit=commit(),
        competition=CompetitionSpec(
            name=labelled.competition.name,
            resolution=labelled.resolution,
            observations_sha256=inputs.competition_sha256,
            time_limit=labelled.competition.time_limit,
        ),
        class_ids=tuple(plan.classes),
        fallback_classes=tuple(commonest_classes(class_ids, plan.classes)),
        members=(describe_member(inputs, recipe, bank),),
        files={name: sha256(folder / name) for name in files},
    )
    write_manifest(manifest, folder / MANIFEST)


def describe_member(inputs: Inputs, recipe: Recipe, bank: SelectedBank) -> Member:
    """The run's one member, as its manifest describes it.

    Args:
        recipe: with the selected settings.
    """
    spec, settings = inputs.spec, bank.settings
    encoder = dataclasses.replace(
        spec,
        preprocessing=dataclasses.replace(spec.preprocessing, resize_mode=settings.resize_mode),
        precision=recipe.encoder.precision,
        packages={name: version(name) for name in spec.packages},  # today's, also if the encoder is that of a run
        file=ENCODER_FILE,
    )
    return Member(
        name=spec.architecture,
        encoder=encoder,
        views=tuple(settings.views),
        pooling=settings.pooling,
        bank=BANK_FILE,
        metadata_prior=PRIOR_FILE if bank.metadata_prior else None,
        metadata_prior_weight=settings.metadata_weight,
        weight=1.0,
        validation=bank.scores,
        recipe=settings_of(recipe),
        given=GivenSettings(recipe=settings_of(inputs.given), weights=weights_digest(inputs.given.encoder.encoder)),
        data_sha256=inputs.data_sha256,
        versions=versions(),
    )

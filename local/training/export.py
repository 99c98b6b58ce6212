"""Write a run's folder, which is a bundle of one: the kernel's own code reads its manifest, encoder and bank."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from kernel.encoders import open_encoder
from kernel.forward import Encoder, is_out_of_memory
from kernel.inputs import InputError, sha256, shorten
from kernel.manifest import (
    MANIFEST,
    CompetitionSpec,
    EncoderSpec,
    GivenSettings,
    Manifest,
    Member,
    to_json,
    write_manifest,
)
from kernel.ranking import largest
from kernel.views import VIEWS
from local.banks.ensemble import HeldOutPredictions
from local.banks.estimators import commonest_classes, save_banks
from local.banks.metadata_prior import write_prior
from local.banks.selection import BankPlan, SelectedBank
from local.base.files import write_table, write_tensors
from local.base.repository import commit, versions
from local.base.run_folder import VALIDATION_FILE
from local.data.concatenated_encoders import preprocessing_in
from local.data.observations import LabelledObservations, names_of
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, settings_of, write_recipe
from local.training.finetuning import Tuning
from local.training.inputs import Inputs
from local.training.log import log_row
from local.training.plots import plot_class_distribution, plot_training_curve

PRIOR_FILE = "prior.safetensors"
CANDIDATES_FILE, OUT_OF_FOLD_FILE = "candidates.csv", "oof.csv"
OUT_OF_FOLD_CLASSES = 20  # of each observation


def encoder_file(index: int) -> str:
    """The name of the weights of a run's first encoder, second one, ..."""
    return f"encoder{f'-{index + 1}' if index else ''}.safetensors"


def bank_file(index: int, count: int) -> str:
    """The name of the bank over the embeddings of the first encoders, up to this one of `count`."""
    return f"bank{f'-of-{index + 1}' if index + 1 < count else ''}.safetensors"


def refuse_unopenable(inputs: Inputs, out: Path) -> None:
    """Save every encoder beside `out`, open it as the kernel will, and compare the embeddings of one photo.

    So what would fail after the last photo fails before the first one.

    Args:
        inputs: with the encoders on the CPU.

    Raises:
        InputError: the kernel cannot open an encoder, or its embeddings are others.
    """
    for one, encoder, spec in zip(inputs.recipe.encoder.each, inputs.encoders, inputs.specs, strict=True):
        views = [VIEWS[view] for view in ("plain", "larger") if view == "plain" or view in inputs.recipe.bank.views]
        refuse_other_embeddings(one.name, encoder, spec, views, out.with_name(f".{out.name}.check"))


def refuse_other_embeddings(
    name: str, encoder: Encoder, spec: EncoderSpec, views: Sequence[Callable], folder: Path
) -> None:
    """`refuse_unopenable` for one encoder; `folder` is for its weights, and is removed."""
    photo = torch.randint(
        0, 256, (1, 3, *[encoder.preprocessing.decoded_size] * 2), generator=torch.Generator().manual_seed(0)
    )
    encoder.module.eval()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_tensors(encoder.module.state_dict(), folder / encoder_file(0))
        arguments = json.loads(json.dumps(spec.arguments))  # as they are read from the manifest
        saved = dataclasses.replace(spec, arguments=arguments, precision="full")
        with torch.random.fork_rng(devices=[]):  # opening draws weights, which must not change what comes after
            opened = open_encoder(folder / encoder_file(0), saved, encoder.devices)
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


def export_run(
    folder: Path, inputs: Inputs, tuning: Tuning, plan: BankPlan, bank: SelectedBank, threshold: float | None = None
) -> None:
    """Write the files of a run's folder, except metrics.json and those that training has written already.

    Args:
        threshold: see `Manifest`.
    """
    recipe = dataclasses.replace(inputs.recipe, bank=bank.settings)
    files = []
    for index, encoder in enumerate(inputs.encoders):
        files += [encoder_file(index), bank_file(index, len(inputs.encoders))]
        write_tensors(encoder.module.state_dict(), folder / files[-2])
        save_banks(bank.banks[index], folder / files[-1])
    if bank.metadata_prior:
        write_prior(bank.metadata_prior, folder / PRIOR_FILE)
        files.append(PRIOR_FILE)
    if bank.candidates:
        write_table(bank.candidates, folder / CANDIDATES_FILE)
    if bank.predictions:
        bank.predictions.write(folder / VALIDATION_FILE)
        write_out_of_fold(bank.predictions, plan.split.labelled, folder / OUT_OF_FOLD_FILE)
    write_recipe(recipe, folder / "recipe.toml")
    class_ids = plan.split.labelled.class_ids[plan.reference]
    if tuning.log or bank.scores:
        log = tuning.log or [log_row(0, "", 0.0, bank.scores)]
        write_table(log, folder / "log.csv")
        plot_training_curve(log, tuning.epoch, folder / "training-curve.png")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    labelled, counts = inputs.labelled, Counter(class_ids)
    manifest = Manifest(
        commit=commit(),
        competition=CompetitionSpec(
            name=labelled.competition.name,
            resolution=labelled.resolution,
            observations_sha256=inputs.competition_sha256,
            time_limit=labelled.competition.time_limit,
            settings=to_json(labelled.competition.settings) if labelled.competition.settings else {},
        ),
        class_ids=tuple(plan.classes),
        fallback_classes=tuple(commonest_classes(class_ids, plan.classes, max(10, labelled.competition.guesses))),
        class_counts=tuple(counts[class_id] for class_id in plan.classes),
        threshold=threshold,
        members=(describe_member(inputs, recipe, plan, bank),),
        files={name: sha256(folder / name) for name in files},
    )
    write_manifest(manifest, folder / MANIFEST)


def write_out_of_fold(predictions: HeldOutPredictions, labelled: LabelledObservations, path: Path) -> None:
    """Write the most probable classes of each held-out observation, to be combined with models of other people.

    The columns are `observation`, `class` (the true one, also where the bank lacks it), `class_1`, `probability_1`,
    `class_2` and so on, the most probable first.
    """
    truth, classes = dict(zip(labelled.ids, labelled.class_ids, strict=True)), predictions.classes
    labels = largest(predictions.log_probabilities, OUT_OF_FOLD_CLASSES)
    probabilities = predictions.log_probabilities.softmax(dim=1).gather(1, labels).tolist()
    rows = []
    for name, own, values in zip(predictions.observations, labels.tolist(), probabilities, strict=True):
        row = {"observation": name, "class": truth[name]}
        for number, (label, probability) in enumerate(zip(own, values, strict=True), start=1):
            row |= {f"class_{number}": classes[label], f"probability_{number}": f"{probability:.6g}"}
        rows.append(row)
    write_table(rows, path)


def write_reference(plan: BankPlan, embeddings: np.ndarray, path: Path) -> None:
    """Write the observations that a bank is made of: local/predict.py shows the most similar one, and names classes.

    Args:
        embeddings: (reference observations, features) float16, rows of length 1 or 0.
    """
    labelled = plan.split.labelled
    reference = labelled.subset(plan.reference)
    notes = {"names": json.dumps(names_of(labelled, plan.classes), ensure_ascii=False)}
    here = os.getcwd()
    photos = json.dumps([os.path.join(here, one.photos[0]) for one in reference.observations]).encode()
    tensors = {
        "embeddings": torch.from_numpy(embeddings),
        "labels": torch.tensor(plan.labels[plan.reference]),
        "photos": torch.frombuffer(bytearray(photos), dtype=torch.uint8),  # notes may have 100 MB: a million paths
    }
    write_tensors(tensors, path, notes)


def describe_member(inputs: Inputs, recipe: Recipe, plan: BankPlan, bank: SelectedBank) -> Member:
    """The run's one member, as its manifest describes it.

    Args:
        recipe: with the selected settings.
    """
    settings, count, reference = bank.settings, len(inputs.specs), plan.split.labelled.subset(plan.reference)
    encoders = [
        dataclasses.replace(
            spec,
            preprocessing=preprocessing_in(settings.resize_mode, spec.preprocessing),
            precision=recipe.encoder.precision,
            packages={name: version(name) for name in spec.packages},  # today's, also if the encoder is that of a run
            file=encoder_file(index),
        )
        for index, spec in enumerate(inputs.specs)
    ]
    return Member(
        name=" + ".join(spec.architecture for spec in encoders),
        encoders=tuple(encoders),
        views=tuple(settings.views),
        pooling=settings.pooling,
        banks=tuple(bank_file(index, count) for index in range(count)),
        metadata_prior=PRIOR_FILE if bank.metadata_prior else None,
        metadata_prior_weight=settings.metadata_weight,
        weight=bank.inverse_temperature,
        validation=bank.scores,
        recipe=settings_of(recipe),
        given=GivenSettings(recipe=settings_of(inputs.given), weights=weights_digest(inputs.given.encoder)),
        data_sha256=inputs.data_sha256,
        versions=versions(),
        reference_counts={"observations": len(reference), "photos": len(reference.photos)},
    )

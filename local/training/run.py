"""Make a run: the folder that training leaves, complete or not at all.

A run folder is a bundle of one: the kernel's own code reads its manifest, encoder and bank.
"""

import dataclasses
import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from kernel.encoders import Encoder, is_out_of_memory, open_encoder, pick_devices, pick_dtype
from kernel.inputs import InputError, sha256, shorten
from kernel.manifest import (
    MANIFEST,
    CompetitionSpec,
    EncoderSpec,
    GivenSettings,
    Manifest,
    Member,
    read_manifest,
    write_manifest,
)
from kernel.photos import UNREADABLE_FILE, shorter_side, write_unreadable
from kernel.tables import RESOLUTIONS
from kernel.views import VIEWS
from local.banks.estimators import commonest_classes, save_banks
from local.banks.metadata_prior import write_prior
from local.banks.search import fit_banks
from local.banks.selection import Study
from local.base import distributed
from local.base.console import counted, say
from local.base.files import write_json, write_table, write_tensors
from local.base.repository import commit, versions
from local.base.run_folder import CACHE
from local.data.competition import (
    Competition,
    Labelled,
    largest_classes,
    read_competition,
    read_ranks,
    sort_ids,
    split_for_validation,
)
from local.data.photos import refuse_missing
from local.encoders.load import load_encoder, take_larger, weights_digest
from local.recipes.recipe import Recipe, current_names, differences, settings_of, write_recipe
from local.recipes.settings import TrainSettings
from local.training.checkpoints import full_disk_named, memory_named, read_notes, tidy
from local.training.checks import CHECKPOINTS, check_start, has_checkpoint, is_first, named, partial_of
from local.training.finetuning import Tuning, TuningData, finetune, refuse_large
from local.training.log import log_row, peak_memory_gb
from local.training.plots import plot_class_distribution, plot_training_curve
from local.training.resuming import CHANGEABLE, KEEP, refuse_fewer_epochs, refuse_other_training

ENCODER_FILE, BANK_FILE, PRIOR_FILE = "encoder.safetensors", "bank.safetensors", "prior.safetensors"
EVENTS = "tensorboard"


def train_run(recipe: Recipe, data: Path, out: Path, uses_val: bool = True, resumes: bool = False) -> None:
    """Train by a recipe and leave a run folder; on any failure `out` is as it was.

    A training that is interrupted leaves its checkpoints in a hidden folder beside `out`.

    Args:
        uses_val: False trains as if the competition had no val, so that nothing is chosen by what will be asked.
        resumes: go on from the checkpoints of an interrupted training, or of a finished one with more epochs; where
            there are none, begin.

    Raises:
        InputError: something of the user's is wrong; `out` exists already.
    """
    out = named(out)
    partial, given = partial_of(out), recipe
    if is_done(out, recipe, data, uses_val, resumes):
        say(f"{out} is done already, with the same settings and data: to train on, give more epochs")
        return
    check_start(recipe, data, out, resumes)
    torch.manual_seed(recipe.train.seed)
    with memory_named("loading the encoder", partial / CHECKPOINTS):
        module, spec = load_encoder(recipe.encoder.encoder, recipe.encoder.pretrained, recipe.encoder.image_size)
        refuse_large(recipe.encoder, module)
        if "larger" in recipe.bank.views:
            module, spec = take_larger(module, spec)
    if recipe.bank.resize_mode != "encoder":
        resized = dataclasses.replace(spec.preprocessing, fit=recipe.bank.resize_mode)
        spec = dataclasses.replace(spec, preprocessing=resized)
    preprocessing = spec.preprocessing
    resolution = recipe.encoder.resolution
    if resolution == "auto":
        resolution = smallest_sufficient(shorter_side(preprocessing))
    competition = read_competition(data, resolution)
    refuse_missing(competition)
    source = competition.observations_digest()
    recipe = dataclasses.replace(
        recipe,
        encoder=dataclasses.replace(recipe.encoder, resolution=resolution),
        bank=dataclasses.replace(recipe.bank, resize_mode=preprocessing.fit),
    )
    whole, competition = competition, part_of(competition, uses_val, recipe.train.subset, recipe.train.seed)
    if recipe.train.subset:
        say(told_subset(whole, competition, recipe.train.subset))
    begun = next(filter(has_checkpoint, (partial / CHECKPOINTS, out / CHECKPOINTS)), None)
    notes = read_notes(begun) if begun else None
    if begun and notes:
        refuse_other_training(begun, notes, recipe, competition.digest())
    if is_first():
        checkpoints = partial / CHECKPOINTS
        with full_disk_named(checkpoints), memory_named("opening the encoder as the kernel will", checkpoints):
            on_cpu = Encoder(module, preprocessing, spec.features, [torch.device("cpu")])
            rehearse_opening(on_cpu, spec, recipe, out)
    device = distributed.local_device(pick_devices())
    with memory_named(f"moving the encoder to {device}", partial / CHECKPOINTS):
        module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    encoder = Encoder(module, preprocessing, spec.features, [device])

    if is_first():
        with full_disk_named(partial / CHECKPOINTS):
            prepare(partial, out)
    distributed.barrier()
    try:
        checkpoints = partial / CHECKPOINTS
        with full_disk_named(checkpoints), memory_named("embedding the photos and choosing the bank", checkpoints):
            fill_run(partial, out.parent / CACHE, recipe, competition, encoder, spec, source, given)
            if is_first():
                put_in_place(partial, out)
    finally:
        if is_first() and not has_checkpoint(partial / CHECKPOINTS):
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: done")


def rehearse_opening(encoder: Encoder, spec: EncoderSpec, recipe: Recipe, out: Path) -> None:
    """Save the encoder beside `out`, open it as the kernel will, and compare the embeddings of one photo.

    What would fail after the last photo fails before the first one.

    Args:
        encoder: on the CPU, in full precision.

    Raises:
        InputError: the kernel cannot open it, or not as it is here.
    """
    folder = out.with_name(f".{out.name}.check")
    photo = torch.randint(
        0, 256, (1, 3, *[encoder.preprocessing.decoded] * 2), generator=torch.Generator().manual_seed(0)
    )
    views = [VIEWS[view] for view in recipe.bank.views]
    encoder.module.eval()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)
        arguments = json.loads(json.dumps(spec.arguments))  # as they are read from the manifest
        kept = dataclasses.replace(spec, arguments=arguments, precision="full")
        with torch.random.fork_rng(devices=[]):  # the weights that opening draws must not change what comes after
            opened = open_encoder(folder / ENCODER_FILE, kept, encoder.devices)
        expected, found = (each.embed(photo.to(torch.uint8), views) for each in (encoder, opened))
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (OSError, SafetensorError)):
            raise
        cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        reason = shorten(cause)
        raise InputError(
            f"{recipe.encoder.encoder}: the kernel could not open {spec.architecture} as it is here ({reason}); "
            "choose another encoder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not expected.isfinite().all():
        raise InputError(f"{recipe.encoder.encoder} gives embeddings that are not finite: its weights are damaged")
    if not torch.allclose(found, expected, atol=1e-3):
        raise InputError(
            f"{recipe.encoder.encoder}: the kernel would build {spec.architecture} otherwise than it is here, "
            "with other embeddings; choose another encoder"
        )


def is_done(out: Path, recipe: Recipe, data: Path, uses_val: bool, resumes: bool) -> bool:
    """Whether `out` is a run of the same settings and data, so that there is nothing to add to it.

    Raises:
        InputError: it is there, and cannot be continued with these settings and data.
    """
    if not (resumes and os.path.exists(out)):  # unlike Path's, it takes any name
        return False
    try:
        member = read_manifest(out / MANIFEST).members[0]
    except InputError as error:
        raise InputError(f"{out} is not a run, or a damaged one: remove it, or give another --out") from error
    given, trained = member.given, settings_of(Recipe()) | current_names(member.recipe)
    old, now, chosen = trained | current_names(given.recipe), settings_of(recipe), trained["choose"]
    found = differences(old, now, (given.weights, weights_digest(recipe.encoder.encoder)))
    for key in ("resize_mode", "resolution"):  # "encoder" and "auto" are recorded as what they came to
        if key not in chosen and (now[key] == trained[key] or (not given.recipe and now[key] in ("encoder", "auto"))):
            found.pop(key, None)
    for key in () if given.recipe else chosen:  # of an older run only what was chosen is known
        found.pop(key, None)
    competition = part_of(read_competition(data, trained["resolution"]), uses_val, old["subset"], old["seed"])
    if competition.digest() != member.data_sha256:
        found["data"] = f"{data} is not the data that it was made of, or has changed since"
    if not found:
        return True
    notes = read_notes(out / CHECKPOINTS) if old["epochs"] and recipe.train.epochs else None
    fixed = [said for key, said in found.items() if not notes or key not in CHANGEABLE]
    if fixed:
        why = "cannot be continued" if notes else "is finished and holds no training that could be continued"
        raise InputError(f"{out} {why}: {'; '.join(fixed)}; {KEEP}")
    refuse_fewer_epochs(out, notes, recipe)
    say(f"{out}: continuing its training; {'; '.join(found.values())}")
    return False


def part_of(competition: Competition, uses_val: bool, subset: int, seed: int) -> Competition:
    """What of a competition a run is made of."""
    competition = competition if uses_val else competition.without_val()
    return competition.sample(subset, seed) if subset else competition


def prepare(partial: Path, out: Path) -> None:
    """The folder that is to become `out`: with the checkpoints to go on from, and nothing else."""
    if has_checkpoint(partial / CHECKPOINTS):  # in its place, since a disk that was full has no room for another
        for path in partial.iterdir():
            if path.name not in (CHECKPOINTS, EVENTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)
    if not has_checkpoint(out / CHECKPOINTS):
        partial.mkdir(parents=True)
        return
    kept = out.with_name(f".{out.name}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    try:
        for name in (CHECKPOINTS, EVENTS):
            if (out / name).is_dir():
                shutil.copytree(out / name, kept / name)
        os.replace(kept, partial)
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Let `partial` be `out`; what `out` was before is there until then."""
    tidy(partial / CHECKPOINTS)
    before = out.with_name(f".{out.name}.before")
    if out.exists():
        os.replace(out, before)
    os.replace(partial, out)
    shutil.rmtree(before, ignore_errors=True)


def told_data(competition: Competition) -> str:
    """The folder, and how much each of its splits holds."""
    parts = []
    for split in ("train", "val"):
        own = competition.photos[competition.photos["split"] == split]
        observations, classes = own["observation"].nunique(), own["class_id"].nunique()
        if observations:
            parts.append(f"{counted(observations, 'observation')} of {counted(classes, 'class')} in {split}")
    splits = ", ".join(parts if competition.has_val else [*parts, "no val"])
    return f"{competition.folder} ({competition.layout.name}): {splits}"


def told_subset(whole: Competition, part: Competition, subset: int) -> str:
    """What a subset leaves of a competition."""
    kept = []
    for split in ("train", "val") if part.has_val else ("train",):
        own, of = (one.photos.loc[one.photos["split"] == split, "observation"].nunique() for one in (part, whole))
        kept.append(f"{own:,} of the {counted(of, 'observation')}" if own < of else f"all {counted(of, 'observation')}")
        kept[-1] += f" in {split}"
    return f"subset = {subset}: {' and '.join(kept)}"


def told_training(competition: Competition, fit: Labelled, validation: Labelled, train: TrainSettings) -> str:
    """Which observations a training learns from and is validated on, of those in `told_data`.

    Raises:
        InputError: there is nothing to validate it on.
    """
    of = f" in the subset of {train.subset}" if train.subset else ""
    change = "set epochs to 0" + (" or take a larger subset" if train.subset else "")
    learnt, judges = (largest_classes(part, fit, train.max_classes) for part in (fit, validation))
    foreign = int((~np.isin(judges.class_ids, learnt.class_ids)).sum())
    if foreign == len(judges):
        why = "there is no val, and every class has one observation"
        if competition.has_val:
            why = "no observation of val is of a class that train has"
        raise InputError(f"{competition.folder} has nothing to validate a training on: {why}{of}; {change}")
    told = f"training: learns from {counted(len(learnt), 'observation')} of train, is validated on {len(judges):,} "
    told += "of val" if competition.has_val else "others, never the only one of a class"
    if train.max_classes:
        largest = counted(train.max_classes, "largest class", "largest classes")
        told += f"; of {len(fit):,} and {len(validation):,}, those of the {largest}"
    if foreign:
        told += f"; {foreign:,} of val {'is' if foreign == 1 else 'are'} of classes that train lacks, so never right"
    return told


def smallest_sufficient(side: int) -> str:
    """The smallest of FungiCLEF's resolutions whose shorter side is not enlarged to `side` pixels."""
    return next((name for name in RESOLUTIONS[:-1] if int(name.rstrip("p")) >= side), RESOLUTIONS[-1])


def fill_run(
    folder: Path,
    cache: Path,
    recipe: Recipe,
    competition: Competition,
    encoder: Encoder,
    spec: EncoderSpec,
    source: str,
    given: Recipe,
) -> None:
    """Tune the encoder, choose the bank, build it of the reference, and write all that a run folder holds.

    Args:
        source: digest of the whole competition's observations. The manifest's `learnt_from` says by it whether an
            encoder has seen them in an earlier run, so that they cannot judge it: the digest of the data that it learnt
            from, and the seed by which a part of it was kept to judge.
        given: the recipe before anything in it was resolved or chosen, by which --resume knows the same run again.

    Raises:
        InputError: nothing is left to judge by, or what is left the encoder has learnt from.
    """
    started = time.monotonic()
    fit, validation = split_for_validation(competition, recipe.train.seed)
    say(f"{told_data(competition)}; {recipe.encoder.encoder} on {encoder.device.type}")
    if recipe.train.epochs:
        say(told_training(competition, fit, validation, recipe.train))
    digest = competition.digest()
    learnt_from, part = dict(spec.learnt_from), (digest, recipe.train.seed)
    if learnt_from.get(source, part) != part and not competition.has_val:
        raise InputError(
            f"{recipe.encoder.encoder} was trained on what would judge it here: take the seed and the subset of its "
            "training"
        )
    tuning = Tuning([], 0, 0.0)
    if recipe.train.epochs:
        learnt, judges = (largest_classes(part, fit, recipe.train.max_classes) for part in (fit, validation))
        ranks = read_ranks(competition, sort_ids(learnt.class_ids))
        tuning = finetune(encoder, TuningData(learnt, judges, ranks, digest), recipe, folder / CHECKPOINTS)
    # From here on in the kernel's precision, so that the bank is made of what it will be compared with.
    encoder.module.to(pick_dtype(encoder.device, recipe.encoder.precision))
    if tuning.mix_ratio:
        learnt_from[source] = part
    is_tuned = source in learnt_from
    study = Study(
        recipe.bank,
        recipe.search.choose,
        competition,
        fit,
        validation,
        encoder,
        cache,
        is_tuned,
        tuning.head,
        tuning.classes,
        is_macro=recipe.train.monitor == "macro_f1",
        seed=recipe.train.seed,
    )
    study.embed_together()
    if not is_first():
        return
    write_unreadable(list(study.unreadable.items()), folder / UNREADABLE_FILE)
    write_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)
    bank, scales, scores = study.choose(folder)
    chosen, embedded = dataclasses.replace(recipe, bank=bank), study.embed(bank.resize_mode)
    save_banks(fit_banks(bank, embedded, study.reference, scales, recipe.train.seed), folder / BANK_FILE)
    if bank.metadata_weight:
        write_prior(study.fit_prior(study.reference), folder / PRIOR_FILE)

    class_ids = study.labelled.class_ids[study.reference]
    write_recipe(chosen, folder / "recipe.toml")
    if tuning.log or scores:
        log = tuning.log or [log_row(0, "", 0.0, scores)]
        write_table(log, folder / "log.csv")
        plot_training_curve(log, tuning.epoch, folder / "training-curve.png")
    metrics = {
        "validation": scores,
        "chosen_epoch": tuning.epoch,
        "mix_ratio": tuning.mix_ratio,
        "seconds": round(time.monotonic() - started, 1),
        "memory_gb": peak_memory_gb(),
    }
    write_json(metrics, folder / "metrics.json")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    member = Member(
        name=spec.architecture,
        encoder=dataclasses.replace(
            spec,
            preprocessing=dataclasses.replace(spec.preprocessing, fit=bank.resize_mode),
            precision=recipe.encoder.precision,
            packages={name: version(name) for name in spec.packages},  # those of now, also for the encoder of a run
            learnt_from=learnt_from,
            file=ENCODER_FILE,
        ),
        views=tuple(bank.views),
        pooling=bank.pooling,
        bank=BANK_FILE,
        metadata_prior=PRIOR_FILE if bank.metadata_weight else None,
        metadata_prior_weight=bank.metadata_weight,
        weight=1.0,
        validation=scores,
        recipe=settings_of(chosen),
        given=GivenSettings(recipe=settings_of(given), weights=weights_digest(given.encoder.encoder)),
        data_sha256=digest,
        versions=versions(),
    )
    files = [ENCODER_FILE, BANK_FILE, *([PRIOR_FILE] if bank.metadata_weight else [])]
    manifest = Manifest(
        commit=commit(),
        competition=CompetitionSpec(
            name=competition.layout.name,
            resolution=competition.resolution,
            observations_sha256=source,
            time_limit=competition.layout.time_limit,
        ),
        class_ids=tuple(study.classes),
        fallback_classes=tuple(commonest_classes(class_ids, study.classes)),
        members=(member,),
        files={name: sha256(folder / name) for name in files},
    )
    write_manifest(manifest, folder / MANIFEST)

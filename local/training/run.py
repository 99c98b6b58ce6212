"""Make a run: the folder that training leaves, complete or not at all.

A run folder is a bundle of one: the kernel's own code reads its manifest, encoder and bank.
"""

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from kernel.encoders import Encoder, is_out_of_memory, open_encoder, pick_devices, pick_dtype, read_preprocessing
from kernel.inputs import FORMAT, MANIFEST, InputError, Weights, sha256, shorten
from kernel.observations import RESOLUTIONS
from kernel.photos import shorter_side, write_unreadable
from kernel.views import VIEWS
from local.banks.estimators import commonest_classes, save_banks
from local.banks.metadata_prior import write_prior
from local.banks.search import fit_banks
from local.banks.selection import Study
from local.base.console import counted, say
from local.base.files import write_json, write_table, write_tensors
from local.data.competition import (
    TIME_LIMITS,
    UNREADABLE_FILE,
    Competition,
    Labelled,
    find_layout,
    largest_classes,
    read_competition,
    read_ranks,
    refuse_missing,
    sort_ids,
    split_for_validation,
)
from local.encoders.load import load_encoder, take_larger, weights_digest
from local.recipes.recipe import Recipe, differences, settings_of, write_recipe
from local.training import distributed
from local.training.checkpoints import full_disk_named, has_checkpoint, memory_named, read_notes, tidy
from local.training.evaluation import log_row, peak_memory_gb
from local.training.finetuning import Tuning, finetune, refuse_large
from local.training.plots import plot_class_distribution, plot_training_curve
from local.training.trainer import FREE, KEEP, refuse_fewer_epochs, refuse_other

VERSIONED = ("torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")
ENCODER_FILE, BANK_FILE, PRIOR_FILE = "encoder.safetensors", "bank.safetensors", "prior.safetensors"
CACHE = ".embeddings"  # beside the runs, which share it
CHECKPOINTS, EVENTS = "checkpoints", "tensorboard"


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
    out = out if out.name not in ("", "..") else out.resolve()
    partial, given = out.with_name(f".{out.name}.partial"), recipe
    if is_done(out, recipe, data, uses_val, resumes):
        say(f"{out} is done already, with the same settings and data: to train on, give more epochs")
        return
    if distributed.is_first():
        refuse_unwritable(out)
    if has_checkpoint(partial / CHECKPOINTS) and not resumes:
        raise InputError(f"{out} was interrupted: continue with --resume, or remove {partial}")
    find_layout(data)
    torch.manual_seed(recipe.seed)
    with memory_named("loading the encoder", partial / CHECKPOINTS):
        module, entry = load_encoder(recipe.encoder, recipe.pretrained, recipe.image_size)
        refuse_large(recipe, module)
        if "larger" in recipe.views:
            module, entry = take_larger(module, entry)
    if recipe.fit != "encoder":
        entry["preprocessing"]["fit"] = recipe.fit
    recipe = dataclasses.replace(recipe, fit=entry["preprocessing"]["fit"])
    preprocessing = read_preprocessing(entry["preprocessing"])
    resolution = smallest_sufficient(shorter_side(preprocessing)) if recipe.resolution == "auto" else recipe.resolution
    competition = read_competition(data, resolution)
    refuse_missing(competition)
    source = competition.observations_digest()
    recipe = dataclasses.replace(recipe, resolution=resolution)
    whole, competition = competition, part_of(competition, uses_val, recipe.subset, recipe.seed)
    if recipe.subset:
        say(told_subset(whole, competition, recipe))
    begun = next(filter(has_checkpoint, (partial / CHECKPOINTS, out / CHECKPOINTS)), None)
    notes = read_notes(begun) if begun else None
    if begun and notes:
        refuse_other(begun, notes, recipe, competition.digest())
    if distributed.is_first():
        checkpoints = partial / CHECKPOINTS
        with full_disk_named(checkpoints), memory_named("opening the encoder as the kernel will", checkpoints):
            on_cpu = Encoder(module, preprocessing, entry["features"], [torch.device("cpu")])
            rehearse_opening(on_cpu, entry, recipe, out)
    device = distributed.device_of(pick_devices())
    with memory_named(f"moving the encoder to {device}", partial / CHECKPOINTS):
        module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    encoder = Encoder(module, preprocessing, entry["features"], [device])

    if distributed.is_first():
        with full_disk_named(partial / CHECKPOINTS):
            prepare(partial, out)
    distributed.wait()
    try:
        checkpoints = partial / CHECKPOINTS
        with full_disk_named(checkpoints), memory_named("embedding the photos and choosing the bank", checkpoints):
            fill_run(partial, out.parent / CACHE, recipe, competition, encoder, entry, source, given)
            if distributed.is_first():
                put_in_place(partial, out)
    finally:
        if distributed.is_first() and not has_checkpoint(partial / CHECKPOINTS):
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: done")


def rehearse_opening(encoder: Encoder, entry: dict, recipe: Recipe, out: Path) -> None:
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
    views = [VIEWS[view] for view in recipe.views]
    encoder.module.eval()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)
        weights = Weights(folder, {"files": {ENCODER_FILE: sha256(folder / ENCODER_FILE)}})
        kept = json.loads(json.dumps(entry | {"file": ENCODER_FILE, "precision": "full"}))
        with torch.random.fork_rng(devices=[]):  # the weights that opening draws must not change what comes after
            opened = open_encoder(weights, kept, encoder.devices)
        expected, found = (each.embed(photo.to(torch.uint8), views) for each in (encoder, opened))
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (OSError, SafetensorError)):
            raise
        cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        reason = shorten(cause)
        raise InputError(
            f"{recipe.encoder}: the kernel could not open {entry['architecture']} as it is here ({reason}); "
            "choose another encoder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not expected.isfinite().all():
        raise InputError(f"{recipe.encoder} gives embeddings that are not finite: its weights are damaged")
    if not torch.allclose(found, expected, atol=1e-3):
        raise InputError(
            f"{recipe.encoder}: the kernel would build {entry['architecture']} otherwise than it is here, with other "
            "embeddings; choose another encoder"
        )


def is_done(out: Path, recipe: Recipe, data: Path, uses_val: bool, resumes: bool) -> bool:
    """Whether `out` is a run of the same settings and data, so that there is nothing to add to it.

    Raises:
        InputError: it is there, and cannot be continued with these settings and data.
    """
    if not os.path.exists(out):  # unlike Path's, it takes any name
        return False
    if not resumes:
        raise InputError(f"{out} exists already: give another --out, continue it with --resume, or remove it")
    try:
        member = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["members"][0]
        trained = settings_of(Recipe()) | member["recipe"]
        given = member.get("given", {"recipe": {}, "weights": ""})
        old, digest = trained | given["recipe"], member["data_sha256"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{out} is not a run, or a damaged one: remove it, or give another --out") from error
    now, chosen = settings_of(recipe), trained["choose"]
    found = differences(old, now, (given["weights"], weights_digest(recipe.encoder)))
    for key in ("fit", "resolution"):  # "encoder" and "auto" are recorded as what they came to
        if key not in chosen and (
            now[key] == trained[key] or (not given["recipe"] and now[key] in ("encoder", "auto"))
        ):
            found.pop(key, None)
    for key in () if given["recipe"] else chosen:  # of an older run only what was chosen is known
        found.pop(key, None)
    competition = part_of(read_competition(data, trained["resolution"]), uses_val, old["subset"], old["seed"])
    if competition.digest() != digest:
        found["data"] = f"{data} is not the data that it was made of, or has changed since"
    if not found:
        return True
    notes = read_notes(out / CHECKPOINTS) if old["epochs"] and recipe.epochs else None
    fixed = [said for key, said in found.items() if not notes or key not in FREE]
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


def refuse_unwritable(out: Path) -> None:
    """Try to write where the run and the cache will be, before hours of work; what is made for it is removed again.

    Raises:
        InputError: nothing can be written there.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
        nearest = (made[-1] if made else out).parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(nearest))
        out.parent.mkdir(parents=True, exist_ok=True)
        for folder in filter(os.path.lexists, (out.parent, out.parent / CACHE)):
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=folder) as probe:
                (Path(probe) / "probe").write_bytes(b"probe")
    except OSError as error:
        where = f"{error.filename or out.parent}: {error.strerror or error}"
        raise InputError(f"--out {out} cannot be written ({where}): give another --out") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


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


def told_subset(whole: Competition, part: Competition, recipe: Recipe) -> str:
    """What a recipe's subset leaves of a competition."""
    kept = []
    for split in ("train", "val") if part.has_val else ("train",):
        own, of = (one.photos.loc[one.photos["split"] == split, "observation"].nunique() for one in (part, whole))
        kept.append(f"{own:,} of the {counted(of, 'observation')}" if own < of else f"all {counted(of, 'observation')}")
        kept[-1] += f" in {split}"
    return f"subset = {recipe.subset}: {' and '.join(kept)}"


def told_training(competition: Competition, fit: Labelled, validation: Labelled, recipe: Recipe) -> str:
    """Which observations a training learns from and is validated on, of those in `told_data`.

    Raises:
        InputError: there is nothing to validate it on.
    """
    of = f" in the subset of {recipe.subset}" if recipe.subset else ""
    change = "set epochs to 0" + (" or take a larger subset" if recipe.subset else "")
    learnt, judges = (largest_classes(part, fit, recipe.classes) for part in (fit, validation))
    foreign = int((~np.isin(judges.class_ids, learnt.class_ids)).sum())
    if foreign == len(judges):
        why = "there is no val, and every class has one observation"
        if competition.has_val:
            why = "no observation of val is of a class that train has"
        raise InputError(f"{competition.folder} has nothing to validate a training on: {why}{of}; {change}")
    told = f"training: learns from {counted(len(learnt), 'observation')} of train, is validated on {len(judges):,} "
    told += "of val" if competition.has_val else "others, never the only one of a class"
    if recipe.classes:
        largest = counted(recipe.classes, "largest class", "largest classes")
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
    entry: dict,
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
    fit, validation = split_for_validation(competition, recipe.seed)
    say(f"{told_data(competition)}; {recipe.encoder} on {encoder.device.type}")
    if recipe.epochs:
        say(told_training(competition, fit, validation, recipe))
    digest = competition.digest()
    learnt_from, part = dict(entry.get("learnt_from", {})), [digest, recipe.seed]
    if learnt_from.get(source, part) != part and not competition.has_val:
        raise InputError(
            f"{recipe.encoder} was trained on what would judge it here: take the seed and the subset of its training"
        )
    tuning = Tuning([], 0, 0.0)
    if recipe.epochs:
        learnt, judges = (largest_classes(part, fit, recipe.classes) for part in (fit, validation))
        ranks = read_ranks(competition, sort_ids(learnt.class_ids))
        tuning = finetune(encoder, learnt, judges, recipe, folder / CHECKPOINTS, ranks, digest)
    # From here on in the kernel's precision, so that the bank is made of what it will be compared with.
    encoder.module.to(pick_dtype(encoder.device, recipe.precision))
    if tuning.share:
        learnt_from[source] = part
    is_tuned = source in learnt_from
    study = Study(recipe, competition, fit, validation, encoder, cache, is_tuned, tuning.head, tuning.classes)
    study.embed_together()
    if not distributed.is_first():
        return
    write_unreadable(list(study.unreadable.items()), folder / UNREADABLE_FILE)
    write_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)
    chosen, scales, scores = study.choose(folder)
    save_banks(fit_banks(chosen, study.embed(chosen.fit), study.reference, scales), folder / BANK_FILE)
    if chosen.metadata:
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
        "chosen_share": tuning.share,
        "seconds": round(time.monotonic() - started, 1),
        "memory_gb": peak_memory_gb(),
    }
    write_json(metrics, folder / "metrics.json")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    preprocessing = {**entry["preprocessing"], "fit": chosen.fit}
    member = {
        "name": entry["architecture"],
        "encoder": {
            **entry,
            "preprocessing": preprocessing,
            "precision": recipe.precision,
            "packages": {name: version(name) for name in entry["packages"]},  # a run goes on from an older one
            "learnt_from": learnt_from,
            "file": ENCODER_FILE,
        },
        "views": list(chosen.views),
        "pooling": chosen.pooling,
        "bank": BANK_FILE,
        "prior": PRIOR_FILE if chosen.metadata else None,
        "prior_weight": chosen.metadata,
        "weight": 1.0,
        "validation": scores,
        "recipe": dataclasses.asdict(chosen),
        "given": {"recipe": settings_of(given), "weights": weights_digest(given.encoder)},
        "data_sha256": digest,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
    }
    write_manifest(folder, competition, source, study.classes, commonest_classes(class_ids, study.classes), member)


def write_manifest(
    folder: Path, competition: Competition, source: str, classes: list[str], prior: list[str], member: dict
) -> None:
    """Write what the kernel must know of a run, as the manifest of a bundle of one."""
    manifest = {
        "format": FORMAT,
        "commit": commit(),
        "competition": {
            "layout": competition.layout.name,
            "resolution": competition.resolution,
            "observations_sha256": source,
            "time_limit": TIME_LIMITS[competition.layout.name],
        },
        "class_ids": classes,
        "prior": prior,
        "members": [member],
        "files": {name: sha256(folder / name) for name in (ENCODER_FILE, BANK_FILE, member["prior"]) if name},
    }
    write_json(manifest, folder / MANIFEST)


def commit(part: str = ".") -> str:
    """The repository's present commit, marked when a part of it has changed since; "unknown" where git cannot tell."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 60}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", part], **options)
    except (OSError, subprocess.SubprocessError):  # no git on PATH, or one that does not answer
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.returncode or changed.stdout.strip() else "")

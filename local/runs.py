"""Make a run: the folder that training leaves, complete or not at all.

A run folder is a bundle of one: the kernel's own code reads its manifest, encoder and bank.
"""

import dataclasses
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from kernel.encoders import Encoder, pick_devices, pick_dtype, read_preprocessing
from kernel.mounts import FORMAT, MANIFEST, InputError, sha256
from kernel.observations import RESOLUTIONS
from kernel.photos import shorter_side
from local.banks import commonest_classes, save_banks
from local.choice import fit_banks
from local.competition import TIME_LIMITS, Competition, find_layout, read_competition, split_for_validation
from local.console import say
from local.plots import plot_class_distribution, plot_training_curve
from local.pretrained import load_encoder, take_larger
from local.prior import write_prior
from local.recipe import Recipe, write_recipe
from local.study import Study, write_table
from local.training import Tuning, finetune, log_row

VERSIONED = ("torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")
ENCODER_FILE, BANK_FILE, PRIOR_FILE = "encoder.safetensors", "bank.safetensors", "prior.safetensors"
CACHE = ".embeddings"  # beside the runs, which share it


def train_run(recipe: Recipe, data: Path, out: Path, uses_val: bool = True) -> None:
    """Train by a recipe and leave a run folder; on any failure `out` does not exist.

    Args:
        uses_val: False trains as if the competition had no val, so that nothing is chosen by what will be asked.

    Raises:
        InputError: something of the user's is wrong; `out` exists already.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another --out, or remove it")
    find_layout(data)
    torch.manual_seed(recipe.seed)
    module, entry = load_encoder(recipe.encoder, recipe.pretrained, recipe.image_size)
    if "larger" in recipe.views:
        module, entry = take_larger(module, entry)
    if recipe.fit != "encoder":
        entry["preprocessing"]["fit"] = recipe.fit
    recipe = dataclasses.replace(recipe, fit=entry["preprocessing"]["fit"])
    preprocessing = read_preprocessing(entry["preprocessing"])
    resolution = smallest_sufficient(shorter_side(preprocessing)) if recipe.resolution == "auto" else recipe.resolution
    competition = read_competition(data, resolution)
    if not uses_val:
        competition = competition.without_val()
    recipe = dataclasses.replace(recipe, resolution=resolution)
    device = pick_devices()[0]
    module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    encoder = Encoder(module, preprocessing, entry["features"], [device])

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill_run(partial, out.parent / CACHE, recipe, competition, encoder, entry)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: done")


def smallest_sufficient(side: int) -> str:
    """The smallest of FungiCLEF's resolutions whose shorter side is not enlarged to `side` pixels."""
    return next((name for name in RESOLUTIONS[:-1] if int(name.rstrip("p")) >= side), RESOLUTIONS[-1])


def fill_run(
    folder: Path, cache: Path, recipe: Recipe, competition: Competition, encoder: Encoder, entry: dict
) -> None:
    """Tune the encoder, choose the bank, build it of the reference, and write all that a run folder holds."""
    started = time.monotonic()
    fit, validation = split_for_validation(competition, recipe.seed)
    say(
        f"{competition.folder} ({competition.layout.name}): {len(fit)} observations of {len(set(fit.class_ids))} "
        f"classes to learn from, {len(validation)} to judge by; {recipe.encoder} on {encoder.device.type}"
    )
    if recipe.epochs and not len(validation):
        raise InputError(f"{competition.folder} leaves nothing to judge epochs by: use a recipe with epochs = 0")
    tuning = finetune(encoder, fit, validation, recipe) if recipe.epochs else Tuning([], 0, 0.0)
    save_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)

    # From here on in the kernel's precision, so that the bank is made of what it will be compared with.
    encoder.module.to(pick_dtype(encoder.device, recipe.precision))
    study = Study(recipe, competition, fit, validation, encoder, cache, is_tuned=tuning.share > 0)
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
    }
    write_json(metrics, folder / "metrics.json")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    preprocessing = {**entry["preprocessing"], "fit": chosen.fit}
    member = {
        "name": entry["architecture"],
        "encoder": {**entry, "preprocessing": preprocessing, "precision": recipe.precision, "file": ENCODER_FILE},
        "views": list(chosen.views),
        "pooling": chosen.pooling,
        "bank": BANK_FILE,
        "prior": PRIOR_FILE if chosen.metadata else None,
        "prior_weight": chosen.metadata,
        "weight": 1.0,
        "validation": scores,
        "recipe": dataclasses.asdict(chosen),
        "data_sha256": competition.digest(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
    }
    write_manifest(folder, competition, study.classes, commonest_classes(class_ids, study.classes), member)


def write_manifest(folder: Path, competition: Competition, classes: list[str], prior: list[str], member: dict) -> None:
    """Write what the kernel must know of a run, as the manifest of a bundle of one."""
    manifest = {
        "format": FORMAT,
        "competition": {
            "layout": competition.layout.name,
            "resolution": competition.resolution,
            "time_limit": TIME_LIMITS[competition.layout.name],
        },
        "class_ids": classes,
        "prior": prior,
        "members": [member],
        "files": {name: sha256(folder / name) for name in (ENCODER_FILE, BANK_FILE, member["prior"]) if name},
    }
    write_json(manifest, folder / MANIFEST)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors, on the CPU and contiguous."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_json(value: dict, path: Path) -> None:
    """Write JSON for people and machines: indented, in a stable order, with a newline at the end."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

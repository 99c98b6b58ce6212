"""Make a run: the folder that training leaves, complete or not at all.

A run folder is a bundle of one: the kernel's own code reads its manifest, encoder and bank.
"""

import csv
import dataclasses
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from kernel.encoders import Encoder, pick_devices, pick_dtype, read_preprocessing
from kernel.mounts import FORMAT, MANIFEST, InputError, sha256
from kernel.observations import RESOLUTIONS
from kernel.photos import shorter_side
from local.banks import commonest_classes, fit_centroids
from local.competition import (
    TIME_LIMITS,
    Competition,
    find_layout,
    read_competition,
    sort_ids,
    split_for_validation,
)
from local.console import say
from local.metrics import describe, score
from local.plots import plot_class_distribution, plot_training_curve
from local.pretrained import load_encoder, take_larger
from local.recipe import Recipe, write_recipe
from local.training import finetune, judge, log_row

VERSIONED = ("torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")
ENCODER_FILE, BANK_FILE = "encoder.safetensors", "bank.safetensors"


def train_run(recipe: Recipe, data: Path, out: Path) -> None:
    """Train by a recipe and leave a run folder; on any failure `out` does not exist.

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
    preprocessing = read_preprocessing(entry["preprocessing"])
    resolution = smallest_sufficient(shorter_side(preprocessing)) if recipe.resolution == "auto" else recipe.resolution
    competition = read_competition(data, resolution)
    recipe = dataclasses.replace(recipe, resolution=resolution)
    device = pick_devices()[0]
    module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    encoder = Encoder(module, preprocessing, entry["features"], [device])

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill_run(partial, recipe, competition, encoder, entry)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: done")


def smallest_sufficient(side: int) -> str:
    """The smallest of FungiCLEF's resolutions whose shorter side is not enlarged to `side` pixels."""
    return next((name for name in RESOLUTIONS[:-1] if int(name.rstrip("p")) >= side), RESOLUTIONS[-1])


def fill_run(folder: Path, recipe: Recipe, competition: Competition, encoder: Encoder, entry: dict) -> None:
    """Tune, judge, build the bank of the reference, and write all that a run folder holds."""
    started = time.monotonic()
    fit, validation = split_for_validation(competition, recipe.seed)
    say(
        f"{competition.folder} ({competition.layout.name}): {len(fit)} observations of {len(set(fit.class_ids))} "
        f"classes to learn from, {len(validation)} to judge by; {recipe.encoder} on {encoder.device.type}"
    )
    if not len(validation):
        say("every class has one observation: there is nothing to judge by, and so no score of this run")
        if recipe.epochs:
            raise InputError(f"{competition.folder} leaves nothing to judge epochs by: use a recipe with epochs = 0")
    log, chosen = finetune(encoder, fit, validation, recipe) if recipe.epochs else ([], 0)
    save_tensors(encoder.module.state_dict(), folder / ENCODER_FILE)

    # From here on in the kernel's precision, so that the bank is made of what it will be compared with.
    encoder.module.to(pick_dtype(encoder.device, recipe.precision))
    judged = judge(encoder, fit, validation, recipe, recipe.views)
    validated = score(validation.class_ids, judged.guesses, recipe.seed) if len(validation) else {}
    if validated:
        say(f"validation, with the bank of what was learnt from: {describe(validated)}")
    log = log or [log_row(0, "", 0.0, judged)]

    # "train" leaves out the competition's own val alone; what was held out of a train without val belongs to it.
    keeps_val_out = recipe.reference == "train" and competition.has_val
    class_ids = fit.class_ids if keeps_val_out else np.concatenate([fit.class_ids, validation.class_ids])
    embeddings = judged.reference if keeps_val_out else torch.cat([judged.reference, judged.queries])
    classes = sort_ids(class_ids)
    bank = fit_centroids(embeddings, class_ids, classes, recipe.centre)
    save_tensors(dataclasses.asdict(bank), folder / BANK_FILE)

    write_recipe(recipe, folder / "recipe.toml")
    write_log(log, folder / "log.csv")
    metrics = {"validation": validated, "chosen_epoch": chosen, "seconds": round(time.monotonic() - started, 1)}
    write_json(metrics, folder / "metrics.json")
    plot_training_curve(log, chosen, folder / "training-curve.png")
    plot_class_distribution(class_ids, folder / "class-distribution.png")
    member = {
        "name": entry["architecture"],
        "encoder": {**entry, "precision": recipe.precision, "file": ENCODER_FILE},
        "views": list(recipe.views),
        "pooling": recipe.pooling,
        "bank": BANK_FILE,
        "validation": validated,
        "recipe": dataclasses.asdict(recipe),
        "data_sha256": competition.digest(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
    }
    write_manifest(folder, competition, classes, commonest_classes(class_ids, classes), member)


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
        "files": {name: sha256(folder / name) for name in (ENCODER_FILE, BANK_FILE)},
    }
    write_json(manifest, folder / MANIFEST)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors, on the CPU and contiguous."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_log(rows: list[dict], path: Path) -> None:
    """Write log.csv: a row per epoch."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(value: dict, path: Path) -> None:
    """Write JSON for people and machines: indented, in a stable order, with a newline at the end."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

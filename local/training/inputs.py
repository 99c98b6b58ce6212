"""What a training begins with: the encoder, the labelled observations, and the recipe with all settings resolved."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kernel.encoders import pick_devices
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.manifest import EncoderSpec
from kernel.photos import shorter_side
from local.base import distributed
from local.base.console import counted, say
from local.data.competition import read_competition
from local.data.folder import find_competition
from local.data.observations import LabelledObservations, Split, select_observations, words_of
from local.data.photos import refuse_missing
from local.encoders.load import load_encoder, size_for_views
from local.encoders.texts import embed_classes, write_texts
from local.encoders.variants import pooled_parts
from local.recipes.recipe import Recipe
from local.recipes.settings import OneEncoder, SearchSettings, TrainSettings
from local.training.checkpoints import memory_named
from local.training.finetuning import refuse_large


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a training begins with.

    Attributes:
        given: the recipe as it was given, by which --resume recognises a run.
        recipe: the same with the resolution and the resize mode that "auto" and "encoder" stand for.
        encoders: in full precision; on the CPU until `move_to_device`.
        specs: describe them; name no file yet.
        labelled: the observations that may be used.
        competition_sha256: digest of all labelled observations of the competition.
        data_sha256: digest of `labelled`.
        texts: embeddings of the names of the classes of `labelled`, in their order, if `text_weight` needs them.
    """

    given: Recipe
    recipe: Recipe
    encoders: tuple[Encoder, ...]
    specs: tuple[EncoderSpec, ...]
    labelled: LabelledObservations
    competition_sha256: str
    data_sha256: str
    texts: np.ndarray | None = None


def load_inputs(recipe: Recipe, data: Path, uses_val: bool, checkpoints: Path) -> Inputs:
    """Load the encoder and read the competition.

    Args:
        uses_val: see `local.training.run.train_run`.
        checkpoints: the folder of checkpoints, which errors mention.

    Raises:
        InputError: there is no such encoder, it is too large, or many photos are missing.
    """
    torch.manual_seed(recipe.train.seed)
    with memory_named("loading the encoder", checkpoints):
        loaded = [load_described(recipe, one) for one in recipe.encoder.each]
        refuse_large(recipe.encoder, [module for module, _ in loaded])
    specs = tuple(spec for _, spec in loaded)
    refuse_missing_part(recipe.bank.pool_part, specs)
    resolution = recipe.encoder.resolution
    if resolution == "auto":
        side = max(shorter_side(spec.preprocessing) for spec in specs)
        resolution = find_competition(data).competition.smallest_resolution(side)
    whole = read_competition(data, resolution)
    train = recipe.train
    labelled = select_observations(whole, uses_val, train.subset, train.seed, train.exclude)
    refuse_missing(labelled)
    if train.exclude:
        say(f"exclude: {counted(len(set(train.exclude)), 'observation')} left out")
    if train.subset:
        say(describe_subset(whole, labelled, train.subset))
    modes = {spec.preprocessing.resize_mode for spec in specs}
    used = without_transduction(recipe) if labelled.competition.grids else recipe
    resolved = dataclasses.replace(
        used,
        encoder=dataclasses.replace(used.encoder, resolution=resolution),
        bank=dataclasses.replace(used.bank, resize_mode=modes.pop() if len(modes) == 1 else "encoder"),
    )
    cpu = torch.device("cpu")
    encoders = tuple(Encoder(module, spec.preprocessing, spec.features, [cpu]) for module, spec in loaded)
    return Inputs(recipe, resolved, encoders, specs, labelled, whole.observations_digest(), labelled.digest())


def without_transduction(recipe: Recipe) -> Recipe:
    """The same where test photos are cut into tiles: most show part of a class or none, and would move prototypes."""
    choose = tuple(name for name in recipe.search.choose if name != "transduction")
    if choose != recipe.search.choose or recipe.bank.transduction:
        say("transduction is 0, since test photos are cut into tiles")
    bank = dataclasses.replace(recipe.bank, transduction=0.0)
    return dataclasses.replace(recipe, bank=bank, search=dataclasses.replace(recipe.search, choose=choose))


def load_described(recipe: Recipe, encoder: OneEncoder) -> tuple[nn.Module, EncoderSpec]:
    """One encoder of a recipe, and its description with the recipe's preprocessing."""
    module, spec = load_encoder(encoder.name, recipe.encoder.pretrained, encoder.image_size, encoder.pool)
    if encoder.pool == "stages" and spec.pool != "stages":
        say(f"{encoder.name} has no stages of feature maps that become smaller: pool = auto")
    module, spec = size_for_views(module, spec, recipe.bank.views)
    if recipe.bank.resize_mode != "encoder":
        resized = dataclasses.replace(spec.preprocessing, resize_mode=recipe.bank.resize_mode)
        spec = dataclasses.replace(spec, preprocessing=resized)
    return module, spec


def refuse_missing_part(pool_part: str, specs: Sequence[EncoderSpec]) -> None:
    """Refuse a part of a pooling that no encoder has.

    Raises:
        InputError: says how to get it.
    """
    if pool_part == "all" or any(pool_part in pooled_parts(spec) for spec in specs):
        return
    pool = "stages" if pool_part == "final" else "token+avg"
    raise InputError(f'pool_part = {pool_part}: no encoder has this part: set pool = "{pool}", or pool_part = "all"')


def move_to_device(inputs: Inputs, checkpoints: Path) -> Inputs:
    """The same with the encoders on this process's device, their parameters frozen."""
    moved, device = [], distributed.local_device(pick_devices())
    for encoder in inputs.encoders:
        with memory_named(f"moving the encoder to {device}", checkpoints):
            encoder.module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        moved.append(Encoder(encoder.module, encoder.preprocessing, encoder.features, [device]))
    return dataclasses.replace(inputs, encoders=tuple(moved))


def embed_class_names(inputs: Inputs, checkpoints: Path) -> Inputs:
    """The same with the embeddings of the classes' names, if the recipe uses them; or without the choice of a weight.

    Raises:
        InputError: the recipe sets `text_weight`, and the names cannot be embedded.
    """
    recipe, labelled = inputs.recipe, inputs.labelled
    if not recipe.bank.text_weight and "text_weight" not in recipe.search.choose:
        return inputs
    try:
        for reason in recipe.text_obstacles.values():
            raise InputError(reason)
        [one], [spec], [encoder] = recipe.encoder.each, inputs.specs, inputs.encoders
        names = words_of(labelled, labelled.classes)
        texts = [
            write_texts(name, labelled.taxa.get(class_id, ()))
            for class_id, name in zip(labelled.classes, names, strict=True)
        ]
        with memory_named("embedding the names of the classes", checkpoints):
            embedded = embed_classes(one.name, texts, encoder.device)
        if embedded.shape[1] != spec.features:
            raise InputError(f"{one.name} embeds texts in {embedded.shape[1]} features, and photos in {spec.features}")
    except InputError as error:
        if recipe.bank.text_weight:
            raise InputError(f"text_weight does not work here: {error}; set it to 0") from error
        say(f"text_weight is not chosen: {error}")
        choose = tuple(name for name in recipe.search.choose if name != "text_weight")
        return dataclasses.replace(inputs, recipe=dataclasses.replace(recipe, search=SearchSettings(choose)))
    say(f"names: {counted(sum(map(bool, names)), 'class', 'classes')} of {len(names):,} in the space of the photos")
    return dataclasses.replace(inputs, texts=embedded)


def describe_data(labelled: LabelledObservations) -> str:
    """The folder, and the size of each of its splits."""
    parts = []
    for split in ("train", "val"):
        own = labelled.in_splits(split)
        if len(own):
            parts.append(f"{counted(len(own), 'observation')} of {counted(len(own.classes), 'class')} in {split}")
    splits = ", ".join(parts if labelled.has_val else [*parts, "no val"])
    return f"{labelled.folder} ({labelled.competition.name}): {splits}"


def describe_subset(whole: LabelledObservations, part: LabelledObservations, subset: int) -> str:
    """How many observations of each split the setting `subset` leaves."""
    kept = []
    for split in ("train", "val") if part.has_val else ("train",):
        own, of = len(part.in_splits(split)), len(whole.in_splits(split))
        count = f"{own:,} of the {counted(of, 'observation')}" if own < of else f"all {counted(of, 'observation')}"
        kept.append(f"{count} in {split}")
    return f"subset = {subset}: {' and '.join(kept)}"


def describe_training(split: Split, train: TrainSettings) -> str:
    """Which observations a training uses, of those in `describe_data`.

    Raises:
        InputError: there is nothing to validate it on.
    """
    labelled, used = split.labelled, split.largest_classes(train.max_classes)
    train_set, validation_set = used.train_set, used.validation_set
    lacking = int((~np.isin(validation_set.class_ids, train_set.class_ids)).sum())
    if lacking == len(validation_set):
        why = "there is no val, and every class has one observation"
        if labelled.has_val:
            why = "no observation of val is of a class that train has"
        of = f" in the subset of {train.subset}" if train.subset else ""
        change = "set epochs to 0" + (" or take a larger subset" if train.subset else "")
        raise InputError(f"{labelled.folder} has nothing to validate a training on: {why}{of}; {change}")
    text = f"training: learns from {counted(len(train_set), 'observation')} of train, is validated on "
    text += f"{len(validation_set):,} " + ("of val" if labelled.has_val else "others, never the only one of a class")
    if train.max_classes:
        largest = counted(train.max_classes, "largest class", "largest classes")
        text += f"; of {split.train.sum():,} and {split.validation.sum():,}, those of the {largest}"
    if lacking:
        text += f"; {lacking:,} of val {'is' if lacking == 1 else 'are'} of classes that train lacks, so never right"
    return text

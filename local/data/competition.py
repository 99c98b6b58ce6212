"""Read the labelled observations of a competition's folder as downloaded.

What differs between competitions is in `kernel/competitions/`.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from kernel.competitions.competition import CompetitionFolder, LabelledPhoto
from kernel.inputs import InputError
from kernel.observations import group_photos
from kernel.tables import BLANKS, RESOLUTIONS, compose, describe_left_out, names_nothing, plain_number, respell
from local.base.console import say_once
from local.data.folder import find_competition
from local.data.observations import UNKNOWN_TAXA, LabelledObservations


def read_competition(folder: Path, resolution: str = "300p") -> LabelledObservations:
    """Read the training tables of a competition's folder.

    Args:
        resolution: of the photos, where the competition ships several; one of `kernel.tables.RESOLUTIONS`.

    Raises:
        InputError: no supported competition is there, a table lacks a column, or an observation is in two splits.
    """
    found = find_competition(folder)
    with without_garbage_collection():
        return _read_tables(found, folder, resolution)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Within it, Python does not look for unused cycles of objects: of the million that a table has, none is one.

    It would look through all of them again and again, which takes half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_tables(found: CompetitionFolder, folder: Path, resolution: str) -> LabelledObservations:
    """The observations of a folder that was recognised; see `read_competition`."""
    left_out: Counter = Counter()
    competition = found.competition
    photos = competition.read_labelled(found, resolution, left_out)
    if left_out:
        say_once(f"{folder}{describe_left_out(left_out)}")
    for split in dict.fromkeys(photo.split for photo in photos):
        _check_resolution(found, split, resolution)
    _check_classes(folder, competition.name, photos)
    key = plain_number if competition.has_table else compose  # without one, a class id is the name of a folder
    spelt = respell(dict.fromkeys(photo.class_id for photo in photos), competition.sample_classes(folder), key)
    photos = [
        photo if spelt[photo.class_id] == photo.class_id else replace(photo, class_id=spelt[photo.class_id])
        for photo in photos
    ]
    class_of = _one_per_observation(folder, photos, "classes", lambda photo: photo.class_id)
    split_of = _one_per_observation(folder, photos, "splits", lambda photo: photo.split)
    observations = group_photos((photo.observation, photo.path, photo.metadata) for photo in photos)
    return LabelledObservations(
        folder=folder,
        competition=competition,
        resolution=resolution,
        observations=observations,
        class_ids=np.array([class_of[observation.id] for observation in observations], dtype=object),
        is_val=np.array([split_of[observation.id] == "val" for observation in observations], dtype=bool),
        taxa=_taxa_of_classes(photos),
        species=_text_of_classes(photos, lambda photo: photo.species),
        poisonous=_text_of_classes(photos, lambda photo: photo.poisonous),
    )


def taxon_name(name: str) -> str:
    """The name of a taxon without surrounding spaces; "" if it means that the taxon is unknown.

    "Agaricales incertae sedis" and "unclassified Agaricales" mean that too. Classes whose taxon is unknown must not
    become relatives of each other by such a name.
    """
    words = name.casefold().replace("_", " ").split()
    is_none = names_nothing(name) or words[0] in BLANKS or "incertae sedis" in " ".join(words)
    return "" if is_none else name.strip()


def _check_resolution(found: CompetitionFolder, split: str, resolution: str) -> None:
    """Print which resolution is read if `resolution` is not there.

    Raises:
        InputError: the folder of the split is there, without any of the competition's resolutions.
    """
    folder, there = found.split_folder(split), found.resolutions(split)
    read = found.photo_folder(split, resolution)
    if there and read.name != resolution:
        say_once(f"{folder.parent} has {', '.join(there)}, not {resolution}: reading {read.name}")
    elif found.competition.resolutions and folder.is_dir() and not there:
        entries = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
        raise InputError(f"{folder} has none of {', '.join(RESOLUTIONS)}, but {entries}: download the photos again")


def _check_classes(folder: Path, name: str, photos: Sequence[LabelledPhoto]) -> None:
    """Check that train has photos, and that there are classes to distinguish.

    Raises:
        InputError: there are none.
    """
    if not any(photo.split == "train" for photo in photos):
        raise InputError(f"{folder} ({name}) has no labelled photo: check that the training table is complete")
    if len({photo.class_id for photo in photos}) < 2:
        raise InputError(
            f"{folder} ({name}) has only one class, {photos[0].class_id!r}: check that this is the folder as downloaded"
        )


def _one_per_observation(
    folder: Path, photos: Sequence[LabelledPhoto], plural: str, value_of: Callable[[LabelledPhoto], str]
) -> dict[str, str]:
    """The class or the split of each observation, which all of its photos have.

    Raises:
        InputError: an observation has several.
    """
    values: dict[str, str] = {}
    several: dict[str, set[str]] = {}
    for photo in photos:
        value = value_of(photo)
        first = values.setdefault(photo.observation, value)
        if value != first:
            several.setdefault(photo.observation, {first}).add(value)
    if several:
        observation, found = max(several.items(), key=lambda item: len(item[1]))
        raise InputError(f"observation {observation} in {folder} is in {len(found)} {plural}: fix the table")
    return values


def _text_of_classes(photos: Sequence[LabelledPhoto], text_of: Callable[[LabelledPhoto], str]) -> dict[str, str]:
    """A text about each class, which the rows of some of its photos may lack; of several, the last by alphabet."""
    texts: dict[str, str] = {}
    for photo in photos:
        text, known = text_of(photo), texts.get(photo.class_id)
        if known is None or text > known:
            texts[photo.class_id] = text
    return texts


def _taxa_of_classes(photos: Sequence[LabelledPhoto]) -> dict[str, tuple[str, ...]]:
    """The names of each class's taxa, by TAXONOMY."""
    clean = cache(taxon_name)
    # Thousands of photos of a class have the same taxa.
    distinct = dict.fromkeys((photo.class_id, photo.taxa or UNKNOWN_TAXA) for photo in photos)
    found: dict[str, tuple[str, ...]] = {}
    for class_id, taxa in distinct:
        names = tuple(clean(name) for name in taxa)
        known = found.get(class_id, UNKNOWN_TAXA)
        found[class_id] = tuple(max(one, other) for one, other in zip(names, known, strict=True))
    return found

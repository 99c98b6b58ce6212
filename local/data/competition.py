"""Read a competition's folder as downloaded: which photos, of which observations and classes, may be learnt from.

What differs between competitions is in `kernel/competitions/`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kernel.competitions.competition import Competition as Layout
from kernel.competitions.competition import CompetitionFolder, LabelledPhoto
from kernel.inputs import InputError
from kernel.observations import Observation, group_photos
from kernel.tables import BLANKS, RESOLUTIONS, TAXONOMY, describe_left_out, names_nothing, respell
from local.base.console import say_once
from local.data.folder import find_competition
from local.data.taxonomy import Taxonomy

COLUMNS = ("split", "observation", "class_id", "photo")
NAMES = ("species", "poisonous")  # what people want to know of a class; nothing is learnt from it


@dataclass(frozen=True)
class Competition:
    """The labelled part of a competition.

    Attributes:
        photos: a row per photo, with COLUMNS: split "train" or "val", observation and class ids as the competition
            spells them, and the photo's path; then its metadata, TAXONOMY and NAMES, where the competition has them.
        resolution: of the folders of photos, where there are several, the one that was wanted.
    """

    folder: Path
    layout: Layout
    photos: pd.DataFrame
    resolution: str

    @property
    def has_val(self) -> bool:
        """Whether the competition ships a validation split of its own."""
        return bool((self.photos["split"] == "val").any())

    def without_val(self) -> "Competition":
        """The competition as it would be without a validation split."""
        return replace(self, photos=self.photos[self.photos["split"] != "val"])

    def sample(self, observations: int, seed: int) -> "Competition":
        """Only so many observations of train, drawn at random, and a fifth as many of val."""
        rng, kept = np.random.default_rng(seed), []
        for split, count in (("train", observations), ("val", max(1, observations // 5))):
            own = self.photos.loc[self.photos["split"] == split, "observation"].unique()
            kept += rng.permutation(own)[:count].tolist()
        return replace(self, photos=self.photos[self.photos["observation"].isin(kept)])

    def observations_digest(self) -> str:
        """SHA-256 of the labelled observations of train, which tell one competition from another.

        It is the same in whatever resolution the photos are, and whether val is there or not.
        """
        rows = self.photos.loc[self.photos["split"] == "train", ["split", "observation", "class_id"]].drop_duplicates()
        rows = rows.itertuples(index=False, name=None)
        return hashlib.sha256("\n".join(sorted(" ".join(row) for row in rows)).encode()).hexdigest()

    def digest(self) -> str:
        """SHA-256 of the labelled table and of every photo's name and size, the same wherever the folder lies."""
        said = self.photos.drop(columns=[*COLUMNS, *NAMES], errors="ignore").itertuples(index=False, name=None)
        lines = sorted(
            f"{row.split} {row.observation} {row.class_id} {row.photo.relative_to(self.folder).as_posix()} "
            f"{row.photo.stat().st_size if row.photo.is_file() else 'missing'} {' '.join(more)}"
            for row, more in zip(self.photos.itertuples(), said, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Labelled:
    """Observations with their classes.

    Attributes:
        class_ids: one per observation.
    """

    observations: list[Observation]
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.observations)

    def subset(self, wanted: np.ndarray) -> "Labelled":
        """The observations where `wanted`, (observations,) bool, is true."""
        return Labelled([self.observations[index] for index in np.flatnonzero(wanted)], self.class_ids[wanted])


def read_competition(folder: Path, resolution: str = "300p") -> Competition:
    """Read the training tables of a competition's folder.

    Args:
        resolution: of the photos, where the competition ships several; one of `kernel.tables.RESOLUTIONS`.

    Raises:
        InputError: no supported competition is there, a table lacks a column, or an observation is in two splits.
    """
    found, left_out = find_competition(folder), Counter()
    competition = found.competition
    rows = competition.read_labelled(found, resolution, left_out)
    if left_out:
        say_once(f"{folder}{describe_left_out(left_out)}")
    photos = pd.DataFrame(map(_columns_of, rows), columns=list(_columns_of(rows[0])) if rows else COLUMNS)
    photos = photos.drop_duplicates(ignore_index=True)
    for split in photos["split"].unique():
        _check_resolution(found, split, resolution)
    if not (photos["split"] == "train").any():
        raise InputError(
            f"{folder} ({competition.name}) has no labelled photo: check that the training table is complete"
        )
    if photos["class_id"].nunique() < 2:
        raise InputError(
            f"{folder} ({competition.name}) has one class alone, {photos['class_id'].iloc[0]!r}: "
            "check that this is the folder as downloaded"
        )
    if competition.has_table:  # without one, a class id is the name of a folder
        answers = [class_id for _, answer in competition.read_sample(folder) for class_id in answer]
        photos["class_id"] = photos["class_id"].map(respell(photos["class_id"].unique(), answers))
    for column, what in (("class_id", "classes"), ("split", "splits")):
        counts = photos.groupby("observation")[column].nunique()
        if (counts > 1).any():
            raise InputError(f"observation {counts.idxmax()} in {folder} is in {counts.max()} {what}: fix the table")
    return Competition(folder, competition, photos, resolution)


def _columns_of(photo: LabelledPhoto) -> dict[str, object]:
    """A row of `Competition.photos`."""
    row = dict(zip(COLUMNS, (photo.split, photo.observation, photo.class_id, photo.path), strict=True))
    if photo.taxa:
        names = dict(zip(NAMES, (photo.species, photo.poisonous), strict=True))
        row |= {**photo.metadata, **dict(zip(TAXONOMY, photo.taxa, strict=True)), **names}
    return row


def _check_resolution(found: CompetitionFolder, split: str, wanted: str) -> None:
    """Say which resolution is read if the wanted one is not there.

    Raises:
        InputError: the folder of the split is there, without any of the competition's resolutions.
    """
    folder, there = found.split_folder(split), found.resolutions(split)
    read = found.photo_folder(split, wanted)
    if there and read.name != wanted:
        say_once(f"{folder.parent} has {', '.join(there)}, not {wanted}: reading {read.name}")
    elif found.competition.resolutions and folder.is_dir() and not there:
        entries = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
        raise InputError(f"{folder} has none of {', '.join(RESOLUTIONS)}, but {entries}: download the photos again")


def labelled(competition: Competition, *splits: str) -> Labelled:
    """The labelled observations of some splits, in the table's order."""
    photos = competition.photos[competition.photos["split"].isin(splits)]
    said = photos.filter(competition.layout.metadata).to_dict("records") or [{}] * len(photos)
    observations = group_photos(zip(photos["observation"], photos["photo"], said, strict=True))
    classes = dict(zip(photos["observation"], photos["class_id"], strict=True))
    return Labelled(observations, np.array([classes[observation.id] for observation in observations], dtype=object))


def lineages(competition: Competition) -> dict[str, tuple[str, ...]]:
    """Of each class the names of its taxa by TAXONOMY, "" where no row of the class names one; see `taxon_name`."""
    photos = competition.photos.reindex(columns=["class_id", *TAXONOMY], fill_value="")
    for rank in TAXONOMY:
        photos[rank] = photos[rank].map({name: taxon_name(name) for name in photos[rank].unique()})
    named = photos.groupby("class_id").max()  # "" sorts before every name
    return dict(zip(named.index, named.itertuples(index=False, name=None), strict=True))


def taxon_name(name: str) -> str:
    """The name of a taxon without surrounding spaces; "" for a name that stands for none.

    Classes without a taxon are no relatives of each other. "Agaricales incertae sedis" and "unclassified Agaricales"
    stand for none too: they are what has no taxon at this rank.
    """
    words = name.casefold().replace("_", " ").split()
    is_none = names_nothing(name) or words[0] in BLANKS or "incertae sedis" in " ".join(words)
    return "" if is_none else name.strip()


def read_taxonomy(competition: Competition, classes: Sequence[str]) -> Taxonomy:
    """The genus and family of each class; one that is not named is the class's own."""
    known, unknown = lineages(competition), ("",) * len(TAXONOMY)
    lines = [known.get(class_id, unknown) for class_id in classes]
    ranks = [
        [line[TAXONOMY.index(rank)] or f"of {class_id}" for line, class_id in zip(lines, classes, strict=True)]
        for rank in ("genus", "family")
    ]
    return Taxonomy(*(np.unique(names, return_inverse=True)[1] for names in ranks))


def read_ranks(competition: Competition, classes: Sequence[str]) -> list[np.ndarray | None]:
    """Per rank of TAXONOMY (classes,) int, the group of each class; None for one that the competition never names."""
    known, unknown, ranks = lineages(competition), ("",) * len(TAXONOMY), []
    for place in range(len(TAXONOMY)):
        names = [known.get(class_id, unknown)[place] for class_id in classes]
        named = [name or f"of {class_id}" for name, class_id in zip(names, classes, strict=True)]
        ranks.append(np.unique(named, return_inverse=True)[1] if any(names) else None)
    return ranks


def largest_classes(part: Labelled, of: Labelled, count: int) -> Labelled:
    """The observations whose class is one of the `count` that have the most in `of`; all of them for 0."""
    if not count:
        return part
    ids, sizes = np.unique(of.class_ids, return_counts=True)
    return part.subset(np.isin(part.class_ids, ids[np.argsort(-sizes, kind="stable")[:count]]))


def places_of(class_ids: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The place in `classes` of each class id, (observations,) int; -1 for one that is not there."""
    place = {class_id: index for index, class_id in enumerate(classes)}
    return np.array([place.get(class_id, -1) for class_id in class_ids], dtype=np.int64)


def split_for_validation(competition: Competition, seed: int) -> tuple[Labelled, Labelled]:
    """What may be learnt from, and an observation-disjoint rest to judge by.

    The competition's own validation split is the rest, where there is one. Elsewhere one observation in five is, never
    the last of its class.
    """
    train = labelled(competition, "train")
    if competition.has_val:
        return train, labelled(competition, "val")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(train))
    place = pd.Series(train.class_ids[shuffled]).groupby(train.class_ids[shuffled]).cumcount()  # within its class
    held_out = np.zeros(len(train), dtype=bool)
    held_out[shuffled] = place % 5 == 1
    return train.subset(~held_out), train.subset(held_out)


def sort_ids(class_ids: np.ndarray) -> list[str]:
    """Distinct class ids, in order of number where all are numbers."""
    distinct = set(class_ids)
    if all(name.isdecimal() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)

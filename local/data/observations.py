"""The labelled observations of a competition: one structure, from the training tables to the bank.

Whatever belongs to the observations is in their order: a split or a fold is a bool mask, embeddings are an array.
"""

import hashlib
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kernel.competitions.competition import Competition
from kernel.inputs import InputError
from kernel.observations import Observation
from kernel.tables import TAXONOMY, clean_id, names_nothing

UNKNOWN_TAXA = ("",) * len(TAXONOMY)


@dataclass(frozen=True)
class Taxonomy:
    """The genus and the family of each class, (classes,) int. A class without one is alone in a group of its own."""

    genus: np.ndarray
    family: np.ndarray

    @classmethod
    def unknown(cls, classes: int) -> "Taxonomy":
        """Of classes that have no relatives."""
        return cls(np.arange(classes), np.arange(classes))


@dataclass(frozen=True, eq=False)
class LabelledObservations:
    """Observations with their classes, those of the competition's train before those of its val.

    Attributes:
        folder: as downloaded.
        competition: to which it belongs.
        resolution: of the photos, as requested; the competition may ship only others.
        observations: with their photos and metadata.
        class_ids: (observations,) str objects, as the competition spells them.
        is_val: (observations,) bool, those of the competition's own validation split.
        taxa: the names of each class at the ranks of TAXONOMY, "" where the tables give none.
        species: the name of each class, "" where the tables give none; for reports, and for text towers.
        poisonous: "1", "0" or "" for each class; only for reports.
    """

    folder: Path
    competition: Competition
    resolution: str
    observations: Sequence[Observation]
    class_ids: np.ndarray
    is_val: np.ndarray
    taxa: Mapping[str, tuple[str, ...]]
    species: Mapping[str, str]
    poisonous: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def has_val(self) -> bool:
        """Whether the competition ships a validation split of its own."""
        return bool(self.is_val.any())

    @property
    def ids(self) -> list[str]:
        """The id of each observation."""
        return [observation.id for observation in self.observations]

    @property
    def photos(self) -> list[Path]:
        """The photos of all observations."""
        return [photo for observation in self.observations for photo in observation.photos]

    @property
    def classes(self) -> list[str]:
        """The distinct class ids, sorted by `sort_ids`."""
        return sort_ids(self.class_ids)

    @property
    def has_metadata(self) -> bool:
        """Whether any observation has metadata."""
        return any(observation.metadata for observation in self.observations)

    @cached_property
    def photo_sizes(self) -> dict[Path, int | None]:
        """The bytes of each photo; None for one that is missing."""
        return {photo: _file_size(photo) for photo in self.photos}

    def subset(self, selected: np.ndarray) -> "LabelledObservations":
        """Some of the observations.

        Args:
            selected: (observations,) bool mask, or the indices of the observations in the new order.
        """
        indices = np.flatnonzero(selected) if selected.dtype == bool else selected
        return replace(
            self,
            observations=[self.observations[index] for index in indices],
            class_ids=self.class_ids[indices],
            is_val=self.is_val[indices],
        )

    def in_splits(self, *splits: str) -> "LabelledObservations":
        """The observations of some of the competition's splits, "train" and "val"."""
        return self.subset(self.split_mask(*splits))

    def split_mask(self, *splits: str) -> np.ndarray:
        """(observations,) bool, those of some of the competition's splits, "train" and "val"."""
        return np.where(self.is_val, "val" in splits, "train" in splits)

    def sample(self, count: int, seed: int) -> "LabelledObservations":
        """At most `count` observations of train, drawn at random, and a fifth as many of val."""
        rng, selected = np.random.default_rng(seed), np.zeros(len(self), dtype=bool)
        for split, size in ((~self.is_val, count), (self.is_val, max(1, count // 5))):
            selected[rng.permutation(np.flatnonzero(split))[:size]] = True
        return self.subset(selected)

    def group_by_rank(self, classes: Sequence[str]) -> dict[str, np.ndarray | None]:
        """The taxon of each class at each rank of TAXONOMY.

        Returns:
            By rank, (classes,) int. A class without a taxon at a rank is the only one in its group. None for a rank at
            which no class has one.
        """
        groups: dict[str, np.ndarray | None] = {}
        for level, rank in enumerate(TAXONOMY):
            names = [self.taxa.get(class_id, UNKNOWN_TAXA)[level] for class_id in classes]
            distinct = [name or f"of {class_id}" for name, class_id in zip(names, classes, strict=True)]
            groups[rank] = np.unique(distinct, return_inverse=True)[1] if any(names) else None
        return groups

    def taxonomy(self, classes: Sequence[str]) -> Taxonomy:
        """The genus and the family of each class."""
        groups, alone = self.group_by_rank(classes), Taxonomy.unknown(len(classes))
        genus, family = groups["genus"], groups["family"]
        return Taxonomy(alone.genus if genus is None else genus, alone.family if family is None else family)

    def observations_digest(self) -> str:
        """SHA-256 of the ids and classes of train's observations, which identifies the competition.

        It does not depend on the resolution of the photos, nor on whether there is a val.
        """
        train = self.in_splits("train")
        lines = sorted(f"train {name} {class_id}" for name, class_id in zip(train.ids, train.class_ids, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def digest(self) -> str:
        """SHA-256 of all that a run may learn from, with each photo's path and size, wherever the folder is."""
        has_taxa = any(any(taxa) for taxa in self.taxa.values())
        lines = []
        for observation, class_id, is_val in zip(self.observations, self.class_ids, self.is_val, strict=True):
            cells = [observation.metadata.get(column, "") for column in self.competition.metadata]
            cells += self.taxa.get(class_id, UNKNOWN_TAXA) if has_taxa else ()
            for photo in observation.photos:
                size = self.photo_sizes[photo]
                lines.append(
                    f"{'val' if is_val else 'train'} {observation.id} {class_id} "
                    f"{photo.relative_to(self.folder).as_posix()} {'missing' if size is None else size} "
                    f"{' '.join(cells)}"
                )
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Which observations an encoder is trained on, and which validate it.

    Attributes:
        labelled: all observations, also those that are neither.
        train, validation: (observations,) bool, disjoint.
    """

    labelled: LabelledObservations
    train: np.ndarray
    validation: np.ndarray

    @property
    def train_set(self) -> LabelledObservations:
        """The observations to train on."""
        return self.labelled.subset(self.train)

    @property
    def validation_set(self) -> LabelledObservations:
        """The observations to validate on."""
        return self.labelled.subset(self.validation)

    def largest_classes(self, count: int) -> "Split":
        """The same without the observations of other classes than the `count` largest of train; 0 keeps all."""
        if not count:
            return self
        class_ids = self.labelled.class_ids
        names, sizes = np.unique(class_ids[self.train], return_counts=True)
        is_large = np.isin(class_ids, names[np.argsort(-sizes, kind="stable")[:count]])
        return replace(self, train=self.train & is_large, validation=self.validation & is_large)


def select_observations(
    whole: LabelledObservations, uses_val: bool, subset: int, seed: int, exclude: Sequence[str] = ()
) -> LabelledObservations:
    """The observations of a competition that a run uses: without val, or a sample of `subset`, if it says so.

    Args:
        exclude: ids of observations to leave out, of the sample too.

    Raises:
        InputError: the competition has no such observation, or fewer than two classes are left.
    """
    labelled = whole if uses_val else whole.in_splits("train")
    labelled = labelled.sample(subset, seed) if subset else labelled
    if not exclude:
        return labelled
    known = set(whole.ids)
    ids = {name if name in known else clean_id(name) for name in exclude}
    unknown = sorted(ids - known)
    if unknown:
        raise InputError(
            f"exclude names observation {unknown[0]!r}, which {whole.folder} lacks: give ids of its training tables"
        )
    left = labelled.subset(np.array([name not in ids for name in labelled.ids], dtype=bool))
    if len(left.in_splits("train").classes) < 2:
        raise InputError(f"exclude leaves fewer than two classes to train on in {whole.folder}: exclude less")
    return left


def split_for_validation(labelled: LabelledObservations, seed: int) -> Split:
    """Keep observations apart to validate on: the competition's own val, if it has one.

    Otherwise every fifth observation of a class, in random order, beginning with the second: a class keeps at least
    one observation to train on.

    Returns:
        The split, whose observations are in a new order: those to train on first.
    """
    validation = labelled.is_val
    if not labelled.has_val:
        labels = encode_labels(labelled.class_ids, labelled.classes)
        drawn = np.random.default_rng(seed).permutation(len(labelled))
        drawn, sizes = drawn[np.argsort(labels[drawn], kind="stable")], np.bincount(labels)  # class after class
        validation = np.zeros(len(labelled), dtype=bool)
        validation[drawn] = (np.arange(len(drawn)) - np.repeat(np.cumsum(sizes) - sizes, sizes)) % 5 == 1
    order = np.argsort(validation, kind="stable")
    return Split(labelled.subset(order), ~validation[order], validation[order])


def sort_ids(class_ids: Iterable[str]) -> list[str]:
    """The distinct class ids, in order of number where all are numbers."""
    distinct = set(class_ids)
    if all(name.isdecimal() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def encode_labels(class_ids: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """The index in `classes` of each class id, (observations,) int; -1 for one that is not there."""
    index_of = {class_id: index for index, class_id in enumerate(classes)}
    return np.array([index_of.get(class_id, -1) for class_id in class_ids], dtype=np.int64)


def names_of(labelled: LabelledObservations, classes: Sequence[str]) -> list[str]:
    """The name of each class's species, with the id where two share it."""
    species = [labelled.species.get(class_id, "") for class_id in classes]
    names = [class_id if names_nothing(name) else name for class_id, name in zip(classes, species, strict=True)]
    counts = Counter(names)
    return [f"{name} #{one}" if counts[name] > 1 else name for name, one in zip(names, classes, strict=True)]


def words_of(labelled: LabelledObservations, classes: Sequence[str]) -> list[str]:
    """The name of each class in words, without "_" and a number before it; "" where only a number or code is known."""
    names = [labelled.species.get(class_id, "").replace("_", " ") for class_id in classes]
    words = [re.sub(r"^[\W\d]+", "", name).strip() for name in names]
    return ["" if names_nothing(name) or not re.search(r"[^\W\d]{2}", name) else name for name in words]


def _file_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None

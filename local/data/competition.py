"""Read a competition's folder as downloaded: which photos, of which observations and classes, may be learnt from.

The test table is the kernel's business (`kernel/observations.py`); to support another kind of competition, add its
layout there and, where its tables have a form of their own, the reading of the training table here.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kernel.inputs import InputError, find_folders
from kernel.metadata_prior import BLANKS, names_nothing
from kernel.observations import (
    LAYOUTS,
    METADATA,
    RESOLUTIONS,
    Layout,
    Observation,
    class_folders,
    clean_id,
    coco_id,
    find_photos,
    group_photos,
    is_blank,
    photo_path,
    read_coco,
    read_sample,
    read_table,
    recognise,
    resolution_folder,
    respell,
    tell_left_out,
    visible,
)
from kernel.photos import name_unreadable
from local.banks.estimators import Taxonomy
from local.base.console import counted, say_once

COLUMNS = ("split", "observation", "class_id", "photo")
TAXONOMY = ("phylum", "class", "order", "family", "genus")  # the columns above the species, the widest first
NAMES = ("species", "poisonous")  # what people want to know of a class; nothing is learnt from it
UNREADABLE_FILE = "unreadable.csv"  # in a run's folder
UNREADABLE_LIMIT = 0.25  # fraction of unreadable photos above which something is wrong with all, as in the kernel
TIME_LIMITS = {layout.name: 9 * 3600 for layout in LAYOUTS} | {"fungiclef": 12 * 3600}  # seconds, of a GPU kernel


@dataclass(frozen=True)
class Competition:
    """The labelled part of a competition.

    Attributes:
        photos: a row per photo, with COLUMNS: split "train" or "val", observation and class ids as the competition
            spells them, and the photo's path; then METADATA, TAXONOMY and NAMES, where the layout has them.
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
    """Read the training tables of a folder of any known layout.

    Args:
        resolution: of the photos, where the competition ships several; see `kernel.observations.RESOLUTIONS`.

    Raises:
        InputError: the folder is of no known layout, a table lacks a column, or an observation is in two splits.
    """
    layout, table = find_layout(folder)
    left_out: Counter = Counter()
    rows = READERS[table.suffix](folder, layout, table, resolution, left_out)
    photos = pd.DataFrame(rows, columns=list(rows[0]) if rows else COLUMNS).drop_duplicates(ignore_index=True)
    if left_out:
        say_once(f"{folder}{tell_left_out(left_out)}")
    if not (photos["split"] == "train").any():
        raise InputError(f"{folder} ({layout.name}) has no labelled photo: check that the training table is complete")
    if photos["class_id"].nunique() < 2:
        raise InputError(
            f"{folder} ({layout.name}) has one class alone, {photos['class_id'].iloc[0]!r}: "
            "check that this is the folder as downloaded"
        )
    if layout.name != "class-folders":  # there an id is the name of a file or folder
        spelt = respell(photos["class_id"].unique(), read_sample(folder, layout)[1])
        photos["class_id"] = photos["class_id"].map(spelt)
    for column, what in (("class_id", "classes"), ("split", "splits")):
        counts = photos.groupby("observation")[column].nunique()
        if (counts > 1).any():
            raise InputError(f"observation {counts.idxmax()} in {folder} is in {counts.max()} {what}: mend the table")
    return Competition(folder, layout, photos, resolution)


def find_layout(folder: Path) -> tuple[Layout, Path]:
    """The layout of a competition's folder, and its test table.

    Raises:
        InputError: the folder does not exist, or is of no known layout.
    """
    if not folder.is_dir():
        what = "is a file: unpack it, and" if folder.exists() else "does not exist:"
        raise InputError(f"{folder} {what} give the competition's folder as downloaded")
    found = recognise(folder)
    if found:
        return found
    near = next((place for place in _nearby(folder) if _looks_meant(place)), None)
    if near:
        raise InputError(f"no supported competition found in {folder}: did you mean {near}?")
    looked_for = ", ".join(f"{layout.marker} ({layout.name})" for layout in LAYOUTS)
    raise InputError(
        f"no supported competition found in {folder}: looked for {looked_for}; class folders are arranged as "
        "train/CLASS/photo, or as CLASS/photo alone; give the folder as downloaded"
    )


def _nearby(folder: Path) -> Iterable[Path]:
    """The folders above and below one that the user may have meant."""
    yield from folder.resolve().parents[:4]
    yield from find_folders(folder, lambda below: below != folder and _looks_meant(below), depth=2)


def _looks_meant(folder: Path) -> bool:
    """Whether a folder is a competition's; pictures in folders alone may be anything."""
    found = recognise(folder)
    return found is not None and (found[0].name != "class-folders" or (folder / "train").is_dir())


def refuse_missing(competition: Competition) -> None:
    """What is learnt from is there, but for a few photos.

    Raises:
        InputError: of a split, more than UNREADABLE_LIMIT of the photos are missing.
    """
    for split, photos in competition.photos.groupby("split")["photo"]:
        missing = [path for path in photos if not path.is_file()]
        if len(missing) > UNREADABLE_LIMIT * len(photos):
            raise InputError(
                f"{len(missing)} of {len(photos)} photos of {split} are missing, such as {missing[0]}: look where the "
                "photos lie, or download them again"
            )


def check_readable(unreadable: Sequence[tuple[Path, str]], photos: int) -> None:
    """Name the photos that could not be read, with their causes.

    Raises:
        InputError: they are more than UNREADABLE_LIMIT of all.
    """
    if not unreadable:
        return
    found = f"{len(unreadable)} of {counted(photos, 'photo')} could not be read: {name_unreadable(unreadable)}"
    if len(unreadable) > UNREADABLE_LIMIT * photos:
        raise InputError(f"{found}; download them again, or look at what they are")
    say_once(f"{found}; left out, and listed in {UNREADABLE_FILE}")


def labelled(competition: Competition, *splits: str) -> Labelled:
    """The labelled observations of some splits, in the table's order."""
    photos = competition.photos[competition.photos["split"].isin(splits)]
    said = photos.filter(METADATA).to_dict("records") or [{}] * len(photos)
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


def _read_fungi(folder: Path, layout: Layout, marker: Path, resolution: str, left_out: Counter) -> list[dict]:
    tables = {
        "train": marker.with_name(marker.name.replace("-ClosedSet", "").replace("-Test", "-Train")),
        "val": marker.with_name(marker.name.replace("-Test", "-Val")),
    }
    rows = []
    for split, table in tables.items():
        if not table.is_file() and split == "val":
            continue
        photos = _resolution_folder(layout.photo_folder(folder, marker, split), resolution)
        needed = ("observationID", "filename", "category_id")
        for row in read_table(table, needed, filled=needed, left_out=left_out):
            more = {column: row.get(column) or "" for column in (*METADATA, *TAXONOMY, *NAMES)}
            more["species"] = more["species"] or row.get("scientificName") or ""
            ids = clean_id(row["observationID"]), clean_id(row["category_id"])
            said = (split, *ids, photo_path(photos, row["filename"]))
            rows.append(dict(zip(COLUMNS, said, strict=True)) | more)
    return rows


def _resolution_folder(split: Path, wanted: str) -> Path:
    """The split's folder in the wanted resolution, or in the one that the kernel would take instead.

    Raises:
        InputError: the split is there, and in none of RESOLUTIONS.
    """
    found = resolution_folder(split, wanted)
    if found.name != wanted:
        present = ", ".join(name for name in RESOLUTIONS if (split / name).is_dir())
        say_once(f"{split.parent} has {present}, not {wanted}: reading {found.name}")
    elif split.is_dir() and not found.is_dir():
        there = ", ".join(sorted(path.name for path in split.iterdir())[:4]) or "nothing"
        raise InputError(f"{split} has none of {', '.join(RESOLUTIONS)}, but {there}: download the photos again")
    return found


def _read_herbarium(folder: Path, layout: Layout, marker: Path, resolution: str, left_out: Counter) -> list[dict]:
    table = folder / str(marker.relative_to(folder)).replace("test", "train")
    photos = layout.photo_folder(folder, marker, "train")
    names, said = read_coco(table)
    try:
        labels = [(clean_id(str(note["image_id"])), clean_id(str(note["category_id"]))) for note in said["annotations"]]
        rows = [
            ("train", image, label, photo_path(photos, names[image])) for image, label in labels if not is_blank(label)
        ]
        if len(rows) < len(labels):
            left_out[f"annotations of {table.name} without category_id"] += len(labels) - len(rows)
        ranks = {
            coco_id(category, "category"): {rank: str(category.get(rank) or "") for rank in TAXONOMY}
            | {"species": str(category.get("name") or category.get("scientificName") or ""), "poisonous": ""}
            for category in said.get("categories", ())
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{table} cannot be read as COCO metadata ({error!r}): download it again") from error
    unknown = dict.fromkeys((*TAXONOMY, *NAMES), "")
    return [dict(zip(COLUMNS, row, strict=True)) | ranks.get(row[2], unknown) for row in rows]


def _read_class_folders(folder: Path, layout: Layout, marker: Path, resolution: str, left_out: Counter) -> list[dict]:
    classes = class_folders(folder)
    if not classes:
        raise InputError(
            f"{folder} (class-folders) has no folders of classes: arrange the photos as train/CLASS/photo, "
            "val/CLASS/photo and test/photo, or as CLASS/photo alone"
        )
    val = next((folder / name for name in ("val", "valid", "validation") if (folder / name).is_dir()), None)
    outside = [path for root in {classes[0].parent, val} - {None} for path in visible(root.iterdir()) if path.is_file()]
    if outside:
        left_out["files in no class's folder"] += len(outside)
    folders = [("train", path) for path in classes]
    folders += [("val", path) for path in visible(val.iterdir() if val else ()) if path.is_dir()]
    rows = [
        dict(zip(COLUMNS, (split, path.relative_to(folder).as_posix(), own.name, path), strict=True))
        for split, own in folders
        for path in find_photos(own, left_out)
    ]
    for row in rows:
        try:
            row["observation"].encode()
        except UnicodeEncodeError as error:
            reason = "is no UTF-8: unzip it as such, or rename it"
            raise InputError(f"{row['observation']!a} in {folder} {reason}") from error
    return rows


# By the form of the test table. Each returns a row per photo, COLUMNS, and METADATA, TAXONOMY and NAMES if it knows
# them; and counts what it leaves out.
READERS: dict[str, Callable[[Path, Layout, Path, str, Counter], list[dict]]] = {
    ".csv": _read_fungi,
    ".json": _read_herbarium,
    "": _read_class_folders,
}

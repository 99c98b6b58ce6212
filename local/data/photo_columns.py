"""Find the column of a table that names photos, and the folder that has them.

A name may lack its folder or its suffix, or be spelt in another way; see `kernel.competitions.table.photo_keys`.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel.competitions.class_folders import PHOTO_SUFFIXES
from kernel.competitions.table import (
    PHOTO_SUFFIX,
    SETTINGS_FILE,
    TableSettings,
    index_photos,
    list_photos_of,
    photo_keys,
)
from kernel.inputs import InputError
from kernel.tables import compose, find_path, is_blank, is_hidden, iterate_table, photo_name, read_header

TRIED = 60  # names of a column with which a folder of photos is found
COMPLETE = 0.9  # fraction of a column's photos with which it is not looked for further
FOLDERS = 300  # that may hold the photos
WORD_SUFFIX = r"[_-][A-Za-z]+\.\w+$"  # as in 7_left.jpg
LISTED = 200  # files of a folder whose suffixes are tried
OTHER_FORMATS = (".dcm", ".dicom", ".nii", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".svs", ".heic")
# Where photos are looked for, each if the ones before do not find them: the last takes listing all files.
WAYS = ("in a folder", "in a folder of their own", "below a folder")


@dataclass(frozen=True)
class Table:
    """A table in memory, by columns."""

    path: Path
    columns: dict[str, list[str]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str) -> dict[str, None]:
        """The distinct cells of a column that are not blank, in order."""
        return dict.fromkeys(cell for cell in self.columns[column] if not is_blank(cell))


@dataclass(frozen=True)
class PhotoFolder:
    """Where a column's photos are.

    Attributes:
        hits: fraction of the names that are files there.
        exact: how many of those that were tried are so without an added suffix.
        is_nested: see `TableSettings`.
        others: folders in which as many are.
        other_suffixes: with which names are those of files too.
        is_of_other: whether the folder is named like the other split.
    """

    folder: str = "."
    suffixes: tuple[str, ...] = ()
    hits: float = 0
    exact: int = 0
    is_nested: bool = False
    others: tuple[str, ...] = ()
    is_of_other: bool = False
    other_suffixes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the photos need not be looked for further."""
        return self.hits >= COMPLETE and not self.is_of_other


@dataclass
class Search:
    """A search in a folder, with what was given and found so far.

    Attributes:
        given: keys of competition.toml.
        folders: that may hold photos, relative to the folder.
        indices: of the photos in some of them and in the folders below; see `index_photos`.
        doubts: what was guessed among several candidates, in lines.
        has_some_photos: whether some of the photos of the training table are there, but too few to use it.
    """

    folder: Path
    given: Mapping[str, object]
    settings: TableSettings
    folders: list[str] = field(default_factory=list)
    indices: dict[str, dict[str, str]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    has_some_photos: bool = False

    def put(self, **values: object) -> None:
        """Settings that were found; those that are given stay."""
        self.settings = replace(self.settings, **{key: value for key, value in values.items() if key not in self.given})

    def doubt(self, what: str, taken: str, candidates: Iterable[str], key: str) -> None:
        """Note that a guess has several candidates."""
        others = " or ".join(repr(one) for one in candidates if one != taken)
        self.doubts.append(
            f"{self.folder}: {what} is taken to be {taken!r}, but may be {others}: to decide, write {key} into "
            f"{SETTINGS_FILE}"
        )

    def put_photos(self, split: str, found: "PhotoFolder") -> None:
        """Settings of where the photos of "train" or "test" are; notes what else they may be."""
        self.put(**{f"{split}_folder": found.folder}, is_nested=self.settings.is_nested or found.is_nested)
        self.put(suffixes=tuple(dict.fromkeys((*self.settings.suffixes, *found.suffixes))))
        if found.others:
            self.doubt(f"the folder of the {split} photos", found.folder, found.others, f"{split}_folder")
        if found.other_suffixes:
            self.doubt(f"the end of the {split} photos' names", found.suffixes[0], found.other_suffixes, "suffixes")

    def given_column(self, key: str, table: "Table") -> str:
        """A column that competition.toml gives; empty if it does not.

        Raises:
            InputError: the table lacks the column.
        """
        given = str(self.given.get(key, ""))
        if given and given not in table.columns:
            raise InputError(f"{table.path} lacks the column {given!r}, which {SETTINGS_FILE} gives as {key}")
        return given

    def path(self, name: str) -> Path:
        return self.folder / name

    def index(self, folder: str) -> dict[str, str]:
        """The photos in a folder and below it, listed once; see `index_photos`."""
        if folder not in self.indices:
            self.indices[folder] = index_photos(self.folder / find_path(self.folder, folder))
        return self.indices[folder]


def is_number(cell: str) -> bool:
    """Whether a cell has a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_columns(path: Path) -> Table:
    """Read a table.

    Raises:
        InputError: it is not CSV text, or has no rows, or two columns of one name.
    """
    header = read_header(path)
    if len(set(header)) < len(header):
        twice = next(name for name, count in Counter(header).items() if count > 1)
        raise InputError(f"{path} has two columns {twice!r}: rename one")
    columns: dict[str, list[str]] = {name: [] for name in header}
    shared: dict[str, str] = {}  # equal cells are one object, in one of Unicode's forms: they repeat in many rows
    for row in iterate_table(path, ()):
        for name, cells in columns.items():
            cell = row[name] or ""
            cells.append(shared[cell] if cell in shared else shared.setdefault(cell, compose(cell)))
    if not any(columns.values()):
        raise InputError(f"{path} has no rows: download it again")
    return Table(path, columns)


def _folders_of_photos(root: Path) -> list[str]:
    """The folder itself and those of its first two levels."""
    found, level = ["."], [""]
    for _ in range(2):
        below = []
        for parent in level:
            try:
                with os.scandir(root / parent) as entries:
                    below += [
                        f"{parent}/{entry.name}".lstrip("/")
                        for entry in entries
                        if not is_hidden(entry.name) and entry.is_dir()
                    ]
            except OSError:
                continue
            if len(below) > FOLDERS:  # of classes, or of observations
                break
        level = sorted(below)[:FOLDERS]
        found += level
    return found


def _first_files(folder: Path) -> list[str]:
    """Names of a few files in a folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for _, entry in zip(range(LISTED), entries, strict=False)]
    except OSError:
        return []


def _is_of_photo(name: str) -> bool:
    """Whether a file's name has a photo's suffix, or none."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in PHOTO_SUFFIXES or not re.fullmatch(r"\.[a-z]\w*", suffix)


def _commonest_suffixes(names: Iterable[str], pattern: str = r"\.\w+$") -> list[str]:
    found = (re.search(pattern, name) for name in names if _is_of_photo(name))
    counts = Counter(one[0] for one in found if one)
    return sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:3]  # alike in the folders of train and test


def find_photos_of(state: Search, cells: Collection[str], split: str, way: str) -> PhotoFolder:
    """The folder that has most of the photos that a column names; those of the other split only if no other has any.

    Args:
        split: "train" or "test".
        way: one of WAYS.
    """
    other = "train" if split == "test" else "test"
    cells = list(cells)
    tried = [photo_name(cell) for cell in cells[:: max(1, len(cells) // TRIED)]][:TRIED]
    key = f"{split}_folder"
    if key in state.given:
        return _try_folder(state, str(state.given[key]), tried, way)
    state.folders = state.folders or _folders_of_photos(state.folder)
    every = [name for name in state.folders if way != WAYS[2] or "/" not in name or split in name.lower()]
    own = [name for name in every if other not in name.lower()]
    best = PhotoFolder()
    for folders in (own, [name for name in every if name not in own]):
        tried_folders = [_try_folder(state, name, tried, way) for name in folders]
        best = max(tried_folders, key=lambda one: (one.hits, split in one.folder.lower(), one.exact), default=best)
        if best.hits:
            is_named = split in best.folder.lower()
            equal = [
                one for one in tried_folders if one.hits == best.hits and (split in one.folder.lower()) == is_named
            ]
            parent = best.folder.rpartition("/")[0]
            if split in parent.lower() and any(
                one.folder.rpartition("/")[0] == parent != one.folder for one in equal[1:]
            ):
                best = PhotoFolder()
                continue  # folders of classes, whose photos have the same names
            others = [one.folder for one in equal if one.folder != best.folder]
            if best.is_nested:  # the folder itself and those within the best have the same photos
                best = next((one for one in equal if one.folder != "."), best)
                others = [name for name in others if name != "." and not f"{name}/".startswith(f"{best.folder}/")]
            return replace(best, others=tuple(others), is_of_other=best.folder not in own)
    return best


def _try_folder(state: Search, name: str, tried: Sequence[str], way: str) -> PhotoFolder:
    folder, is_nested = state.folder / find_path(state.folder, name), way == WAYS[2]
    if way == WAYS[1]:
        exact = sum(bool(list_photos_of(folder / find_path(folder, one))) for one in tried)
        return PhotoFolder(name, ("",), exact / max(1, len(tried)), exact)

    def exists(photo: str) -> bool:
        if is_nested:
            return not state.index(name).keys().isdisjoint(photo_keys(photo))
        return _is_of_photo(photo) and os.path.isfile(folder / find_path(folder, photo))

    exact = sum(map(exists, tried))
    there: list[str] = []
    if exact < len(tried):
        names = list(state.index(name).values() if is_nested else _first_files(folder))
        there = _commonest_suffixes(names)
        if is_nested:  # where nothing was found by plain suffixes
            there += _commonest_suffixes(names, WORD_SUFFIX)
    suffixes = state.given.get("suffixes", there)
    used, left = Counter(), Counter()
    for one in tried:
        if not PHOTO_SUFFIX.search(one) and not exists(one):
            fitting = [suffix for suffix in suffixes if exists(one + suffix)]
            used.update(fitting[:1])
            left.update(fitting[1:])
    hits = exact + used.total()
    return PhotoFolder(
        name,
        tuple(suffix for suffix, _ in used.most_common()),
        hits / max(1, len(tried)),
        exact,
        is_nested,
        other_suffixes=tuple(left),
    )


def find_image_column(
    state: Search, table: Table, split: str, key: str, preferred: Sequence[str]
) -> tuple[str, PhotoFolder]:
    """The column that names photos, and where these are; "" if none does.

    Of several, the one with the most different names counts, then one with suffixes, then one of the preferred names.
    Where folders are named, only a preferred one with another folder in each row does: others may name classes.
    """
    given, found = state.given_column(key, table), []
    for way in WAYS:
        for column in [given] if given else table.columns:
            values = table.values(column)
            if way == WAYS[1] and not given and (column not in preferred or len(values) < table.rows):
                continue
            first = list(values)[:: max(1, len(values) // 8)][:8]
            if first and find_photos_of(state, first, split, way).hits:
                photo_folder = find_photos_of(state, values, split, way)
                if photo_folder.hits >= 0.5:
                    found.append(
                        (
                            round(photo_folder.hits, 1),
                            not photo_folder.is_of_other,
                            len(values),
                            photo_folder.exact,
                            column in preferred,
                            column,
                            photo_folder,
                        )
                    )
        if any(one.is_complete and 2 * rows >= table.rows for _, _, rows, *_, one in found):
            break
    if not found:
        return given, PhotoFolder()
    best = max(found, key=lambda one: one[:5])
    equal = [
        one[5]
        for one in found
        if (one[:5] == best[:5] and one[6].folder != best[6].folder)
        or (one[:4] == best[:4] and not _share_photos(table, one[5], best[5]))
    ]
    if equal:
        state.doubt(f"the column of photos in {table.path.name}", best[5], equal, key)
    return best[5], best[6]


def _share_photos(table: Table, column: str, other: str) -> bool:
    """Whether two columns name the same photo in one of the first rows."""
    rows = list(zip(table.columns[column], table.columns[other], strict=True))[:TRIED]
    return any(photo_keys(photo_name(one))[1] == photo_keys(photo_name(two))[1] for one, two in rows)


def describe_missing_photos(state: Search, train: Table) -> str:
    """Why no column of the training table names photos, in one line. Notes whether some of them are there."""
    counts: dict[str, int] = {}
    there = {key for key, path in state.index(".").items() if os.path.splitext(path)[1].lower() in PHOTO_SUFFIXES}
    for column in train.columns:
        values = train.values(column)
        if 2 * len(values) >= train.rows:
            counts[column] = sum(not there.isdisjoint(photo_keys(photo_name(cell))) for cell in values)
    column = max(counts, key=counts.get, default="")
    if 0 < counts.get(column, 0) < len(train.values(column)):
        state.has_some_photos = True
        return (
            f"only {counts[column]:,} of the {len(train.values(column)):,} photos that {column!r} of {train.path} "
            f"names are in {state.folder}: unpack all of them there, or write image_column, train_folder and suffixes "
            f"into {SETTINGS_FILE}"
        )
    names = ", ".join(map(repr, list(train.columns)[:8]))
    files = (name for folder in state.folders for name in _first_files(state.path(folder)))
    others = sorted({os.path.splitext(name)[1].lower() for name in files}.intersection(OTHER_FORMATS))
    return (
        f"no column of {train.path} names photos in {state.folder} (it has {names}): unpack the photos there, or write "
        f"image_column, train_folder and suffixes into {SETTINGS_FILE}"
        + (f"; {', '.join(others)} files cannot be read: convert them to .png" if others else "")
    )

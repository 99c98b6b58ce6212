"""Find what the tables of a competition hold: its files, columns, folders and the form of its submission.

Each is guessed by what the tables and folders hold, unless competition.toml gives it.
"""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import compress
from pathlib import Path

from kernel.competitions.class_folders import PHOTO_SUFFIXES
from kernel.competitions.competition import SAMPLES, Competition, matching
from kernel.competitions.table import (
    NOT_TRAINING,
    PHOTO_SUFFIX,
    SETTINGS_FILE,
    TRAINING,
    Spelling,
    TableSettings,
    configure,
    index_photos,
    is_one,
    list_photos_of,
    photo_keys,
)
from kernel.inputs import InputError, shorten
from kernel.manifest import from_json
from kernel.tables import (
    clean_id,
    compose,
    find_path,
    is_blank,
    is_hidden,
    iterate_table,
    photo_name,
    read_header,
    visible,
)

OTHER_FORMATS = (".dcm", ".dicom", ".nii", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".svs", ".heic")
METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1", "log_loss")
FOUND_ONLY = ("header", "is_nested", "is_complete")
KEYS = tuple(one.name for one in fields(TableSettings) if one.name not in FOUND_ONLY)
TRIED = 60  # names of a column with which a folder of photos is found
COMPLETE = 0.9  # fraction of a column's photos with which it is not looked for further
FOLDERS = 300  # that may hold the photos
CATEGORIES = 200  # most values of a column of metadata, unless they are numbers
WORD_SUFFIX = r"[_-][A-Za-z]+\.\w+$"  # as in 7_left.jpg
LISTED = 200  # files of a folder whose suffixes are tried
ARCHIVE = re.compile(r"\.(zip|7z|rar|gz|tgz|tar|bz2|xz)$", re.IGNORECASE)
# Where photos are looked for, each if the ones before do not find them: the last takes listing all files.
WAYS = ("in a folder", "in a folder of their own", "below a folder")
# Usual names of the column of classes, without spaces and underscores: those of ids or of either kind, then of names.
LABELS = (
    ("label", "labels", "class", "classid", "labelid", "category", "categoryid", "target", "targetid", "y"),
    ("classname", "labelname", "categoryname", "species", "speciesid", "scientificname", "breed", "variety"),
)
BOXES = (
    *({name} for name in ("bbox", "bboxes", "boundingbox", "boundingboxes", "encodedpixels", "rle", "segmentation")),
    *({"encoding"}, {"polygon"}, {"xmin", "ymin"}, {"x1", "y1"}, {"x", "y", "width", "height"}, {"x", "y", "w", "h"}),
)


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
        is_of_other: whether the folder is named like the other split.
    """

    folder: str = "."
    suffixes: tuple[str, ...] = ()
    hits: float = 0
    exact: int = 0
    is_nested: bool = False
    others: tuple[str, ...] = ()
    is_of_other: bool = False

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
    """

    folder: Path
    given: Mapping[str, object]
    settings: TableSettings
    folders: list[str] = field(default_factory=list)
    indices: dict[str, dict[str, str]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

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


def find_tables(folder: Path) -> Competition | None:
    """The competition that the tables in a folder describe; None if it has none.

    A folder with a sample submission or a train.csv is one, and so is one with a competition.toml. The `problem` of the
    competition says why it cannot be trained on.
    """
    stamps = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_table = entry.name.lower().endswith(".csv") or entry.name == SETTINGS_FILE
                if is_table and not is_hidden(entry.name) and entry.is_file():
                    status = entry.stat()
                    stamps.append((entry.name, status.st_mtime_ns, status.st_size))
    except OSError:
        return None
    return _search(folder, tuple(sorted(stamps))) if stamps else None


@lru_cache(maxsize=64)  # a command asks for the same folder several times
def _search(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Competition | None:
    names = [name for name, *_ in stamps if name != SETTINGS_FILE]
    has_settings, problem = len(names) < len(stamps), ""
    state = Search(folder, {}, TableSettings())
    try:
        if has_settings:
            state.given = read_settings(folder / SETTINGS_FILE)
            state.settings = from_json(TableSettings, dict(state.given), "")
        tables = _find_files(state, names)
        if not tables:
            if not has_settings and not state.settings.sample:
                if not (train := matching(names, TRAINING[:1])):
                    return None
                state.put(train_table=train[0][0])
            raise InputError(_missing_table(state))
        state, problem = _try_tables(state, tables)
    except InputError as error:
        problem = str(error)
    notes = () if problem else (f"{folder}: {describe(state.settings)}", *_unused_tables(state, names))
    competition = configure(state.settings, (*notes, *state.doubts), problem)
    # Where the tables cannot be used, and nobody says that they should be, there may be folders of classes.
    return replace(competition, generality=3) if problem and not has_settings else competition


def _try_tables(state: Search, tables: Sequence[Sequence[str]]) -> tuple[Search, str]:
    """The search with the first training table that can be used; if none can, with the first, and what is wrong.

    Args:
        tables: names that are equally likely, the likely ones first.
    """
    tried = []
    for names in tables:
        for number, name in enumerate(names):
            own = replace(state, doubts=[*state.doubts])
            own.put(train_table=name)
            try:
                _find_columns(own)
            except InputError as error:
                tried.append((own, str(error)))
                continue
            if others := names[number + 1 :]:
                own.doubt("the training table", name, others, "train_table")
            return own, ""
    return tried[0]


def read_settings(path: Path) -> dict[str, object]:
    """The keys and values of a competition.toml.

    Raises:
        InputError: it is not TOML, has an unknown key, or a value of another type.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as TOML ({shorten(error)}): correct it") from error
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise InputError(f"{path} has the unknown key {unknown[0]!r}: expected {', '.join(KEYS)}")
    try:
        settings = from_json(TableSettings, given, "")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if settings.metric and settings.metric not in METRICS:
        raise InputError(f"{path}: expected one of {', '.join(METRICS)} for metric, got {settings.metric!r}")
    if settings.guesses < 1 or not 0 < settings.time_limit < float("inf"):
        raise InputError(f"{path}: expected a positive number for guesses and for time_limit")
    for key in ("sample", "train_table", "test_table", "train_folder"):  # the test photos may be on Kaggle alone
        name = getattr(settings, key)
        there = find_path(path.parent, name) if key == "train_folder" else name
        if name and not (path.parent / there).exists():
            raise InputError(f"{path}: {key} names {name!r}, which {path.parent} does not have")
    return given


def _missing_table(state: Search) -> str:
    """That the sample submission or the training table is missing, and what to do, by what else is there."""
    folder, sample = state.folder, state.settings.sample
    what, key, patterns = "sample submission", "sample", SAMPLES
    if sample:
        what, key, patterns = "training table", "train_table", TRAINING
    entries = [path.name for path in visible(folder.iterdir())]
    archives = [name for name in entries if ARCHIVE.search(name)]
    below = matching([path.relative_to(folder).as_posix() for path in visible(folder.glob("*/*.csv"))], patterns)
    if archives:
        advice = f"unpack {archives[0]} there"
    elif below:
        advice = f"write its path, such as {key} = {below[0][0]!r}, into {SETTINGS_FILE}"
    elif not sample:
        advice = f"name it in {SETTINGS_FILE} as {key}, or write one with an id and an answer in each row"
    else:
        advice = (
            f"name it in {SETTINGS_FILE} as {key}, write a train.csv of the photos and their classes, or arrange the "
            "photos as train/CLASS/photo"
        )
        if listings := [name for name in entries if name.lower().endswith(".json")]:
            advice += f" ({listings[0]} is not read)"
    return f"{folder} has no {what}: {advice}"


def _unused_tables(state: Search, names: Sequence[str]) -> list[str]:
    """Lines for the tables that list labelled photos too, but are not read."""
    settings = state.settings
    columns = {settings.image_column, *filter(None, (settings.label_column or settings.classes[0],))}
    used = (settings.sample, settings.train_table, settings.test_table)
    return [
        f"{state.folder / name} has {' and '.join(map(repr, sorted(columns)))} too, but is not read: to train on its "
        f"rows, append them to {settings.train_table}"
        for name in names
        if name not in used and columns <= set(read_header(state.path(name)))
    ]


def describe(settings: TableSettings) -> str:
    """One line: the tables, their columns, and the folders."""
    label = f"classes in {settings.label_column!r}" if settings.label_column else "a column for each class"
    train = f"{settings.train_table} has photos of {settings.train_folder}/ in {settings.image_column!r} and {label}"
    group = f", observations in {settings.observation_column!r}" if settings.observation_column else ""
    answer = "one class" if settings.guesses == 1 else f"{settings.guesses} classes, separated by spaces"
    if settings.classes:
        answer = f"the probabilities of {len(settings.classes)} classes"
    test = f"{settings.test_table or settings.sample} has the test photos of {settings.test_folder}/"
    said = f"table competition: {train}{group}; {test}; a row of {settings.sample} has {answer}"
    if suffixes := list(filter(None, settings.suffixes)):
        said += f"; added to names: {' or '.join(suffixes)}"
    if "" in settings.suffixes:
        said += "; a name may be that of a folder, which has the photos of one observation"
    if settings.metadata_columns:
        said += f"; metadata: {', '.join(settings.metadata_columns)}"
    return said


# Files


def _find_files(state: Search, names: Sequence[str]) -> list[list[str]]:
    """Find the sample submission and the test table; returns the names that the training table may have.

    None are returned without a sample submission.
    """
    left = list(names)

    def pick(key: str, what: str, tiers: Sequence[str], without: str = "^$") -> str:
        """The file whose name matches the first of some patterns that any matches."""
        if key in state.given:
            return str(state.given[key])
        found = matching(left, tiers, without)
        if found and len(found[0]) > 1:
            state.doubt(what, found[0][0], found[0], key)
        return found[0][0] if found else ""

    sample = pick("sample", "the sample submission", SAMPLES)
    state.put(sample=sample)
    left = [name for name in left if name != sample]
    if not sample:
        return []
    test = pick("test_table", "the test table", (r"^test\.csv$", r"test"), without=r"solution|label|submission|train")
    state.put(test_table=test)
    left = [name for name in left if name != test]
    if "train_table" in state.given:
        return [[str(state.given["train_table"])]]
    return matching(left, (*TRAINING, ""), NOT_TRAINING)  # at last, any other


# Photos


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
    return [suffix for suffix, _ in Counter(one[0] for one in found if one).most_common(3)]


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
            others = tuple(one.folder for one in equal if one.folder != best.folder)
            return replace(best, others=others, is_of_other=best.folder not in own)
    return best


def _try_folder(state: Search, name: str, tried: Sequence[str], way: str) -> PhotoFolder:
    folder, is_nested = state.folder / find_path(state.folder, name), way == WAYS[2]
    if way == WAYS[1]:
        exact = sum(bool(list_photos_of(folder / find_path(folder, one))) for one in tried)
        return PhotoFolder(name, ("",), exact / max(1, len(tried)), exact)
    if is_nested and name not in state.indices:
        state.indices[name] = index_photos(folder)

    def exists(photo: str) -> bool:
        if is_nested:
            return not state.indices[name].keys().isdisjoint(photo_keys(photo))
        return _is_of_photo(photo) and os.path.isfile(folder / find_path(folder, photo))

    exact = sum(map(exists, tried))
    there: list[str] = []
    if exact < len(tried):
        names = list(state.indices[name].values() if is_nested else _first_files(folder))
        there = _commonest_suffixes(names)
        if is_nested:  # where nothing was found by plain suffixes
            there += _commonest_suffixes(names, WORD_SUFFIX)
    suffixes = state.given.get("suffixes", there)
    used: Counter = Counter()
    for one in tried:
        has_suffix = PHOTO_SUFFIX.search(one)
        suffix = next((suffix for suffix in suffixes if not has_suffix and exists(one + suffix)), None)
        if suffix is not None:
            used[suffix] += 1
    hits = min(exact + used.total(), len(tried))
    return PhotoFolder(
        name, tuple(suffix for suffix, _ in used.most_common()), hits / max(1, len(tried)), exact, is_nested
    )


def _find_image_column(
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
    stems = {one[5]: {photo_keys(photo_name(cell))[1] for cell in table.values(one[5])} for one in found}
    equal = [
        one[5]
        for one in found
        if one[:4] == best[:4]
        and ((one[4] == best[4] and one[6].folder != best[6].folder) or stems[one[5]].isdisjoint(stems[best[5]]))
    ]
    if equal:
        state.doubt(f"the column of photos in {table.path.name}", best[5], equal, key)
    return best[5], best[6]


# Columns


def _find_columns(state: Search) -> None:
    """Find all that the tables hold.

    Raises:
        InputError: it cannot be trained on; what was found before stays.
    """
    sample = read_columns(state.path(state.settings.sample))
    header = tuple(sample.columns)
    state.put(header=header)
    if len(header) < 2:
        raise InputError(f"{sample.path} has one column: expected an id and an answer")
    ids = sample.columns[header[0]]
    problem = ""
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        problem = f"{sample.path} lists {twice!r} more than once: only one answer for each observation is supported"
    table = state.path(state.settings.train_table)
    refuse_boxes(state, sample)
    _guess_form(state, sample)
    has_photos = _find_test_columns(state, sample)
    train = read_columns(table)
    if not has_photos and "test_table" not in state.given and _lists_test_photos(state, train, sample):
        state.put(test_table=state.settings.train_table)
        has_photos = _find_test_columns(state, sample)
    refuse_boxes(state, train)
    preferred = (state.settings.test_image_column, header[0])
    image, photo_folder = _find_image_column(state, train, "train", "image_column", preferred)
    state.put(image_column=image or next((name for name in preferred if name in train.columns), ""))
    if photo_folder.hits:
        state.put(train_folder=photo_folder.folder, suffixes=_merged(state.settings.suffixes, photo_folder.suffixes))
        state.put(is_nested=state.settings.is_nested or photo_folder.is_nested)
        if photo_folder.others:
            state.doubt("the folder of the training photos", photo_folder.folder, photo_folder.others, "train_folder")
    if not has_photos:
        _expect_test_photos(state, sample)
    if not state.settings.test_image_column and state.settings.test_table:
        name = image if image in read_header(state.path(state.settings.test_table)) else state.settings.id_column
        state.put(test_image_column=name)
    _find_observations(state, train)
    label_problem = _find_labels(state, train, sample)
    if not label_problem and state.settings.metric == "log_loss" and not state.settings.classes:
        label_problem = (
            f"{state.folder / SETTINGS_FILE} has the metric log_loss, but {sample.path.name} has no probabilities: "
            "give another metric"
        )
    photo_problem = "" if photo_folder.hits else _describe_missing_photos(state, train)
    if problem := problem or photo_problem or label_problem:
        raise InputError(problem)


def _describe_missing_photos(state: Search, train: Table) -> str:
    names = ", ".join(map(repr, list(train.columns)[:8]))
    files = (name for folder in state.folders for name in _first_files(state.path(folder)))
    others = sorted({os.path.splitext(name)[1].lower() for name in files}.intersection(OTHER_FORMATS))
    return (
        f"no column of {train.path} names photos in {state.folder} (it has {names}): unpack the photos there, or write "
        f"image_column, train_folder and suffixes into {SETTINGS_FILE}"
        + (f"; {', '.join(others)} files cannot be read: convert them to .png" if others else "")
    )


def _merged(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))


def refuse_boxes(state: Search, table: Table) -> None:
    """Refuse a table of boxes or masks, unless competition.toml names the column of classes.

    Raises:
        InputError: there are such columns.
    """
    names = {re.sub(r"[\s_]", "", name.casefold()): name for name in table.columns}
    boxes = next((own for own in BOXES if own <= names.keys()), None)
    if boxes and "label_column" not in state.given:
        found = ", ".join(sorted(names[name] for name in boxes))
        raise InputError(
            f"{table.path} has boxes or masks ({found}): localisation is not supported; to classify whole photos, "
            f"write label_column into {SETTINGS_FILE}"
        )


def _find_test_columns(state: Search, sample: Table) -> bool:
    """Find the columns of the test table, and the folder of the test photos; whether any photo is there."""
    ids = list(sample.values(next(iter(sample.columns))))
    if state.settings.test_table:
        test = read_columns(state.path(state.settings.test_table))
        column = _find_id_column(state, test, sample.path, ids)
        if not column:
            state.doubts.append(
                f"{test.path} is not used, as no column has the ids of {sample.path.name}: to use it, write "
                f"id_column into {SETTINGS_FILE}"
            )
            state.put(test_table="")
        else:
            image, photo_folder = _find_image_column(state, test, "test", "test_image_column", (column,))
            state.put(id_column=column, test_image_column=image)
            state.put(is_complete=set(test.values(column)) == set(ids))
    if not state.settings.test_table:
        photo_folder = PhotoFolder()
        for way in WAYS:
            if not photo_folder.is_complete:
                more = find_photos_of(state, ids, "test", way)
                photo_folder = max(photo_folder, more, key=lambda one: (round(one.hits, 1), not one.is_of_other))
    if photo_folder.hits:
        state.put(test_folder=photo_folder.folder, suffixes=_merged(state.settings.suffixes, photo_folder.suffixes))
        state.put(is_nested=state.settings.is_nested or photo_folder.is_nested)
        if photo_folder.others:
            state.doubt("the folder of the test photos", photo_folder.folder, photo_folder.others, "test_folder")
    return bool(photo_folder.hits)


def _lists_test_photos(state: Search, train: Table, sample: Table) -> bool:
    """Whether the training table has the ids of the sample submission too, in rows without a class."""
    ids = list(sample.values(next(iter(sample.columns))))
    spelling, column = Spelling(ids), _find_id_column(replace(state, doubts=[]), train, sample.path, ids)
    if not column:
        return False
    is_test = [spelling.find(cell) is not None for cell in train.columns[column]]
    return any(
        all(map(is_blank, compress(cells, is_test))) and not all(map(is_blank, cells))
        for cells in train.columns.values()
    )


def _expect_test_photos(state: Search, sample: Table) -> None:
    """Guess where photos will be on Kaggle of which none is here: in a folder named test, or one like that of train.

    Raises:
        InputError: such a folder has photos, of other names than the ids.
    """
    named = [name for name in state.folders if "test" in name.lower()]
    others = [f"{name}/{photo}" for name in named for photo in list_photos_of(state.path(name))]
    if others and "test_folder" not in state.given:
        column = next(iter(sample.columns))
        raise InputError(
            f"{sample.path} has ids such as {next(iter(sample.values(column)))!r} in {column!r}, but {state.folder} "
            f"photos such as {others[0]!r}, and no table says which is which: write a test.csv with both"
        )
    folder = state.settings.train_folder
    state.put(test_folder=named[0] if named else re.sub("(?i)train(ing)?", "test", folder))
    state.doubts.append(
        f"{state.folder}: none of the test photos is there, so they are expected in {state.settings.test_folder}/; if "
        f"they are elsewhere on Kaggle, write test_folder into {SETTINGS_FILE}"
    )


def _find_id_column(state: Search, table: Table, sample: Path, ids: Sequence[str]) -> str:
    """The column of the test table with the most ids of the sample submission; "" if none has half of them."""
    if given := state.given_column("id_column", table):
        return given
    spelling = Spelling(ids)
    known = {
        column: len({name for cell in table.values(column) if (name := spelling.find(cell)) is not None})
        for column in table.columns
    }
    most = max(known.values(), default=0)
    best = [column for column, count in known.items() if count == most]
    if 2 * most < len(ids) or not best:
        return ""
    header = read_header(sample)
    exact = [column for column in best if set(table.values(column)) >= set(ids)]
    best = [column for column in best if column == header[0]] or exact or best
    if len(best) > 1:
        state.doubt(f"the column of {table.path.name} with the ids of {sample.name}", best[0], best, "id_column")
    return best[0]


def _find_observations(state: Search, train: Table) -> None:
    """Find which column of the training table has the observations, and what describes them."""
    state.given_column("observation_column", train)
    settings = state.settings
    group = settings.id_column if settings.test_table else settings.header[0]
    if group in train.columns and group not in (settings.image_column, settings.test_image_column):
        state.put(observation_column=group)
    if settings.test_table:
        test = read_header(state.path(settings.test_table))
        used = {settings.id_column, settings.test_image_column, settings.image_column, settings.observation_column}
        shared = [column for column in test if column and column not in used and column in train.columns]
        state.put(metadata_columns=tuple(column for column in shared if _is_metadata(list(train.values(column)))))


def _is_metadata(values: Sequence[str]) -> bool:
    """Whether these values may describe an observation: few, or numbers; not names, nor one that all rows share."""
    return len(values) > 1 and (len(values) <= CATEGORIES or all(map(_is_number, values)))


# Classes and the form of the submission


def _guess_form(state: Search, sample: Table) -> None:
    """What the sample submission alone says of its form."""
    _, *answers = sample.columns
    if len(answers) > 1 and not state.settings.classes:
        first, last = min(answers), max(answers)  # of all, these two have the shortest prefix in common
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        prefix = re.match(r"(.*[_\- ])?", first[:same]).group()  # whole words
        state.put(classes=tuple(compose(clean_id(name.removeprefix(prefix))) for name in answers))
    counts = {len(cell.split()) for cell in sample.columns[answers[0]]}
    state.put(guesses=max(counts, default=1) or 1)


def _find_labels(state: Search, train: Table, sample: Table) -> str:
    """Find the classes and the form of the submission; returns why they cannot be used, or an empty string."""
    _, *answers = sample.columns
    if len(answers) > 1:
        words = [cell for name in answers for cell in sample.values(name) if not _is_number(cell)]
        if words:
            return (
                f"{sample.path} has the columns {', '.join(map(repr, answers[:6]))} with cells such as {words[0]!r}: "
                "expected one column of classes, or a column of probabilities for each class"
            )
        in_train = [name for name in answers if name in train.columns]
        if len(in_train) == len(answers) and not state.given.get("label_column"):
            return _check_one_hot(state, train, answers)
    given = state.given.get("classes", ())
    if given and (len(given) < 2 or len(given) - len(answers) not in (0, 1)):
        return (
            f"{SETTINGS_FILE} has {len(given)} classes for {len(answers)} columns of {sample.path}: write one for each "
            "column, and the class that has the rest of the probability, if there is one"
        )
    said = (
        {token for cell in sample.values(answers[0]) for token in (cell, *cell.split())} if len(answers) == 1 else set()
    )
    label, candidates = _find_label_column(state, train, answers, {clean_id(one) for one in said})
    if not label:
        if not candidates:
            return f"{train.path} has no column of classes: write label_column into {SETTINGS_FILE}"
        return (
            f"{train.path}: the classes may be in {' or '.join(map(repr, candidates))}: write label_column into "
            f"{state.folder / SETTINGS_FILE}"
        )
    state.put(label_column=label)
    labels = {clean_id(cell) for cell in train.values(label)}
    if problem := _find_several_labels(state, train, label, labels):
        return problem
    state.put(metadata_columns=tuple(name for name in state.settings.metadata_columns if name != label))
    if len(answers) > 1:
        return _match_classes(state, sample.path, train.path, labels)
    cells = [clean_id(cell) for cell in sample.values(answers[0])]
    if not given and len(labels) > 1 and len(labels) == sum(not is_blank(cell) for cell in train.columns[label]):
        return (
            f"{train.path} has another {label!r} in each row, so these are no classes: write label_column into "
            f"{SETTINGS_FILE}"
        )
    if len(labels) == 2 and all(map(_is_number, cells)) and any(map(_is_fraction, cells)):
        positive = next((name for name in labels if name == compose(answers[0])), max(labels))
        state.put(classes=(positive, min(labels - {positive})))
    elif labels == {"0", "1"} and not given:
        state.doubts.append(
            f"{sample.path} is taken to have one class in a row: if it has the probability of '1', write "
            f'classes = ["1", "0"] into {SETTINGS_FILE}'
        )
    return "" if state.settings.classes else _count_guesses(state, sample, cells, labels)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_fraction(cell: str) -> bool:
    return _is_number(cell) and not float(cell).is_integer()


def _find_label_column(
    state: Search, train: Table, answers: Sequence[str], said: Collection[str]
) -> tuple[str, list[str]]:
    """The column of classes; or "" and the columns among which nothing decides.

    Args:
        said: what the sample submission answers, whole and in words.
    """
    settings = state.settings
    if given := state.given_column("label_column", train):
        return given, []
    used = {settings.image_column, settings.observation_column, ""}
    values = {name: {clean_id(cell) for cell in train.values(name)} for name in train.columns if name not in used}
    left = [name for name, own in values.items() if len(own) > 1]
    plain = {name: re.sub(r"[\s_]", "", name.casefold()) for name in left}
    test = read_header(state.path(settings.test_table)) if settings.test_table else []
    classes = set(settings.classes)
    matched = {name: len(values[name] & classes) for name in left}
    # A single number is what a sample submission answers everywhere without meaning it.
    is_placeholder = len(said) == 1 and all(map(_is_number, said))
    filters = (
        lambda name: len(answers) == 1 and name == answers[0],
        lambda name: matched[name] == max(matched.values()) and 2 * matched[name] >= len(values[name]),
        lambda name: bool(said & values[name]) and not is_placeholder,
        lambda name: plain[name] in LABELS[0] + LABELS[1],
        lambda name: bool(said & values[name]) and plain[name] in LABELS[0] + LABELS[1],
        lambda name: plain[name] in LABELS[0],
        lambda name: plain[name] in LABELS[1],
        lambda name: name not in test,
        lambda name: 2 * len(values[name]) <= train.rows and not all(map(_is_fraction, values[name])),
    )
    for is_likely in filters:
        if kept := [name for name in left if is_likely(name)]:
            left = kept
        if len(left) == 1:
            break
    return (left[0], []) if len(left) == 1 else ("", left)


def _check_one_hot(state: Search, train: Table, answers: Sequence[str]) -> str:
    """The training table has a column of 0 and 1 for each class: each photo must be of one class."""
    state.put(classes=tuple(answers), label_column="")
    for row in range(train.rows):
        ones = [name for name in answers if is_one(train.columns[name][row])]
        if len(ones) != 1:
            image = train.columns[state.settings.image_column][row] if state.settings.image_column else row
            return (
                f"{train.path}: photo {image} has {len(ones)} classes ({', '.join(ones[:3]) or 'none'}): multi-label "
                "competitions are not supported"
            )
    return ""


def _find_several_labels(state: Search, train: Table, label: str, labels: Collection[str]) -> str:
    """Why a table has several classes for a photo, in one line; empty if it does not."""
    if state.settings.image_column in train.columns:
        first: dict[str, str] = {}
        for image, cell in zip(train.columns[state.settings.image_column], train.columns[label], strict=True):
            if not is_blank(image) and not is_blank(cell) and clean_id(first.setdefault(image, cell)) != clean_id(cell):
                return (
                    f"{train.path} has several rows of photo {image!r} with different classes, such as "
                    f"{first[image]!r} and {cell!r}: localisation and multi-label competitions are not supported"
                )
    for separator in () if "label_column" in state.given else "|;, ":
        cells = [[token.strip() for token in one.split(separator)] for one in sorted(labels)]
        counts = Counter(token for tokens in cells for token in set(tokens))
        compound = [tokens for tokens in cells if len(tokens) > 1]
        several = [
            tokens
            for tokens in compound
            if (
                any(counts[token] > 1 for token in tokens)
                and (separator in "|;" or all(token in labels or token.isdecimal() for token in tokens))
            )
            or (separator == "," and all(counts[token] > 1 for token in tokens))
        ]
        if several and 2 * len(several) >= len(compound):
            return (
                f"{train.path}: {label!r} has several classes in a cell, such as {separator.join(several[0])!r}: "
                "multi-label competitions are not supported; if that is one class, write label_column into "
                f"{SETTINGS_FILE}"
            )
    return ""


def _match_classes(state: Search, sample: Path, train: Path, labels: Collection[str]) -> str:
    """Compare the columns of probabilities with the classes of training."""
    _, *answers = state.settings.header
    whole, classes = tuple(compose(clean_id(name)) for name in answers), state.settings.classes
    classes = max((whole, classes), key=lambda own: len(labels & set(own)))
    state.put(classes=classes)
    classes = tuple(map(compose, state.settings.classes))
    both = labels & set(classes)
    if not both:
        return (
            f"{sample} has columns such as {answers[0]!r}, and {train} classes such as {min(labels)!r}: none is both; "
            f"write label_column, or classes, into {SETTINGS_FILE}"
        )
    if lacking := sorted(labels - both):
        state.doubts.append(
            f"{sample} lacks {len(lacking)} of the {len(labels)} classes of {train.name}, such as {lacking[0]!r}: "
            "their probability is left out"
        )
    if untrained := [name for name in classes if name not in both]:
        state.doubts.append(
            f"{train} lacks {len(untrained)} of the {len(classes)} classes of {sample.name}, such as {untrained[0]!r}: "
            "their probability is 0"
        )
    return ""


def _count_guesses(state: Search, sample: Table, cells: Sequence[str], labels: Set[str]) -> str:
    """How many classes a row of the submission has; returns why its answers are no classes, or an empty string."""
    guesses, has_spaces = state.settings.guesses, any(" " in label for label in labels)
    for separator in "|;,":
        split = [token.strip() for cell in cells if separator in cell for token in cell.split(separator)]
        if split and labels.issuperset(split) and not labels.intersection(cells):
            return (
                f"{sample.path} has classes separated by {separator!r}: only one class, or several by spaces, are "
                "supported"
            )
    others = {cell: list(map(clean_id, cell.split())) for cell in cells if cell not in labels}
    said = {token for tokens in others.values() for token in tokens}
    if "guesses" not in state.given:
        if wrong := _find_other_answers(sample, others, labels):
            return f"{sample.path} {wrong}; if a row has classes, write guesses into {SETTINGS_FILE}"
        counts = {len(tokens) for tokens in others.values()}
        if has_spaces and not labels.issuperset(said):
            guesses = 1
        guesses = guesses if others else 1
        if guesses > 1 and len(counts) > 1:
            state.doubts.append(
                f"{sample.path} has {min(counts)} to {guesses} classes in a row: each row gets {guesses}, unless "
                f"{SETTINGS_FILE} has another number of guesses"
            )
    if said and "label_column" not in state.given and all(map(_is_number, labels)) and not any(map(_is_number, said)):
        return (
            f"{sample.path} answers with words such as {cells[0]!r}, but {state.settings.label_column!r} of "
            f"{state.settings.train_table} has numbers: write label_column into {SETTINGS_FILE}, or add a column of "
            "the words"
        )
    state.put(guesses=guesses)
    if guesses > 1 and has_spaces:
        spaced = min(label for label in labels if " " in label)
        return (
            f"{sample.path} has {guesses} classes in a row, separated by spaces, which the class {spaced!r} has in its "
            "name"
        )
    return ""


def _find_other_answers(sample: Table, cells: Mapping[str, Sequence[str]], labels: Set[str]) -> str:
    """What a sample submission answers with, if these are no classes; empty if they may be.

    Args:
        cells: its answers that are no class, each with its words.
    """
    ids = set(sample.columns[next(iter(sample.columns))])
    words = {word for label in labels for word in label.split()}
    for cell, tokens in cells.items():
        example = f"such as {cell!r}"
        if ids.issuperset(cell.split()):
            return f"answers with its own ids, {example}: to find photos of the same class is not supported"
        if _is_fraction(cell):
            return f"answers with numbers, {example}, that are no classes: to predict a number is not supported"
        if len(tokens) > 1 and _is_fraction(tokens[-1]) and tokens[-1] not in labels:
            return f"answers with a class and a number, {example}: confidences are not supported"
        if len(tokens) > 1 and not labels.issuperset(tokens) and 2 * len(words.intersection(tokens)) > len(tokens):
            return f"answers with words of several classes, {example}: multi-label competitions are not supported"
    return ""

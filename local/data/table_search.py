"""Find what the tables of a competition hold: its files, columns, folders and the form of its submission.

Each is guessed by what the tables and folders hold, unless competition.toml gives it.
"""

import filecmp
import os
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import compress, permutations
from pathlib import Path

from kernel.competitions.competition import SAMPLES, Competition, matching
from kernel.competitions.table import (
    NOT_TRAINING,
    SETTINGS_FILE,
    TRAINING,
    PhotoPaths,
    Spelling,
    TableSettings,
    configure,
    has_no_class,
    list_photos_of,
    photo_keys,
)
from kernel.inputs import InputError, shorten
from kernel.manifest import from_json
from kernel.tables import compose, find_path, is_blank, is_hidden, iterate_table, photo_name, read_header, visible
from local.data.class_columns import find_labels, find_null_classes, guess_form, refuse_boxes
from local.data.photo_columns import (
    TRIED,
    WAYS,
    PhotoFolder,
    Search,
    Table,
    describe_missing_photos,
    find_image_column,
    find_photos_of,
    is_number,
    read_columns,
)

METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1", "log_loss")
FOUND_ONLY = ("header", "null_classes", "is_nested", "is_complete")
KEYS = tuple(one.name for one in fields(TableSettings) if one.name not in FOUND_ONLY)
CATEGORIES = 200  # most values of a column of metadata, unless they are numbers
ARCHIVE = re.compile(r"\.(zip|7z|rar|gz|tgz|tar|bz2|xz)$", re.IGNORECASE)


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
            if "classes" in state.given:  # in Unicode's form of the labels, which the tables are read in
                state.given = {**state.given, "classes": list(map(compose, state.given["classes"]))}
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
    if problem and not has_settings:
        # Nobody says that the tables should be used: there may be folders of classes, and if no photo of the tables is
        # there, the folders are meant even if they cannot be used either.
        return replace(competition, generality=2 if state.has_some_photos else 3)
    return competition


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
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        advice = f"name it in {SETTINGS_FILE} as {key}, write a train.csv of the photos and their classes, or " + (
            f"remove {SETTINGS_FILE} if each class has a folder"  # it is for tables alone
            if (folder / SETTINGS_FILE).exists()
            else "arrange the photos as train/CLASS/photo"
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
        if name not in used
        and columns <= set(read_header(state.path(name)))
        and not matching([name], SAMPLES)  # its classes are answers
        and not filecmp.cmp(state.path(name), state.path(settings.train_table), shallow=False)
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
    own = "of" if settings.metric else "unless another metric is in"
    said += f"; scored by {configure(settings).metric}, {own} {SETTINGS_FILE}"
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
        others = [name for name in found[0][1:] if not _has_ids_of(state, name, found[0][0])] if found else []
        if others:
            state.doubt(what, found[0][0], others, key)
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


def _has_ids_of(state: Search, name: str, other: str) -> bool:
    """Whether two tables have the same columns, and the same ids in the first of them, as copies do."""
    one, two = state.path(name), state.path(other)
    header = read_header(one)
    if not header or header != read_header(two):
        return False
    return [row[header[0]] for row in iterate_table(one, ())] == [row[header[0]] for row in iterate_table(two, ())]


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
    guess_form(state, sample)
    test_photos = _find_test_columns(state, sample)
    train = read_columns(table)
    if not test_photos.hits and "test_table" not in state.given and _lists_test_photos(state, train, sample):
        state.put(test_table=state.settings.train_table)
        test_photos = _find_test_columns(state, sample)
    refuse_boxes(state, train)
    preferred = (state.settings.test_image_column, header[0])
    image, photo_folder = find_image_column(state, train, "train", "image_column", preferred)
    state.put(image_column=image or next((name for name in preferred if name in train.columns), ""))
    if photo_folder.hits:
        state.put_photos("train", photo_folder)
    if photo_folder.folder == test_photos.folder and test_photos.others:  # of equals, not that of the training photos
        test_photos = replace(test_photos, folder=test_photos.others[0], others=test_photos.others[1:])
    if test_photos.hits:
        state.put_photos("test", test_photos)
    else:
        _expect_test_photos(state, sample)
    if not state.settings.test_image_column and state.settings.test_table:
        name = image if image in read_header(state.path(state.settings.test_table)) else state.settings.id_column
        state.put(test_image_column=name)
    _find_observations(state, train)
    nulls = find_null_classes(state, sample)
    if nulls and not _lists_test_photos(state, train, sample):  # of which they may say that the class is missing
        state.put(null_classes=nulls)
    label_problem = find_labels(state, train, sample)
    if not label_problem and state.settings.metric == "log_loss" and not state.settings.classes:
        label_problem = (
            f"{state.folder / SETTINGS_FILE} has the metric log_loss, but {sample.path.name} has no probabilities: "
            "give another metric"
        )
    photo_problem = "" if photo_folder.hits else describe_missing_photos(state, train)
    if problem := problem or photo_problem or label_problem or _find_shared_photo(state, train, sample):
        raise InputError(problem)


def _find_shared_photo(state: Search, train: Table, sample: Table) -> str:
    """Why a photo is both of train and of test, in one line: one of the two folders is missing; empty if none is."""
    settings = state.settings
    names = ("train_folder", "test_folder")
    roots = {name: Path(find_path(state.folder, getattr(settings, name))) for name in names}
    is_apart = not any(one in (other, *other.parents) for one, other in permutations(roots.values()))
    if is_apart or settings.test_table == settings.train_table or state.given.keys() >= set(names):
        return ""
    paths = {name: PhotoPaths(settings, state.path(root)) for name, root in roots.items()}

    def photos_of(name: str, cell: str) -> set[Path]:
        return {roots[name] / photo for photo in paths[name].find(cell)}

    test = read_columns(state.path(settings.test_table)) if settings.test_table else sample
    cells = test.values(settings.test_image_column if settings.test_table else settings.header[0])
    tried = {path for cell in list(cells)[:: max(1, len(cells) // TRIED)] for path in photos_of("test_folder", cell)}
    stems = {photo_keys(path.name)[1] for path in tried}
    labels = train.columns[settings.label_column or settings.image_column]
    for cell, label in zip(train.columns[settings.image_column], labels, strict=True):
        if not has_no_class(label, settings) and photo_keys(photo_name(cell))[1] in stems:
            shared = [path.as_posix() for path in photos_of("train_folder", cell) & tried if state.path(path).exists()]
            if shared:
                return (
                    f"{shared[0]!r} in {state.folder} would be both a training and a test photo: unpack the photos of "
                    f"both, or write {' and '.join(names)} into {SETTINGS_FILE}"
                )
    return ""


def _find_test_columns(state: Search, sample: Table) -> PhotoFolder:
    """Find the columns of the test table, and the folder of the test photos."""
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
            image, photo_folder = find_image_column(state, test, "test", "test_image_column", (column,))
            state.put(id_column=column, test_image_column=image)
            state.put(is_complete=set(test.values(column)) == set(ids))
    if not state.settings.test_table:
        photo_folder = PhotoFolder()
        for way in WAYS:
            if not photo_folder.is_complete:
                more = find_photos_of(state, ids, "test", way)
                if way == WAYS[2] and more.hits < 0.5:  # a few may have the number of another photo
                    continue
                photo_folder = max(photo_folder, more, key=lambda one: (round(one.hits, 1), not one.is_of_other))
    return photo_folder


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
            f"photos such as {others[0]!r}, and no table that is read says which is which: write test_table, with its "
            f"id_column, or test_folder into {SETTINGS_FILE}"
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
        for column in filter(None, table.columns)  # the one without a name has the numbers of rows
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
    for name in filter(None, (settings.train_table, settings.test_table)):
        header = read_header(state.path(name))
        for column in state.given.get("metadata_columns", ()):
            if column not in header:
                raise InputError(
                    f"{state.path(name)} lacks the column {column!r}, which {SETTINGS_FILE} gives in "
                    f"metadata_columns: it has {', '.join(header)}"
                )
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
    return len(values) > 1 and (len(values) <= CATEGORIES or all(map(is_number, values)))

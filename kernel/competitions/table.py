"""Competitions whose photos are listed in tables, as most of Kaggle's are.

sample_submission.csv   an id, and one class, several classes separated by spaces, or a column of probability per class
train.csv               a row per photo: its name, with or without suffix, and its class, or a 0 or 1 for each class
test.csv                may be missing; it may list several photos of one observation, and metadata; it may be the
                        training table, with rows that have no class
train/..., test/...     the photos, in folders of any name; see `photo_keys` for how tables may spell theirs

The tables may have other names. Columns and folders are found by what they hold: names of photos that exist, ids of
the sample submission, classes that it names, few distinct values. What was found is printed. Where a guess is wrong, a
file competition.toml beside the tables decides: its keys are the fields of `TableSettings`. Several classes of one
photo, and boxes, are refused.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import filterfalse
from pathlib import Path

from kernel.competitions.competition import (
    SAMPLES,
    AnswerForm,
    Competition,
    CompetitionFolder,
    LabelledPhoto,
    PhotoRow,
    default_metric,
    find_tables_of,
    matching,
)
from kernel.inputs import InputError
from kernel.tables import (
    TAXONOMY,
    clean_id,
    describe_left_out,
    find_path,
    format_table,
    is_blank,
    is_hidden,
    iterate_table,
    photo_name,
    plain_number,
    read_header,
    read_table,
    visible,
)

SETTINGS_FILE = "competition.toml"
DEPTH = 4  # levels of folders below that of the photos
DICOM_SUFFIX = re.compile(r"\.(dcm|dicom)$", re.IGNORECASE)  # of what must be converted, and the tables then still name
PHOTO_SUFFIX = re.compile(r"\.(jpe?g|png|webp|tiff?|bmp|gif)$", re.IGNORECASE)
# Patterns of usual names of the training table, in lower case, the likely ones first.
TRAINING = (r"^train\.csv$", r"^training\.csv$", r"^train.*label", r"train", r"^labels\.csv$", r"label|annotation")
NOT_TRAINING = r"test|solution|submission|val"


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What is found in the tables of a competition, or given by competition.toml. Paths are relative to its folder.

    Attributes:
        sample: the sample submission.
        train_table: the training table.
        test_table: the test table; empty without one.
        image_column: of the names of photos in the training table.
        label_column: of the classes in the training table; empty where it has a column of 0 and 1 for each class.
        observation_column: of the observations in the training table; empty if every photo is one.
        id_column: of the ids of the sample submission in the test table.
        test_image_column: of the names of photos in the test table.
        metadata_columns: that describe an observation, in both tables.
        train_folder, test_folder: of the photos that the tables name.
        suffixes: of photos, where the tables leave them out; "" where they name folders, each with the photos of one
            observation.
        guesses: class ids in a row of the submission, separated by spaces.
        classes: the class of each column of probabilities; empty if a row names classes. A last class without a column
            has the rest of the probability.
        metric: one of METRICS of local/data/table_search.py; empty for that of `default_metric`.
        time_limit: of a kernel with a GPU, seconds.
        header: of the sample submission; this and the following are always found.
        null_classes: classes named like a missing value, such as "None", which the sample submission has as classes.
        is_nested: whether the photos are in folders below these, of classes for example, which the tables leave out.
        is_complete: whether the test table has exactly the ids of the sample submission. Then it decides which rows
            there are; otherwise the sample submission does.
    """

    sample: str = ""
    train_table: str = ""
    test_table: str = ""
    image_column: str = ""
    label_column: str = ""
    observation_column: str = ""
    id_column: str = ""
    test_image_column: str = ""
    metadata_columns: tuple[str, ...] = ()
    train_folder: str = "."
    test_folder: str = "."
    suffixes: tuple[str, ...] = ()
    guesses: int = 1
    classes: tuple[str, ...] = ()
    metric: str = ""
    time_limit: float = 9 * 3600
    header: tuple[str, ...] = ()
    null_classes: tuple[str, ...] = ()
    is_nested: bool = False
    is_complete: bool = False


def photo_keys(name: str) -> tuple[str, str]:
    """What the name of a photo has in common with other spellings of it, with its suffix and, in case, without.

    These are no folder, Unicode's composed form, a suffix in lower case, and a number without leading zeros.
    """
    name = name.rpartition("/")[2]
    suffix = PHOTO_SUFFIX.search(name)
    stem = plain_number(DICOM_SUFFIX.sub("", PHOTO_SUFFIX.sub("", name)))
    return stem + (suffix[0].lower() if suffix else ""), stem


def index_photos(folder: Path) -> dict[str, str]:
    """The path of each file in a folder and below it, relative to the folder, by one of its `photo_keys`.

    That is the one without a suffix, or, of files that have it in common, the one with a suffix. Files that have both
    in common are left out.
    """
    paths: dict[str, str] = {}
    others: list[str] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        below = Path(os.path.relpath(root, folder)).as_posix()
        folders[:] = [name for name in folders if not is_hidden(name)] if below.count("/") < DEPTH else []
        for name in filterfalse(DICOM_SUFFIX.search, names):
            path = name if below == "." else f"{below}/{name}"
            if paths.setdefault(photo_keys(name)[1], path) is not path:
                others.append(path)
    others += [paths.pop(stem) for stem in {photo_keys(path)[1] for path in others}]
    counts = Counter(photo_keys(path)[0] for path in others)
    return paths | {key: path for path in others if counts[key := photo_keys(path)[0]] == 1}


class PhotoPaths:
    """Finds the paths of photos, relative to their folder, by their names in a table."""

    def __init__(self, settings: TableSettings, folder: Path):
        self.suffixes, self.folder = settings.suffixes, folder
        self.index = index_photos(folder) if settings.is_nested else {}

    def find(self, cell: str) -> list[str]:
        """The path of a photo, or of all photos in a folder; where there is none, the path that is expected."""
        name = photo_name(cell)
        has_suffix = name.endswith(tuple(filter(None, self.suffixes))) or PHOTO_SUFFIX.search(name)
        names = [name] if has_suffix else [name + suffix for suffix in self.suffixes] or [name]
        if self.index:
            keys = [key for one in names for key in photo_keys(one)]
            return [next((self.index[key] for key in keys if key in self.index), names[0])]
        names = [find_path(self.folder, one) for one in names]
        if len(names) > 1:
            names = [one for one in names if (self.folder / one).exists()] or names
        photos = []
        if not has_suffix and ("" in self.suffixes or not self.suffixes):
            photos = [f"{names[0]}/{photo}" for photo in list_photos_of(self.folder / names[0])]
        return photos or names[:1]


def list_photos_of(folder: Path) -> list[str]:
    """The names of the photos in a folder, sorted; none if there is no such folder."""
    try:
        return [path.name for path in visible(folder.iterdir()) if PHOTO_SUFFIX.search(path.name)]
    except OSError:
        return []


def _key(text: str) -> str:
    """What ids of one photo have in common, however a table spells them: no folder, suffix or leading zeros."""
    return plain_number(clean_id(PHOTO_SUFFIX.sub("", photo_name(text).rpartition("/")[2])))


class Spelling:
    """Finds ids of the sample submission, as it spells them, by those of other tables."""

    def __init__(self, ids: Sequence[str]):
        counts = Counter(map(_key, ids))
        self.ids, self.by_key = set(ids), {key: name for name in ids if counts[key := _key(name)] == 1}

    def find(self, cell: str) -> str | None:
        """The id that a cell means; None if the sample submission does not have it."""
        return cell if cell in self.ids else self.by_key.get(_key(cell))


def _read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    settings, header = found.competition.settings, found.competition.header
    paths = PhotoPaths(settings, found.split_folder("test"))
    sample = found.path / settings.sample
    rows = iterate_table(sample, header[:1], filled=header[:1], left_out=left_out)
    ids = dict.fromkeys(row[header[0]] for row in rows)  # not the rows, which may have a thousand probabilities each
    table = found.path / settings.test_table
    if not table.is_file():
        return [PhotoRow(name, photo) for name in ids for photo in paths.find(name)]
    spelling, photos = Spelling(list(ids)), dict.fromkeys(ids, ())
    needed = settings.id_column, settings.test_image_column
    for row in read_table(table, needed, filled=needed[:1], left_out=left_out):
        name = spelling.find(row[needed[0]])
        if name is None and not settings.is_complete:
            left_out[f"rows of {table.name} that {sample.name} lacks"] += 1
            continue
        image = row[needed[1]]
        name = row[needed[0]] if name is None else name
        own = [""] if is_blank(image) else paths.find(image)
        photos[name] = (*photos.get(name, ()), *(PhotoRow(name, photo, row) for photo in own))
    if settings.is_complete:  # a sample submission of other rows was not replaced together with the test table
        photos = {name: own for name, own in photos.items() if own}
        if not photos:
            raise InputError(f"{table} has no test observation{describe_left_out(left_out)}: download it again")
    return [row for name, own in photos.items() for row in own or [PhotoRow(name, "", {needed[0]: name})]]


def configure(settings: TableSettings, notes: Sequence[str] = (), problem: str = "") -> Competition:
    """The competition that some settings describe."""
    guesses = min(10, len(settings.classes)) if settings.classes else settings.guesses
    form = AnswerForm(settings.header, guesses, settings.classes)
    return replace(
        TABLE,
        settings=settings,
        notes=tuple(notes),
        problem=problem,
        # Without a sample submission there is a problem.
        table=escape(settings.sample or settings.train_table or SETTINGS_FILE),
        splits={"train": settings.train_folder, "test": settings.test_folder},
        sample=escape(settings.sample or SETTINGS_FILE),
        form=form,
        metric=settings.metric or default_metric(form),
        time_limit=settings.time_limit,
        metadata=settings.metadata_columns,
    )


def _find(folder: Path) -> Competition | None:
    """The competition by its sample submission alone, for a kernel that has no weights to tell the settings.

    local/data/table_search.py finds all settings. Any other competition that recognises the folder comes first.
    """
    names = find_tables_of(folder)
    samples = matching(names, SAMPLES)
    if not samples or not matching([name for name in names if name != samples[0][0]], TRAINING, NOT_TRAINING):
        return None
    header = read_header(folder / samples[0][0])
    classes = tuple(header[1:]) if len(header) > 2 else ()
    if len(header) < 2 or _has_lists(folder / samples[0][0]):
        return None
    settings = TableSettings(sample=samples[0][0], header=tuple(header), classes=classes)
    return replace(configure(settings), generality=3)


def _has_lists(sample: Path) -> bool:
    """Whether a sample submission answers with lists in brackets, as for photos that show several classes."""
    try:
        return any("[" in (cell or "") for cell in list(next(iterate_table(sample, ()), {}).values())[1:])
    except InputError:
        return False


# The kernel does not need the functions below, as it knows the settings. Training finds them and reads the labelled
# photos, and the rehearsal writes test sets.


def label_of(row: Mapping[str, str], settings: TableSettings) -> str:
    """The class in a row of the training table; empty if it has none."""
    if settings.label_column:
        cell = row[settings.label_column]
        return "" if has_no_class(cell, settings) else clean_id(cell)
    ones = [name for name, column in zip(settings.classes, settings.header[1:], strict=False) if is_one(row[column])]
    return ones[0] if len(ones) == 1 else ""


def has_no_class(cell: str | None, settings: TableSettings) -> bool:
    """Whether a cell of the column of classes is blank, and is not named like one of the classes either."""
    return is_blank(cell) and (cell or "").strip() not in settings.null_classes


def is_one(cell: str | None) -> bool:
    """Whether a cell of a class's own column says that a photo is of it."""
    return cell is not None and clean_id(cell).casefold() in ("1", "true")


def _read_labelled(found: CompetitionFolder, resolution: str, left_out: Counter) -> list[LabelledPhoto]:
    settings, folder = found.competition.settings, found.split_folder("train")
    if found.competition.problem:
        raise InputError(found.competition.problem)
    paths = PhotoPaths(settings, folder)
    table, image, group = found.path / settings.train_table, settings.image_column, settings.observation_column
    needed = [image, *filter(None, (settings.label_column, group))]
    ranks = [rank if rank not in (settings.label_column, image) else "" for rank in TAXONOMY]
    photos: list[LabelledPhoto] = []
    filled = [name for name in needed if name != settings.label_column]
    for row in iterate_table(table, needed, filled=filled, left_out=left_out):
        label = label_of(row, settings)
        if any(row.get(None, ())) and (label or not settings.label_column):
            raise InputError(
                f"{table}, photo {row[image]}: the row has more cells than columns; put quotes around the cell with a "
                "comma"
            )
        if not label:
            left_out[f"rows of {table.name} without {settings.label_column or 'a class'}"] += 1
            continue
        photos += [
            LabelledPhoto(
                "train",
                row[group or image],
                label,
                folder / photo,
                {column: row.get(column) or "" for column in settings.metadata_columns},
                tuple(row.get(rank) or "" for rank in ranks),
                row.get("species") or row.get("scientificName") or "",
            )
            for photo in paths.find(row[image])
        ]
    return photos


def _format_tables(found: CompetitionFolder, rows: Sequence[PhotoRow]) -> dict[Path, bytes]:
    settings, header, tables = found.competition.settings, found.competition.header, {}
    sample = found.path / settings.sample
    answers = {row[header[0]]: row for row in read_table(sample, header)}
    first = next(iter(answers.values()))
    names = dict.fromkeys(row.observation for row in rows)
    tables[sample] = format_table(header, [{**answers.get(name, first), header[0]: name} for name in names])
    table = found.path / settings.test_table
    if table.is_file():
        columns = {settings.test_image_column: "photo", settings.id_column: "observation"}  # perhaps the same column
        cells = [{**row.cells, **{column: getattr(row, kind) for column, kind in columns.items()}} for row in rows]
        tables[table] = format_table(list(max((row.cells for row in rows), key=len)), cells)
    return tables


def _visible_tables(found: CompetitionFolder) -> dict[Path, bytes | None]:
    """Kaggle mounts the training table too. The classes in the test table, which has none there, are removed."""
    settings, tables = found.competition.settings, {}
    for name in filter(None, (settings.sample, settings.train_table, settings.test_table)):
        tables[found.path / name] = None
    table, labels = found.path / settings.test_table, {settings.label_column} - {""} or set(settings.header[1:])
    if settings.test_table and labels.intersection(header := read_header(table)):
        tables[table] = format_table([column for column in header if column not in labels], read_table(table, ()))
    return tables


TABLE = Competition(
    name="table",
    table="",
    generality=1,
    arrangement="sample_submission.csv and train.csv",
    find_settings=_find,
    configure=configure,
    settings_type=TableSettings,
    photos="{split}",
    sample="",
    form=AnswerForm((), 1),
    metric="recall_at_1",
    time_limit=TableSettings.time_limit,
    read_rows=_read_rows,
    read_labelled=_read_labelled,
    format_tables=_format_tables,
    visible_tables=_visible_tables,
)
COMPETITIONS = (TABLE,)

"""PlantCLEF 2025 and 2026: learn species from photos of single plants, and find all species of each quadrat.

PlantCLEF2024singleplanttrainingdata.csv   a row per photo, with semicolons: image_name, species_id, obs_id, ...
images_max_side_800/1355868/abc.jpg        a folder per species_id, at any depth; perhaps in train, val and test first
PlantCLEF2025_test.csv                     the names of the quadrats' photos, in whichever column; may be missing
PlantCLEF2025_test_images/...              these photos, at any depth; in Pl@ntNet's archive beside their table
sample_submission.csv                      quadrat_id,species_ids: species in brackets; may be missing

A quadrat is a plot of vegetation, photographed from above with all its species. So its photo is cut into tiles.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from glob import escape
from itertools import islice
from pathlib import Path

from kernel.competitions.competition import AnswerForm, Competition, CompetitionFolder, LabelledPhoto, PhotoRow
from kernel.inputs import InputError, find_folders
from kernel.tables import TAXONOMY, clean_id, format_table, is_blank, iterate_table, photo_name, read_header, visible

NEEDED = ("image_name", "species_id", "obs_id")  # columns of the training table
ARRANGEMENT = f"a training table with the columns {', '.join(NEEDED)}"
SUFFIX = re.compile(r"\.(jpe?g|png|webp|tiff?)$", re.IGNORECASE)
TEST = "PlantCLEF2025_test_images"
CSV = "*.[cC][sS][vV]"
ANSWERS = re.compile("solution|submission", re.IGNORECASE)  # a table that names the quadrats, but is no test table
LOOKED_AT = 50  # rows of a table by which a column or a folder is found


class SpeciesSet(AnswerForm):
    """A cell of species in brackets, such as "[1355868, 1356257]"."""

    is_set = True

    def write(self, answer: Mapping[str, float]) -> list[str]:
        """The cell of an answer."""
        return [f"[{', '.join(answer)}]"]

    def read(self, cells: Sequence[str]) -> dict[str, float]:
        """The answer in a cell, with brackets, commas and quotes or without; all species with the same probability."""
        ids = dict.fromkeys(map(clean_id, re.findall(r"[^\s,;'\"\[\]()]+", cells[0])))
        return dict.fromkeys(ids, 1 / max(1, len(ids)))

    def find_defect(self, cells: Sequence[str], class_ids: Collection[str]) -> str:
        """See `AnswerForm.find_defect`."""
        answer = self.read(cells)
        is_right = 1 <= len(answer) <= self.guesses and self.write(answer) == [*cells]
        is_right = is_right and all(one in class_ids for one in answer)
        return "" if is_right else f"{cells[0]!r} is not 1 to {self.guesses} distinct class ids in brackets"


def _stem(name: str) -> str:
    """The name of a photo without its folder and suffix."""
    return SUFFIX.sub("", photo_name(name).rpartition("/")[2])


def _list_quadrats(folder: Path) -> dict[str, str]:
    """The names of the photos in a folder, by those without suffix."""
    return {_stem(path.name): path.name for path in visible(folder.glob("*")) if SUFFIX.search(path.name)}


def _go_down(folder: Path) -> Path:
    """The folder with photos: this one, or as long as it has none, the only folder in it."""
    below = [folder]
    while len(below) == 1:
        folder = below[0]
        below = [] if _list_quadrats(folder) else [path for path in visible(folder.glob("*")) if path.is_dir()]
    return folder


def _find_column(table: Path, quadrats: Collection[str]) -> str:
    """The column of a table that names most of the quadrats; empty if none names any, or it cannot be read."""
    try:
        rows = list(islice(iterate_table(table, ()), LOOKED_AT))
    except InputError:
        return ""
    hits = {column: sum(_stem(row[column] or "") in quadrats for row in rows) for column in read_header(table)}
    return max(filter(hits.get, hits), key=hits.get, default="")


def _read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    folder, header, table = found.split_folder("test"), found.competition.header, found.table
    quadrats, ids = _list_quadrats(folder), found.competition.sample_ids(found.path)
    rows, column = [{"": stem} for stem in quadrats], ""
    if found.competition.has_table:
        column = _find_column(table, quadrats)
        if not column:
            raise InputError(f"{table} names no photo of {folder}: download both again")
        rows = list(iterate_table(table, (column,), (column,), left_out))
        ids = ids or [row[column] for row in rows if column == header[0]]
    has_suffix = any(map(SUFFIX.search, ids))  # an id is the name of a photo, with its suffix or without
    named = [(stem := _stem(row[column]), quadrats.get(stem, f"{stem}.jpg"), row) for row in rows]
    return [PhotoRow(photo if has_suffix else stem, photo, row if column else {}) for stem, photo, row in named]


def _find(folder: Path) -> Competition | None:
    """The competition with the names of its test set; None if a folder has neither that nor a training table.

    A bundle finds them again: a run may be trained before they are there, and those of another year fit it. Without a
    table of quadrats or a sample submission, only the archive or a folder with a name like TEST counts.
    """
    headers = {path: read_header(path) for path in visible(folder.glob(CSV))}
    train = next((path.name for path, header in headers.items() if {*NEEDED} <= {*header}), "")
    is_known = any(PLANTCLEF.header[0] in own and "solution" not in path.name for path, own in headers.items())
    named = re.compile("test" if is_known else "plantclef.*test", re.IGNORECASE)
    below = [path for path in visible(folder.iterdir()) if path.is_dir()]
    if not is_known:  # the archive has its photos in data/PlantCLEF/...
        below = [path for path in below if named.search(path.name) or (path / "PlantCLEF").is_dir()]
    sets = []  # of photos that a table names, or whose folder is named for them
    for path in map(_go_down, reversed(below)):
        own, name = _list_quadrats(path), path.relative_to(folder).as_posix()
        near = sorted({*headers, *visible(path.parent.glob(CSV))})
        hits = [one for one in near if not ANSWERS.search(one.name) and _find_column(one, own)]
        if own and not path.name.isdecimal() and (hits or named.search(name)):  # a number is a species' folder
            sets.append((hits[0].relative_to(folder).as_posix() if hits else "", name, len(own)))
    if not train and not sets:
        return None
    table, test, quadrats = min(sets, key=lambda one: (not named.search(one[1]), not one[0]), default=("", TEST, 0))
    note = f"{folder} (plantclef): {train or 'no training table'}, {table or 'no test table'}, {quadrats:,} quadrats"
    return replace(
        PLANTCLEF,
        find_settings=None,  # found
        notes=(note,),
        problem="" if train else f"{folder} (plantclef) lacks {ARRANGEMENT}: put it there as downloaded",
        has_table=bool(table),
        table=escape(table) or test,
        splits={"test": test},
    )


# The kernel does not need the functions below. Training reads the labelled photos, and the rehearsal writes test sets.


def _read_labelled(found: CompetitionFolder, resolution: str, left_out: Counter) -> list[LabelledPhoto]:
    table = next(path for path in visible(found.path.glob(CSV)) if {*NEEDED} <= {*read_header(path)})
    root, has_splits = _find_photos(found.path, table)
    folders: dict[str, Path] = {}  # of each tag; all photos may have been gathered in that of one
    photos, known, shared = [], {}, {}  # equal texts and taxa are one object each: they repeat in a million rows
    for row in iterate_table(table, NEEDED, NEEDED[:2], left_out):
        species, tag = clean_id(row["species_id"]), (row.get("learn_tag") or "").strip()
        observation = row["image_name"] if is_blank(row["obs_id"]) else clean_id(row["obs_id"])
        # The training data were split into train, val and test; an observation is in the split of its first photo.
        own = ("val" if tag in ("val", "test") else "train", species)
        split, first = known.setdefault(observation, shared.setdefault(own, own))
        if species != first:  # the ids of several sources; another of them has it too
            observation = f"{observation}-{species}"
        if tag not in folders:
            folders[tag] = root.parent / tag if has_splits and (root.parent / tag).is_dir() else root
        path = folders[tag] / species / photo_name(row["image_name"])
        taxa, name = tuple(row.get(rank) or "" for rank in TAXONOMY), row.get("species") or ""
        species, taxa, name = (shared.setdefault(value, value) for value in (species, taxa, name))
        photos.append(LabelledPhoto(split, observation, species, path, taxa=taxa, species=name))
    return photos


def _find_photos(folder: Path, table: Path) -> tuple[Path, bool]:
    """The folder of the species' folders, and whether these are in folders named after the column learn_tag.

    Raises:
        InputError: none of the first photos of the table is there.
    """
    first = list(islice(iterate_table(table, NEEDED, NEEDED[:2]), LOOKED_AT))
    names = [f"{clean_id(row['species_id'])}/{photo_name(row['image_name'])}" for row in first]
    root = next(find_folders(folder, lambda one: any((one / name).is_file() for name in names)), None)
    if root is None:
        raise InputError(f"{folder} lacks the photos of {table.name}, such as {''.join(names[:1])}: unpack them there")
    return root, root.name in {(row.get("learn_tag") or "").strip() for row in first}


def _format_tables(found: CompetitionFolder, rows: Sequence[PhotoRow]) -> dict[Path, bytes]:
    if not found.competition.has_table:
        return {}
    column = _find_column(found.table, _list_quadrats(found.split_folder("test")))
    cells = [{**row.cells, column: row.observation} for row in rows]
    return {found.table: format_table(read_header(found.table), cells)}


PLANTCLEF = Competition(
    name="plantclef",
    slug="plantclef-2025",
    table="",
    arrangement=f"{ARRANGEMENT}, or photos in {TEST}",
    find_settings=_find,
    photos="{split}",
    sample="*[sS]ubmission*.csv",
    form=SpeciesSet(("quadrat_id", "species_ids"), guesses=20),
    grids=(1, 3, 4, 5),
    metric="sample_f1",
    time_limit=9 * 3600,
    read_rows=_read_rows,
    read_labelled=_read_labelled,
    format_tables=_format_tables,
)
COMPETITIONS = (PLANTCLEF,)

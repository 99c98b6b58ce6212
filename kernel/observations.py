"""Read the test table: which observations are to be predicted, from which photos, and how the answer is written.

A `Layout` is all that differs from one kind of competition to another. To support another one, add its layout here
(and the reading of its training table in `local/data/competition.py`, where its form is a new one).
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

from kernel.inputs import InputError, find_folders

RESOLUTIONS = ("300p", "500p", "720p", "fullsize")  # FungiCLEF's folders, by the shorter side in pixels
# FungiCLEF's columns that say something of an observation beside its photos, and are there in the test table too.
METADATA = (
    "year", "month", "day", "latitude", "longitude", "elevation", "landcover", "countryCode", "district",
    "biogeographicalRegion", "habitat", "substrate", "metaSubstrate",
)  # fmt: skip
# Of all formats that Pillow decodes by itself; a list, since nothing but the standard library is imported this early.
PHOTO_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga",
    ".icb", ".vda", ".vst", ".blp", ".cur", ".dcx", ".dds", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr",
    ".icns", ".ico", ".iim", ".im", ".msp", ".pcd", ".pcx", ".psd", ".pxr", ".qoi", ".bw", ".rgb", ".rgba", ".sgi",
    ".ras", ".xbm", ".xpm",
))  # fmt: skip
HIDDEN = ("__MACOSX", "@eaDir")  # beside all that begins with a dot: what macOS and Synology leave in archives
NULLS = frozenset(("", "nan", "<na>", "none", "null", "na", "n/a"))  # what programs write where they have no value
# What a cell holds where its value is not known.
BLANKS = NULLS | frozenset(
    ("n.a", "unknown", "unidentified", "unclassified", "undetermined", "unassigned", "not assigned", "unspecified",
     "not specified", "incertae sedis")
)  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """One or more photos of one specimen: the unit that is predicted.

    Attributes:
        metadata: what the table says beside the photos, as its text, by column of METADATA; without the blanks.
    """

    id: str
    photos: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Layout:
    """How one kind of competition ships its test table and wants its submission.

    Attributes:
        marker: glob of the test table, by which the layout is recognised, relative to the competition's folder: a CSV
            or JSON file, or the folder of photos where that is all there is. Of several, the first by name counts.
        photos: the folder of a split's photos, relative too, with {split} and {subset}, the name of the table's folder.
        sample: glob of the sample submission, whose first row is a valid answer when nothing better is known.
        header: the two columns of the submission, spelt as the grader wants them.
        guesses: class ids in one row, best first.
        metric: by which the competition ranks, under its name in a run's validation scores; not used on Kaggle.
        read: (folder of the test photos, test table, resolution, left out) -> its observations, in the submission's
            order; counts in the last what it leaves out.
        leaderboard: observations of its public and its private part, where they are known.
        slug: Kaggle's name of the one competition that has this layout, if it is one.
    """

    name: str
    marker: str
    photos: str
    sample: str
    header: tuple[str, str]
    guesses: int
    metric: str
    read: Callable[[Path, Path, str, Counter], list[Observation]]
    leaderboard: tuple[int, ...] = ()
    slug: str = ""

    def photo_folder(self, folder: Path, table: Path, split: str) -> Path:
        """Where the photos of a split ("train", "val" or "test") lie, or their folders by resolution."""
        return folder / self.photos.format(subset=table.parent.name, split=split)

    def boards(self, observations: int) -> dict[str, int]:
        """How many observations each part of the leaderboard scores.

        Args:
            observations: of the test set. Of a set of another size than the competition's own, the parts are not known.
        """
        if self.leaderboard and sum(self.leaderboard) == observations:
            return dict(zip(("public", "private"), self.leaderboard, strict=True))
        return {"whole test": observations}


@dataclass(frozen=True)
class TestTable:
    """What is asked: the observations in order, and the form of the answer.

    Attributes:
        left_out: how many rows and files are no part of it, by what they are.
    """

    folder: Path
    layout: Layout
    observations: list[Observation]
    left_out: Counter = field(default_factory=Counter)


def read_table(
    path: Path, needed: Iterable[str], filled: Sequence[str] = (), left_out: Counter | None = None
) -> list[dict[str, str]]:
    """The rows of a CSV file as dictionaries of strings.

    Args:
        needed: columns that the file must have.
        filled: columns that a row must fill; rows that do not are left out, rows of nothing but commas among them.
        left_out: counts these rows by what they lack.

    Raises:
        InputError: the file is not CSV text, or lacks a needed column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(needed) - set(reader.fieldnames or ()))
            if missing:
                raise InputError(f"{path} lacks the column {missing[0]!r}: it has {', '.join(reader.fieldnames or ())}")
            rows = []
            for row in reader:
                lacking = next((column for column in filled if is_blank(row[column])), None)
                if lacking is None:
                    rows.append(row)
                elif left_out is not None:
                    left_out[f"rows of {path.name} without {lacking}"] += 1
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error


def is_blank(cell: str | None) -> bool:
    """Whether a cell says nothing; a row that breaks off has None in its last cells."""
    return cell is None or cell.strip().casefold() in NULLS


def names_nothing(text: str) -> bool:
    """Whether a cell is blank or says that its value is not known, as "nan", "Unknown", "incertae sedis" or "?" do."""
    words = " ".join(text.casefold().replace("_", " ").split()).strip("<>()[].")
    return words in BLANKS or not any(character.isalnum() for character in words)


def clean_id(text: str) -> str:
    """An id as it was before a program took its column for floats: "7.0" and "7" are 7, "1e+05" is 100000."""
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+(\.\d+)?([eE]\+\d\d+)?", text) and not text.isdecimal():
        value = Decimal(text)
        if value == value.to_integral_value():
            return str(int(value))
    return text


def respell(ids: Iterable[str], sample: Iterable[str]) -> dict[str, str]:
    """Each id as the sample submission spells it, where that has the same number; else as it is.

    Raises:
        InputError: two ids differ in leading zeros alone, and the sample submission does not say which is right.
    """

    def number(text: str) -> str:
        return str(int(text)) if text.isascii() and text.isdecimal() else text

    known: dict[str, set[str]] = {}
    for text in sample:
        known.setdefault(number(clean_id(text)), set()).add(text.strip())
    spelt: dict[str, str] = {}
    first: dict[str, str] = {}
    for text in ids:
        spellings = known.get(number(text), set())
        if len(spellings) == 1:
            spelt[text] = next(iter(spellings))
            continue
        other = first.setdefault(number(text), text)
        if other != text and text not in spellings:
            raise InputError(
                f"the ids {other!r} and {text!r} differ in leading zeros alone: spell them alike in all tables"
            )
        spelt[text] = text
    return spelt


def read_sample(folder: Path, layout: Layout) -> tuple[list[str], list[str]]:
    """The observations and the classes that the sample submission names, as it spells them; none without one."""
    for path in visible(folder.glob(layout.sample)):
        try:
            rows = read_table(path, layout.header, filled=layout.header)
        except InputError:
            continue
        cells = [row[layout.header[1]] for row in rows]
        classes = cells if layout.guesses == 1 else [text for cell in cells for text in cell.split()]
        return [row[layout.header[0]] for row in rows], list(dict.fromkeys(classes))
    return [], []


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths in order of name, without the hidden ones."""
    return sorted(path for path in paths if not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of what was downloaded."""
    return name.startswith(".") or name in HIDDEN


def find_photos(folder: Path, left_out: Counter) -> list[Path]:
    """The photos in a folder and in all below it, links followed, in order of their paths.

    Args:
        left_out: counts the other files by their suffix, but for hidden ones.
    """
    seen: set[str] = set()  # a link may lead back to a folder above

    def visit(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen or not folder.is_dir():
            return
        seen.add(real)
        for path in visible(folder.iterdir()):
            if path.suffix.lower() in PHOTO_SUFFIXES:
                yield path
            elif path.is_dir():
                yield from visit(path)
            else:
                left_out[f"{path.suffix.lower()} files" if path.suffix else "files without a suffix"] += 1

    return list(visit(folder))


def photo_path(folder: Path, name: str) -> Path:
    """The path of a photo that a table names, perhaps with Windows' backslashes."""
    return folder / name.strip().replace("\\", "/").lstrip("/")


def group_photos(rows: Iterable[tuple[str, Path | None, Mapping[str, str | None]]]) -> list[Observation]:
    """Observations in order of first appearance, each with its photos in order and without repeats.

    Args:
        rows: of each photo its observation, its path or None, and what its row says; of METADATA, an observation gets
            the first that is not blank.
    """
    photos: dict[str, dict[Path, None]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for observation, photo, row in rows:
        own = photos.setdefault(observation, {})
        if photo is not None:
            own[photo] = None
        said = metadata.setdefault(observation, {})
        for column in METADATA:
            if column not in said and (row.get(column) or "").strip():
                said[column] = row[column]
    return [Observation(observation, tuple(paths), metadata[observation]) for observation, paths in photos.items()]


def resolution_folder(split: Path, wanted: str) -> Path:
    """The folder of photos in the wanted resolution, else the next larger one, else the largest there is.

    Args:
        split: e.g. `images/FungiTastic-FewShot/test`.
        wanted: one of RESOLUTIONS.
    """
    present = [name for name in RESOLUTIONS if (split / name).is_dir()]
    larger = [name for name in present if RESOLUTIONS.index(name) >= RESOLUTIONS.index(wanted)]
    return split / (larger or present[-1:] or [wanted])[0]


def _read_fungi(photos: Path, table: Path, resolution: str, left_out: Counter) -> list[Observation]:
    folder = resolution_folder(photos, resolution)
    rows = read_table(table, ("observationID", "filename"), filled=("observationID",), left_out=left_out)
    # A row that breaks off before the file's name asks for an answer all the same.
    return group_photos(
        (
            clean_id(row["observationID"]),
            None if is_blank(row["filename"]) else photo_path(folder, row["filename"]),
            row,
        )
        for row in rows
    )


def read_coco(path: Path) -> tuple[dict[str, str], dict]:
    """The file name of each image by its id, in order, and all that COCO metadata say, whichever the year.

    Herbarium 2020 and 2021 are written in ISO-8859-1. 2022 is not, calls an `id` by its list, `image_id`, and says
    nothing of its test set but a bare list of images.

    Raises:
        InputError: the file is not JSON, or an image lacks its id or file name.
    """
    try:
        content = path.read_bytes()
        try:
            said = json.loads(content)
        except UnicodeDecodeError:
            said = json.loads(content.decode("ISO-8859-1"))
        said = {"images": said} if isinstance(said, list) else said
        return {coco_id(image, "image"): image["file_name"] for image in said["images"]}, said
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as COCO metadata ({error!r}): download it again") from error


def coco_id(entry: dict, kind: str) -> str:
    """The id of an image or category, under either name."""
    return clean_id(str(entry["id"] if "id" in entry else entry[f"{kind}_id"]))


def _read_herbarium(photos: Path, table: Path, resolution: str, left_out: Counter) -> list[Observation]:
    names, _ = read_coco(table)
    return group_photos((image, photo_path(photos, name), {}) for image, name in names.items())


def _read_class_folders(photos: Path, table: Path, resolution: str, left_out: Counter) -> list[Observation]:
    paths = find_photos(photos, left_out)
    sample, _ = read_sample(photos.parent, _CLASS_FOLDERS)
    return group_photos((name, path, {}) for name, path in zip(name_photos(paths, photos, sample), paths, strict=True))


def name_photos(paths: Sequence[Path], root: Path, sample: Iterable[str]) -> list[str]:
    """The ids of photos that no table names: no two are alike, and as many as possible are in the sample submission.

    Without one, the first of these that no two share: stem, file name, path without and with the suffix.
    """
    relative = [path.relative_to(root) for path in paths]
    ways = (
        [path.stem for path in relative],
        [path.name for path in relative],
        [path.with_suffix("").as_posix() for path in relative],
        [path.as_posix() for path in relative],
    )
    distinct, known = [names for names in ways if len(set(names)) == len(names)], set(sample)
    return max(distinct, key=lambda names: len(known.intersection(names)))  # the first of equals


_FUNGICLEF = Layout(
    "fungiclef",
    marker="metadata/*/*-Test.csv",
    photos="images/{subset}/{split}",
    sample="*SAMPLE_SUBMISSION*.csv",
    header=("observationId", "predictions"),  # the metadata spells it observationID
    guesses=10,
    metric="recall_at_5",
    read=_read_fungi,
    leaderboard=(226, 773),
    slug="fungi-clef-2025",
)
# The data set from which FungiCLEF was taken, whose tables have the test labels too. All subsets' tables are downloaded
# together, their photos one by one. [!A] passes over DNA-Test; ClosedSet-Test comes before OpenSet-Test by name.
# Its benchmark reports top-1 accuracy first (https://bohemianvra.github.io/FungiTastic/benchmarks/closed).
_FUNGITASTIC = tuple(
    replace(
        _FUNGICLEF,
        name=subset.lower(),
        marker=f"metadata/{subset}/*[!A]-Test.csv",
        photos="{subset}/{split}",
        metric="recall_at_1",
        leaderboard=(),
        slug="",
    )
    for subset in ("FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot")
)
_HERBARIUM = Layout(
    "herbarium",
    marker="nybg2020/test/metadata.json",
    photos="nybg2020/{split}",
    sample="sample_submission.csv",
    header=("Id", "Predicted"),
    guesses=1,
    metric="macro_f1",
    read=_read_herbarium,
    slug="herbarium-2020-fgvc7",
)
_CLASS_FOLDERS = Layout(
    "class-folders",
    marker="test",
    photos="{split}",
    sample="sample_submission.csv",
    header=("image_name", "pred_label"),
    guesses=1,
    metric="recall_at_1",
    read=_read_class_folders,
)
LAYOUTS = (
    _FUNGICLEF,
    *_FUNGITASTIC,
    _HERBARIUM,
    replace(
        _HERBARIUM,
        name="herbarium-2021",
        marker="test/metadata.json",
        photos="{split}",
        slug="herbarium-2021-fgvc8",
    ),
    replace(
        _HERBARIUM,
        name="herbarium-2022",
        marker="test_metadata.json",
        photos="{split}_images",
        slug="herbarium-2022-fgvc9",
    ),
    _CLASS_FOLDERS,
)
SPLITS = ("train", "val", "valid", "validation", "test")  # names of folders that are no classes


def recognise(folder: Path, layouts: Iterable[Layout] = LAYOUTS) -> tuple[Layout, Path] | None:
    """The layout of a competition's folder and its test table, or None.

    Where a folder fits several layouts, the one whose test photos are there counts; class folders are those of a folder
    that fits no other layout.
    """
    tables = [
        (layout, table)
        for layout in LAYOUTS
        if layout is not _CLASS_FOLDERS
        for table in visible(folder.glob(layout.marker))[:1]
    ]
    if tables:
        known = [one for one in tables if one[0] in layouts]
        return max(known, key=lambda one: one[0].photo_folder(folder, one[1], "test").is_dir(), default=None)
    if _CLASS_FOLDERS in layouts and (class_folders(folder) or _holds_test_photos(folder)):
        return _CLASS_FOLDERS, folder / _CLASS_FOLDERS.marker
    return None


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, of train where there is one, each with photos; none where these are something else.

    The folders of a split, of a resolution, and those beside a split's own, are no classes.
    """
    is_split = folder.name.lower() in SPLITS and any(
        (folder.parent / split).is_dir() for split in {*SPLITS} - {folder.name}
    )
    root = folder / "train" if (folder / "train").is_dir() else folder
    found = visible(path for path in (root.iterdir() if root.is_dir() else ()) if path.is_dir())
    names = {path.name.lower() for path in found}
    if not names or is_split or names & {*RESOLUTIONS, *SPLITS}:
        return []
    return found if any(has_photos(path) for path in found) else []


def has_photos(folder: Path) -> bool:
    """Whether there is a photo in a folder itself."""
    with os.scandir(folder) as entries:
        return any(
            not is_hidden(entry.name) and os.path.splitext(entry.name)[1].lower() in PHOTO_SUFFIXES for entry in entries
        )


def _holds_test_photos(folder: Path) -> bool:
    """Whether a folder has a test folder of photos, directly or in folders that are no resolutions."""
    test = folder / _CLASS_FOLDERS.marker
    return test.is_dir() and not any((test / name).exists() for name in (*RESOLUTIONS, *SPLITS))


def _holds_test(folder: Path) -> bool:
    """Whether a folder is a competition's with a test set; class folders alone may be anything that is mounted."""
    found = recognise(folder)
    return found is not None and found[1].exists()


def read_test(folder: Path, layout: Layout, table: Path, resolution: str = RESOLUTIONS[0]) -> TestTable:
    """The test observations of a folder that was recognised, their ids as the sample submission spells them.

    Raises:
        InputError: the table cannot be read, or there is no observation.
    """
    left_out: Counter = Counter()
    observations = layout.read(layout.photo_folder(folder, table, "test"), table, resolution, left_out)
    if not observations:
        raise InputError(
            f"{table} has no test observation{tell_left_out(left_out)}: put the test set there as downloaded"
        )
    if layout is not _CLASS_FOLDERS:  # whose ids are names of files, which `name_photos` has compared with the sample
        spelt = respell((observation.id for observation in observations), read_sample(folder, layout)[0])
        observations = [replace(observation, id=spelt[observation.id]) for observation in observations]
    return TestTable(folder, layout, observations, left_out)


def tell_left_out(left_out: Counter) -> str:
    """What was left out, in brackets, or nothing: ` (left out: .heic files: 3)`."""
    return f" (left out: {', '.join(f'{what}: {count}' for what, count in left_out.most_common())})" if left_out else ""


def find_test_table(root: Path, layout: str | None = None, resolution: str = RESOLUTIONS[0]) -> TestTable:
    """The test table of the competition mounted under `root`.

    Args:
        layout: name of the layout that the weights were trained on; None accepts any.
        resolution: of the photos that they were trained on.

    Raises:
        InputError: nothing under `root` has that layout, or it has no test observation.
    """
    wanted = [known for known in LAYOUTS if layout in (None, known.name)]
    others = []
    for folder in find_folders(root, _holds_test):
        found = recognise(folder, wanted)
        if found:
            return read_test(folder, *found, resolution)
        others.append(f"{folder} ({recognise(folder)[0].name})")
    looked_for = " or ".join(known.marker for known in wanted)
    if others:
        raise InputError(
            f"the weights are for a competition of layout {' or '.join(known.name for known in wanted)} with "
            f"{looked_for}, but {', '.join(others)} is attached: attach the competition that the run was trained on"
        )
    raise InputError(f"no competition under {root}: looked for {looked_for}; attach the competition to the kernel")

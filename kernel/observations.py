"""Read the test table: which observations are to be predicted, from which photos, and how the answer is written.

A `Layout` is all that differs from one kind of competition to another. To support another one, add its layout here
(and the reading of its training table in `local/competition.py`, where its form is a new one).
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel.mounts import InputError, find_folders

RESOLUTIONS = ("300p", "500p", "720p", "fullsize")  # FungiCLEF's folders, by the shorter side in pixels
# FungiCLEF's columns that say something of an observation beside its photos, and are there in the test table too.
METADATA = (
    "year", "month", "day", "latitude", "longitude", "elevation", "landcover", "countryCode", "district",
    "biogeographicalRegion", "habitat", "substrate", "metaSubstrate",
)  # fmt: skip
PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


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
        read: (folder of the test photos, test table, resolution) -> its observations, in the submission's order.
    """

    name: str
    marker: str
    photos: str
    sample: str
    header: tuple[str, str]
    guesses: int
    read: Callable[[Path, Path, str], list[Observation]]

    def photo_folder(self, folder: Path, table: Path, split: str) -> Path:
        """Where the photos of a split ("train", "val" or "test") lie, or their folders by resolution."""
        return folder / self.photos.format(subset=table.parent.name, split=split)


@dataclass(frozen=True)
class TestTable:
    """What is asked: the observations in order, and the form of the answer."""

    folder: Path
    layout: Layout
    observations: list[Observation]


def read_table(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file as dictionaries of strings.

    Raises:
        InputError: the file is not CSV text, or lacks a needed column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(needed) - set(reader.fieldnames or ()))
            if missing:
                raise InputError(f"{path} lacks the column {missing[0]!r}: it has {', '.join(reader.fieldnames or ())}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error


def group_photos(rows: Iterable[tuple[str, Path, Mapping[str, str | None]]]) -> list[Observation]:
    """Observations in order of first appearance, each with its photos in order and without repeats.

    Args:
        rows: of each photo its observation, its path, and what its row says; of METADATA, an observation gets the first
            that is not blank.
    """
    photos: dict[str, dict[Path, None]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for observation, photo, row in rows:
        photos.setdefault(observation, {})[photo] = None
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


def whole(number: str) -> str:
    """An id as the sample submission spells it, also where a table's writer took its column for floats."""
    return number.removesuffix(".0")


def _read_fungi(photos: Path, table: Path, resolution: str) -> list[Observation]:
    photos = resolution_folder(photos, resolution)
    rows = [row for row in read_table(table, ("observationID", "filename")) if (row["observationID"] or "").strip()]
    # A row that breaks off before the file's name asks for an answer all the same.
    return group_photos((whole(row["observationID"]), photos / (row["filename"] or ""), row) for row in rows)


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as COCO metadata ({error!r}): download it again") from error


def coco_id(entry: dict, kind: str) -> str:
    """The id of an image or category, under either name."""
    return str(entry["id"] if "id" in entry else entry[f"{kind}_id"])


def _read_herbarium(photos: Path, table: Path, resolution: str) -> list[Observation]:
    names, _ = read_coco(table)
    return group_photos((image, photos / name, {}) for image, name in names.items())


def _read_class_folders(photos: Path, table: Path, resolution: str) -> list[Observation]:
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    return group_photos((path.stem, path, {}) for path in paths)


_FUNGICLEF = Layout(
    "fungiclef",
    marker="metadata/*/*-Test.csv",
    photos="images/{subset}/{split}",
    sample="*SAMPLE_SUBMISSION*.csv",
    header=("observationId", "predictions"),  # the metadata spells it observationID
    guesses=10,
    read=_read_fungi,
)
# The data set from which FungiCLEF was taken, whose tables have the test labels too. All subsets' tables are downloaded
# together, their photos one by one. [!A] passes over DNA-Test; ClosedSet-Test comes before OpenSet-Test by name.
_FUNGITASTIC = tuple(
    replace(_FUNGICLEF, name=subset.lower(), marker=f"metadata/{subset}/*[!A]-Test.csv", photos="{subset}/{split}")
    for subset in ("FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot")
)
_HERBARIUM = Layout(
    "herbarium",
    marker="nybg2020/test/metadata.json",
    photos="nybg2020/{split}",
    sample="sample_submission.csv",
    header=("Id", "Predicted"),
    guesses=1,
    read=_read_herbarium,
)
_CLASS_FOLDERS = Layout(
    "class-folders",
    marker="test",
    photos="{split}",
    sample="sample_submission.csv",
    header=("image_name", "pred_label"),
    guesses=1,
    read=_read_class_folders,
)
LAYOUTS = (
    _FUNGICLEF,
    *_FUNGITASTIC,
    _HERBARIUM,
    replace(_HERBARIUM, name="herbarium-2021", marker="test/metadata.json", photos="{split}"),
    replace(_HERBARIUM, name="herbarium-2022", marker="test_metadata.json", photos="{split}_images"),
    _CLASS_FOLDERS,
)


def recognise(folder: Path, layouts: Iterable[Layout] = LAYOUTS) -> tuple[Layout, Path] | None:
    """The layout of a competition's folder and its test table, or None.

    Where a folder fits several layouts, the one whose test photos are there counts.
    """
    found = [(layout, table) for layout in layouts for table in sorted(folder.glob(layout.marker))[:1]]
    return max(found, key=lambda one: one[0].photo_folder(folder, one[1], "test").is_dir(), default=None)


def find_test_table(root: Path, manifest: dict | None) -> TestTable:
    """The test table of the competition mounted under `root`.

    Args:
        manifest: of the weights; says which layout and resolution they were trained for. None accepts any.

    Raises:
        InputError: nothing under `root` has a known layout.
    """
    competition = (manifest or {}).get("competition", {})
    wanted = [layout for layout in LAYOUTS if layout.name == competition.get("layout", layout.name)]
    for folder in find_folders(root, lambda folder: recognise(folder, wanted) is not None):
        layout, table = recognise(folder, wanted)
        photos = layout.photo_folder(folder, table, "test")
        return TestTable(folder, layout, layout.read(photos, table, competition.get("resolution", RESOLUTIONS[0])))
    looked_for = " or ".join(layout.marker for layout in wanted)
    raise InputError(f"no competition under {root}: looked for {looked_for}; attach the competition to the kernel")

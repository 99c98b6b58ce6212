"""Read the test table: which observations are to be predicted, from which photos, and how the answer is written.

A `Layout` is all that differs from one kind of competition to another. To support another one, add its layout here
(and the reading of its training table in `local/competition.py`).
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
        marker: glob of a file or folder, relative to the competition's folder, by which the layout is recognised.
        sample: glob of the sample submission, whose first row is a valid answer when nothing better is known.
        header: the two columns of the submission, spelt as the grader wants them.
        guesses: class ids in one row, best first.
        read: (competition's folder, the marker's path, resolution) -> its observations, in the submission's order.
    """

    name: str
    marker: str
    sample: str
    header: tuple[str, str]
    guesses: int
    read: Callable[[Path, Path, str], list[Observation]]


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


def _read_fungiclef(folder: Path, table: Path, resolution: str) -> list[Observation]:
    photos = resolution_folder(folder / "images" / table.parent.name / "test", resolution)
    rows = read_table(table, ("observationID", "filename"))
    return group_photos((whole(row["observationID"]), photos / row["filename"], row) for row in rows)


def whole(number: str) -> str:
    """An id as the sample submission spells it, also where a table's writer took its column for floats."""
    return number.removesuffix(".0")


def _read_herbarium(folder: Path, table: Path, resolution: str) -> list[Observation]:
    images = json.loads(table.read_text(encoding="ISO-8859-1"))["images"]
    return group_photos((str(image["id"]), table.parent / image["file_name"], {}) for image in images)


def _read_class_folders(folder: Path, table: Path, resolution: str) -> list[Observation]:
    photos = sorted(path for path in table.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    return group_photos((path.stem, path, {}) for path in photos)


LAYOUTS = (
    Layout(
        "fungiclef",
        marker="metadata/*/*-Test.csv",
        sample="*SAMPLE_SUBMISSION*.csv",
        header=("observationId", "predictions"),  # the metadata spells it observationID
        guesses=10,
        read=_read_fungiclef,
    ),
    Layout(
        "herbarium",
        marker="*/test/metadata.json",
        sample="sample_submission.csv",
        header=("Id", "Predicted"),
        guesses=1,
        read=_read_herbarium,
    ),
    Layout(
        "class-folders",
        marker="test",
        sample="sample_submission.csv",
        header=("image_name", "pred_label"),
        guesses=1,
        read=_read_class_folders,
    ),
)


def recognise(folder: Path) -> tuple[Layout, Path] | None:
    """The layout of a competition's folder and the marker that gave it away, or None."""
    for layout in LAYOUTS:
        marker = next(iter(sorted(folder.glob(layout.marker))), None)
        if marker:
            return layout, marker
    return None


def find_test_table(root: Path, manifest: dict | None) -> TestTable:
    """The test table of the competition mounted under `root`.

    Args:
        manifest: of the weights; says which layout and resolution they were trained for. None accepts any.

    Raises:
        InputError: nothing under `root` has a known layout.
    """
    competition = (manifest or {}).get("competition", {})
    wanted = [layout for layout in LAYOUTS if layout.name == competition.get("layout", layout.name)]
    for layout in wanted:
        for folder in find_folders(root, lambda folder, layout=layout: any(folder.glob(layout.marker))):
            marker = sorted(folder.glob(layout.marker))[0]
            observations = layout.read(folder, marker, competition.get("resolution", RESOLUTIONS[0]))
            return TestTable(folder, layout, observations)
    looked_for = " or ".join(layout.marker for layout in wanted)
    raise InputError(f"no competition under {root}: looked for {looked_for}; attach the competition to the kernel")

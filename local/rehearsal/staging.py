"""Lay a competition and a bundle out as Kaggle mounts them, with the test labels absent. Called by the rehearsal.

What is laid out may be links to the user's own files, so nothing ever writes into one: it is removed, and another put
in its place.
"""

import csv
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel.observations import read_table
from local.data.layout import find_layout
from local.data.taxonomy import TAXONOMY

LABELS = (
    "category_id", "scientificName", "species", "specificEpithet", *TAXONOMY, "kingdom", "poisonous",
    "iucnRedListCategory",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A rehearsal's folders.

    Attributes:
        inputs: what Kaggle would mount at /kaggle/input; the competition and the weights lie somewhere in it.
        source: holds the script, alone.
    """

    name: str
    inputs: Path
    competition: Path
    weights: Path
    source: Path


def stage_competition(data: Path, folder: Path) -> None:
    """Lay out the competition as Kaggle would mount it, with the test labels absent.

    What a kernel needs to see are the test table, FungiCLEF's other tables beside it, the test photos and the sample
    submission; whatever else lies in the folder, such as a solution, stays out.
    """
    layout, marker = find_layout(data)
    tables = marker.parent.glob("*.csv") if marker.suffix == ".csv" else (marker,)
    photos = all_files(layout.photo_folder(data, marker, "test"))
    for source in {*tables, *photos, *data.glob(layout.sample)}:
        if source.is_file():
            place(source, folder / source.relative_to(data))
    if marker.suffix == ".csv":
        for table in (folder / marker.relative_to(data)).parent.glob("*-Test.csv"):
            drop_columns(table, LABELS)


def all_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and in all below it, also behind links to folders."""
    seen: set[str] = set()  # a link may lead back to a folder above
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        yield from (Path(root, name) for name in names)


def stage_bundle(build: Path, weights: Path, source: Path) -> None:
    """Lay out the weights as a mounted dataset, and the script under another name, alone in its folder."""
    for file in (build / "weights").rglob("*"):
        if file.is_file():
            place(file, weights / file.relative_to(build / "weights"))
    place(build / "kernel.py", source / "script.py")


def place(source: Path, target: Path) -> None:
    """Make a file appear elsewhere, without copying it where the file system can do without."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a relative link would lead nowhere from another folder
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def drop_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Rewrite a CSV file without some columns, if it has any of them."""
    rows = read_table(path, ())
    kept = [name for name in rows[0] if name not in columns] if rows else []
    if rows and len(kept) < len(rows[0]):
        write_csv(path, kept, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Put a CSV file in the place of another."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in the place of another, which may be a link to the user's own."""
    path.unlink()
    path.write_bytes(content)


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, to tell whether any was touched."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

"""Lay out a competition without its test labels, and a bundle, as Kaggle mounts them. Called by the rehearsal.

The files may be hard links to the user's own. So none is ever written to: it is removed, and another one is created.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernel.competitions.competition import CompetitionFolder
from kernel.observations import read_rows
from local.base.files import link_or_copy
from local.data.folder import find_competition


@dataclass(frozen=True)
class Mounts:
    """The folders of a scenario.

    Attributes:
        inputs: what Kaggle would mount at /kaggle/input; `competition` and `weights` are folders in it.
        source: contains only the script.
    """

    name: str
    inputs: Path
    competition: Path
    weights: Path
    source: Path


def stage_competition(data: Path, folder: Path) -> None:
    """Lay out the competition as Kaggle would mount it, without the test labels.

    A kernel sees the tables, the test photos and the sample submission. Whatever else lies in the folder, such as a
    solution or a photo that no table lists, stays out.
    """
    found = find_competition(data)
    tables = found.competition.visible_tables(found)
    photos = all_files(found.split_folder("test")) if not found.competition.has_table else listed_photos(found)
    for source in {*tables, *photos, *data.glob(found.competition.sample)}:
        if source.is_file():
            target, content = folder / source.relative_to(data), tables.get(source)
            link_or_copy(source, target)
            if content is not None:
                replace_file(target, content)


def photo_folders(found: CompetitionFolder) -> list[Path]:
    """The folders of test photos; several where there are several resolutions."""
    photos = found.split_folder("test")
    return [photos / name for name in found.resolutions("test")] or [photos]


def listed_photos(found: CompetitionFolder) -> Iterator[Path]:
    """The photos that the test table lists, in all resolutions; some may be missing."""
    rows = read_rows(found, Counter())
    return (folder / row.photo for folder in photo_folders(found) for row in rows if row.photo)


def all_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders. Follows links."""
    seen: set[str] = set()  # a link may lead back to a folder above
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        yield from (Path(root, name) for name in names)


def stage_bundle(build: Path, weights: Path, source: Path) -> None:
    """Lay out the weights as a mounted dataset, and the script, renamed, alone in its folder."""
    for file in (build / "weights").rglob("*"):
        if file.is_file():
            link_or_copy(file, weights / file.relative_to(build / "weights"))
    link_or_copy(build / "kernel.py", source / "script.py")


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by another; it may be a link to the user's own."""
    path.unlink()
    path.write_bytes(content)


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of modification of every file, to detect changes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

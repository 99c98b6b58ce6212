"""Lay out a competition without its test labels, and a bundle, as Kaggle mounts them. Called by the rehearsal.

The files may be links to the user's own, so none is ever written into: it is removed and replaced by another.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from local.data.folder import find_competition


@dataclass(frozen=True)
class Mounts:
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
    """Lay out the competition as Kaggle would mount it, without the test labels.

    A kernel sees the tables, the test photos and the sample submission. Whatever else lies in the folder, such as a
    solution, stays out.
    """
    found = find_competition(data)
    tables = found.competition.visible_tables(found)
    for source in {*tables, *all_files(found.split_folder("test")), *data.glob(found.competition.sample)}:
        if source.is_file():
            target, content = folder / source.relative_to(data), tables.get(source)
            place(source, target)
            if content is not None:
                replace_file(target, content)


def all_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders. Follows links."""
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
    """Make a file appear elsewhere: as a hard link where the file system can, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a relative link would lead nowhere from another folder
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by another; it may be a link to the user's own."""
    path.unlink()
    path.write_bytes(content)


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of modification of every file, by which a change is seen."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

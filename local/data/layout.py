"""Recognise a competition's folder. Reads no table, so that a wrong `--data` is answered at once."""

from collections.abc import Iterable
from pathlib import Path

from kernel.inputs import InputError, find_folders
from kernel.observations import LAYOUTS, Layout, recognise


def find_layout(folder: Path) -> tuple[Layout, Path]:
    """The layout of a competition's folder, and its test table.

    Raises:
        InputError: the folder does not exist, or is of no known layout.
    """
    if not folder.is_dir():
        what = "is a file: unpack it, and" if folder.exists() else "does not exist:"
        raise InputError(f"{folder} {what} give the competition's folder as downloaded")
    found = recognise(folder)
    if found:
        return found
    near = next((place for place in _nearby(folder) if _looks_meant(place)), None)
    if near:
        raise InputError(f"no supported competition found in {folder}: did you mean {near}?")
    looked_for = ", ".join(f"{layout.marker} ({layout.name})" for layout in LAYOUTS)
    raise InputError(
        f"no supported competition found in {folder}: looked for {looked_for}; class folders are arranged as "
        "train/CLASS/photo, or as CLASS/photo alone; give the folder as downloaded"
    )


def _nearby(folder: Path) -> Iterable[Path]:
    """The folders above and below one that the user may have meant."""
    yield from folder.resolve().parents[:4]
    yield from find_folders(folder, lambda below: below != folder and _looks_meant(below), depth=2)


def _looks_meant(folder: Path) -> bool:
    """Whether a folder is a competition's; pictures in folders alone may be anything."""
    found = recognise(folder)
    return found is not None and (found[0].name != "class-folders" or (folder / "train").is_dir())

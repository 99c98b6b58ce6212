"""Find what is mounted: the weights and the competition, wherever Kaggle put them.

Kaggle has mounted one dataset under `/kaggle/input/<slug>`, and later under `/kaggle/input/datasets/<owner>/<slug>`;
competitions moved likewise. So nothing here trusts a path: a folder is known by a marker file that lies in it.
"""

import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO


class InputError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, what to do. The exit code is 2."""


def shorten(reason: object, width: int = 200) -> str:
    """Somebody else's words, such as an error's, on one line; a line over `width` ends after a whole word with "…"."""
    line = " ".join(str(reason).split())
    if not line and isinstance(reason, BaseException):
        return type(reason).__name__
    if len(line) <= width:
        return line
    kept = line[: width - 1].rpartition(" ")[0] or line.partition(" ")[0]  # a first word that is too long stays whole
    return f"{kept} …"


def escape_unprintable(*streams: TextIO) -> None:
    """Have a console that lacks a character show its escape: printing must never end the work."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # what stands in for a console in a notebook lacks none
            stream.reconfigure(errors="backslashreplace")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_folders(root: Path, is_wanted: Callable[[Path], bool], depth: int = 6) -> Iterator[Path]:
    """Folders under `root` that hold what is wanted, nearest first and in order of name; none inside another.

    Args:
        depth: levels below `root` to search; `models/owner/model/framework/variation/version` takes 6.
    """
    level = [root] if root.is_dir() else []
    for _ in range(depth + 1):
        below = []
        for folder in level:
            if is_wanted(folder):
                yield folder
            else:
                with os.scandir(folder) as entries:
                    below += [Path(entry.path) for entry in entries if entry.is_dir()]
        level = sorted(below)


def install_wheels(wheels: Sequence[Path], packages: Path) -> None:
    """Make the libraries importable that Kaggle's image lacks, or has only an older version of.

    Their wheels travel with the weights, and are pure Python, so that unpacking is all of it. They take precedence over
    what is installed, which stays as it was. To be called before anything is imported that they replace.

    Args:
        packages: a folder of the kernel's own, first on the import path from then on.

    Raises:
        InputError: a wheel is damaged, or would write outside of `packages`.
    """
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if not (packages / name).resolve().is_relative_to(packages.resolve()):
                        raise InputError(f"{path} holds {name!r}, outside of its own folder: bundle again")
                wheel.extractall(packages)
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} cannot be unpacked ({error}): bundle again") from error
    if wheels:
        sys.path.insert(0, str(packages.resolve()))
        importlib.invalidate_caches()


def tree(root: Path, depth: int = 3, width: int = 8) -> str:
    """The upper levels of a folder, for a log in which something was not found."""
    lines = [str(root)]

    def visit(folder: Path, level: int) -> None:
        entries = sorted(folder.iterdir()) if level <= depth and folder.is_dir() else []
        for entry in entries[:width]:
            lines.append("  " * level + entry.name + ("/" if entry.is_dir() else ""))
            visit(entry, level + 1)
        if len(entries) > width:
            lines.append("  " * level + f"... and {len(entries) - width} more")

    visit(root, 1)
    return "\n".join(lines)

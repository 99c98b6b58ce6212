"""Find the inputs: the weights and the competition, wherever Kaggle mounted them.

Kaggle has mounted one dataset under `/kaggle/input/<slug>`, and later under `/kaggle/input/datasets/<owner>/<slug>`;
competitions moved likewise. So nothing here trusts a path: a folder is known by a marker file that lies in it.
"""

import hashlib
import importlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

FORMAT = "few-shot-species/1"  # the manifest's "format"; raised when a kernel could no longer read older weights
MANIFEST = "manifest.json"
# The digest of the one manifest that the script accepts, set by bundle.py; empty accepts any.
MANIFEST_SHA256 = ""


class InputError(Exception):
    """What the user can mend. The message is one line: what is wrong, where, what to do. The exit code is 2."""


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


@dataclass(frozen=True)
class Weights:
    """A folder of weights, and what its manifest says of them."""

    folder: Path
    manifest: dict

    def file(self, name: str) -> Path:
        """The path of a weights file, once its content has been found to be what the manifest promised.

        Raises:
            InputError: the file is missing or its SHA-256 differs.
        """
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing: upload all of the bundle's weights again")
        expected, found = self.manifest["files"].get(name, "no digest"), sha256(path)
        if found != expected:
            raise InputError(f"{path} has SHA-256 {found}, the manifest says {expected}: upload the weights again")
        return path


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


def find_weights(root: Path, digest: str = MANIFEST_SHA256) -> Weights:
    """The weights that this kernel was bundled with.

    Raises:
        InputError: none are attached, several are and any would do, or those attached belong to another bundle.
    """
    found: dict[Path, str] = {}
    for folder in find_folders(root, _holds_weights):
        found[folder] = sha256(folder / MANIFEST)
        if found[folder] == digest:  # there is no need to list the photos, which lie deeper
            return read_weights(folder)
    if not found:
        raise InputError(f"no weights under {root}: attach the dataset made from build/weights (it holds {MANIFEST})")
    first = next(iter(found))
    if digest:
        raise InputError(
            f"the weights in {first} have manifest {found[first]}, this kernel was bundled with {digest}: "
            "attach the matching version of the dataset, or bundle again"
        )
    if len(set(found.values())) > 1:
        raise InputError(f"several weights under {root} ({', '.join(map(str, found))}): leave one")
    return read_weights(first)


def read_weights(folder: Path) -> Weights:
    """The weights in one folder: a bundle's, or a run's.

    Raises:
        InputError: the folder has no readable manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read ({error}): give a folder that training left") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST} is not of format {FORMAT}: train or bundle again with this version")
    return Weights(folder, manifest)


def install_wheels(weights: Weights, packages: Path) -> None:
    """Make the libraries importable that Kaggle's image lacks, or has only an older version of.

    Their wheels travel with the weights, and are pure Python, so that unpacking is all of it. They take precedence over
    what is installed, which stays as it was. To be called before anything is imported that they replace.

    Args:
        packages: a folder of the kernel's own, first on the import path from then on.

    Raises:
        InputError: a wheel is missing or damaged, or would write outside of `packages`.
    """
    wheels = sorted(name for name in weights.manifest["files"] if name.endswith(".whl"))
    for name in wheels:
        try:
            with zipfile.ZipFile(weights.file(name)) as wheel:
                for member in wheel.namelist():
                    if not (packages / member).resolve().is_relative_to(packages.resolve()):
                        raise InputError(f"{name} holds {member!r}, outside of its own folder: bundle again")
                wheel.extractall(packages)
        except zipfile.BadZipFile as error:
            raise InputError(f"{name} cannot be unpacked ({error}): bundle again") from error
    if wheels:
        sys.path.insert(0, str(packages.resolve()))
        importlib.invalidate_caches()


def _holds_weights(folder: Path) -> bool:
    try:
        read_weights(folder)
    except InputError:
        return False
    return True


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

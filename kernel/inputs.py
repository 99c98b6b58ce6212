"""Find what is mounted: the weights and the competition, wherever Kaggle put them.

Kaggle used to mount a dataset at `/kaggle/input/<slug>`, and now mounts it at `/kaggle/input/datasets/<owner>/<slug>`;
competitions moved likewise. So no path is fixed here: a folder is recognised by the files in it.
"""

import ctypes
import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

READ_BYTES = 1 << 24  # of a file at a time: a thread that takes less waits longer for Python's lock than it computes


class InputError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, what to do. The exit code is 2."""


def shorten(reason: object, width: int = 200) -> str:
    """Any text, such as another library's error, on one line; a line over `width` ends after a whole word with "…"."""
    line = " ".join(str(reason).split())
    if not line and isinstance(reason, BaseException):
        return type(reason).__name__
    if len(line) <= width:
        return line
    kept = line[: width - 1].rpartition(" ")[0] or line.partition(" ")[0]  # a first word that is too long is kept whole
    return f"{kept} …"


def escape_control(text: object) -> str:
    """Text on one line: a line break or another control character, as in a file's name, becomes its escape."""
    return "".join(repr(sign)[1:-1] if ord(sign) < 32 or sign in "\x7f\x85\u2028\u2029" else sign for sign in str(text))


def escape_unprintable(*streams: TextIO) -> None:
    """Print an escape for a character that the console does not have, instead of failing."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # not so in a notebook, which has all characters
            stream.reconfigure(errors="backslashreplace")


def call_libc(function: str, *arguments: int) -> None:
    """Call a function of the C library; nothing happens on a system whose library does not have it."""
    with suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def prepare_torch() -> None:
    """Set how torch waits and how it takes memory; call it before torch is loaded. Settings of the user are kept.

    By default torch's threads spin while they wait. Beside other busy processes, a thread that spins takes the core
    from the one that it waits for. The heaps that glibc would make for threads are returned to the system whenever they
    are empty, and so after every layer of an encoder: all threads use one heap. Pages of 2 MB instead of 4 KB, for
    tensors at least so large, save a twelfth of the time of an encoder on a CPU, where the system offers them. By
    itself, MKL multiplies matrices a tenth slower on processors of AMD than with the instructions that they have.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator
    if {"avx2", "avx512f"} & processor_flags() == {"avx2"}:  # with AVX-512, MKL may choose better
        os.environ.setdefault("MKL_CBWR", "AVX2")
    arena_max = -8  # M_ARENA_MAX of malloc.h
    call_libc("mallopt", arena_max, 1)


def processor_flags() -> set[str]:
    """The instructions of the processor, by Linux's names; none where they are not known."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        return set(next(line for line in lines if line.startswith("flags")).split())
    return set()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def find_folders(root: Path, matches: Callable[[Path], bool], depth: int = 6) -> Iterator[Path]:
    """Folders under `root` that match, level by level and in order of name; not those inside another match.

    Folders that cannot be read are passed over.

    Args:
        depth: levels below `root` to search; `models/owner/model/framework/variation/version` takes 6.
    """
    level = [root] if os.path.isdir(root) else []
    for _ in range(depth + 1):
        below = []
        for folder in level:
            if matches(folder):
                yield folder
            else:
                below += _list_folders(folder)
        level = sorted(below)


def _list_folders(folder: Path) -> list[Path]:
    """The folders in a folder; none if it cannot be read."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # such as a link to itself
                if entry.is_dir():
                    found.append(Path(entry.path))
    return found


def install_wheels(wheels: Sequence[Path], packages: Path) -> None:
    """Make libraries importable that Kaggle's image lacks, or has only in an older version.

    Their wheels come with the weights and are pure Python, so they only need to be unpacked. They take precedence over
    what is installed. Call this before importing what they replace.

    Args:
        packages: the folder to unpack them into, which becomes the first on the import path.

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


def list_folder(root: Path) -> str:
    """The upper three levels of a folder, eight entries of each, for the log when something was not found there."""
    lines = [str(root)]

    def visit(folder: Path, level: int) -> None:
        try:
            entries = sorted(folder.iterdir()) if level <= 3 and os.path.isdir(folder) else []
        except OSError as error:
            lines.append("  " * level + f"({error.strerror})")
            return
        for entry in entries[:8]:
            lines.append("  " * level + escape_control(entry.name) + ("/" if os.path.isdir(entry) else ""))
            visit(entry, level + 1)
        if len(entries) > 8:
            lines.append("  " * level + f"... and {len(entries) - 8} more")

    visit(root, 1)
    return "\n".join(lines)

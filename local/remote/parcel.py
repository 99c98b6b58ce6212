"""A parcel: files of a training in one zip, with their digests. It travels to Kaggle and back.

    contents.json         the digests, and what the sender says
    run/...               a finished run
    partial/...           what an interrupted training has left: its checkpoints
    embeddings/...        parts of the embedding cache

Kaggle unpacks a zip in a dataset, but not in a kernel's output. So a parcel is read from a zip or from a folder.
"""

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from kernel.inputs import InputError, sha256

CONTENTS = "contents.json"
RUN, PARTIAL, EMBEDDINGS = "run", "partial", "embeddings"  # its folders
CHUNK = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What is in a parcel.

    Attributes:
        files: path -> SHA-256.
        code: exit code of the training that made the files; 0 if it is done.
        is_stopped: whether the training was stopped before its end, and can be continued.
        last_line: the training's last line of output.
        cache_keys: of a finished run, as `local.remote.adoption.cache_keys` gave them there.
    """

    files: dict[str, str] = field(default_factory=dict)
    code: int = 0
    is_stopped: bool = False
    last_line: str = ""
    cache_keys: dict[str, str] = field(default_factory=dict)


def pack(archive: Path, files: Mapping[str, Path], **said: object) -> None:
    """Write a parcel. It is not compressed: weights and embeddings do not shrink.

    Args:
        files: path in the parcel -> the file.
        said: the other attributes of its `Contents`.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    contents = Contents({name: sha256(path) for name, path in sorted(files.items())}, **said)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as parcel:
        parcel.writestr(CONTENTS, json.dumps(asdict(contents), indent=1))
        for name in contents.files:
            parcel.write(files[name], name)
    os.replace(partial, archive)


def unpack(source: Path, folder: Path) -> Contents:
    """Copy the files of a parcel into a new folder, and check them.

    Args:
        source: a zip, or the folder of an unpacked one.

    Raises:
        InputError: a file is missing or damaged; `folder` does not exist then.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if source.is_dir():
            contents = parse_contents((source / CONTENTS).read_bytes())
            for name in contents.files:
                with (source / name).open("rb") as file:
                    copy_checked(file, name, contents, folder)
        else:
            with zipfile.ZipFile(source) as parcel:
                contents = parse_contents(parcel.read(CONTENTS))
                for name in contents.files:
                    with parcel.open(name) as file:
                        copy_checked(file, name, contents, folder)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{source} is damaged ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)
    return contents


def parse_contents(text: bytes) -> Contents:
    """The contents of a parcel.

    Raises:
        ValueError: it is not JSON of a parcel, or a path leads out of the parcel.
    """
    contents = Contents(**json.loads(text))
    for name in contents.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.parts[0] not in (RUN, PARTIAL, EMBEDDINGS):
            raise ValueError(f"{name!r} is no path of a parcel")
    return contents


def copy_checked(file: IO[bytes], name: str, contents: Contents, folder: Path) -> None:
    """Write a file of a parcel; a ValueError if it is not what the sender packed."""
    target, digest = folder / name, hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as copy:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != contents.files[name]:
        raise ValueError(f"{name} has another SHA-256 than the sender's")


def files_of(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The files of a folder, with their paths in a parcel's folder `name`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


def replace_folder(new: Path, old: Path) -> None:
    """Replace a folder by another one, and remove the old one afterwards."""
    before = old.with_name(f".{old.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    old.parent.mkdir(parents=True, exist_ok=True)
    if old.exists():
        os.replace(old, before)
    os.replace(new, old)
    shutil.rmtree(before, ignore_errors=True)


def add_embeddings(folder: Path, cache: Path) -> list[str]:
    """Move parts of the embedding cache into it; returns their paths. Each part is a file with a name of its own."""
    names = []
    for name, path in files_of(folder, "."):
        target = cache / name
        names.append(target.relative_to(cache).as_posix())
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return names

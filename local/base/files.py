"""Read JSON with clear errors, and write files atomically: a reader sees the old file or the new one, never a part."""

import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel.inputs import InputError, shorten

if TYPE_CHECKING:
    import torch


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({shorten(error)}): correct the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {shorten(repr(value), 60)}, expected a JSON object: correct the file")
    return value


def refuse_unwritable_file(path: Path) -> None:
    """Check, before the long work whose result it is to hold, that a file can be written. Nothing is left behind.

    Raises:
        InputError: it is a folder, or lies in something that is no folder, or in one that is read-only.
    """
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if os.path.isdir(path) or not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise InputError(f"{path} cannot be written as a file: give another path")


def write_text(text: str, path: Path) -> None:
    """Write text as UTF-8; a byte of a file's name that is none is written as an escape."""
    partial = make_partial(path)
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def write_json(value: dict, path: Path) -> None:
    """Write indented JSON with a newline at the end."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_table(rows: Sequence[dict], path: Path, columns: Sequence[str] = ()) -> None:
    """Write rows as CSV with a header.

    Args:
        columns: to write; empty for the keys of the first row.
    """
    partial = make_partial(path)
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:  # names may be no UTF-8
        writer = csv.DictWriter(file, columns or rows[0], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def write_tensors(tensors: "dict[str, torch.Tensor]", path: Path, notes: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, from any device and in any memory layout.

    Tensors that share memory, such as tied weights, are written separately, since the format does not permit sharing.

    Args:
        notes: the metadata of the file.
    """
    from safetensors.torch import save_file  # imports torch, which publishing does not need

    partial, own, taken = make_partial(path), {}, set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if own[name].untyped_storage().data_ptr() in taken:
            own[name] = own[name].clone()
        taken.add(own[name].untyped_storage().data_ptr())
    save_file(own, partial, notes)
    partial.replace(path)


def make_partial(path: Path) -> Path:
    """A hidden file beside `path` to write to first; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.partial")


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file to another path, or copy it if the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a relative link would lead nowhere from another folder
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

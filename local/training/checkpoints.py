"""Checkpoints of a training: written whole or not at all, and verified when read.

A checkpoint is a safetensors file, named by its number and the digest of its contents. It is written under another name
and renamed. The one before it is kept, and is read instead if the newest is damaged. One file holds all of a state, the
best weights and the log so far included, so that nothing of it can be newer or older than the rest.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kernel.forward import is_out_of_memory
from kernel.inputs import InputError, sha256
from local.base.console import say
from local.base.files import write_tensors
from local.training.checks import has_checkpoint

KEPT = 2
DIGITS = 16  # of the digest
FORMAT = 3  # of the tensors and notes


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training.

    Attributes:
        tensors: by name.
        notes: all else, as JSON.
    """

    tensors: dict[str, torch.Tensor]
    notes: dict

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Add a checkpoint to a folder, and remove all but the newest KEPT.

    Raises:
        InputError: the disk is full; earlier checkpoints are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = _newest_first(folder)
    number = int(older[0].name.split(".")[0]) + 1 if older else 0
    unnamed = folder / ".unnamed"
    with full_disk_named(folder):
        write_tensors(checkpoint.tensors, unnamed, {"notes": json.dumps({"format": FORMAT} | checkpoint.notes)})
        with unnamed.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unnamed, folder / f"{number:06}.{sha256(unnamed)[:DIGITS]}.safetensors")
    for path in older[KEPT - 1 :]:
        path.unlink()


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line; the checkpoints in `folder` are kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for path in folder.glob(".*"):
            path.unlink()
        full = (errno.ENOSPC, errno.EDQUOT)
        # safetensors and shutil.copytree give the error number in their messages alone
        is_named = any(f"os error {code})" in str(error) or f"[Errno {code}]" in str(error) for code in full)
        if not is_named and getattr(error, "errno", None) not in full:
            raise
        if not has_checkpoint(folder):
            raise InputError(
                f"the disk is full: no checkpoint was written to {folder}; free some space and run the command again "
                "with --resume"
            ) from error
        raise InputError(
            f"the disk is full: {folder} keeps the last checkpoint; free some space and continue with --resume"
        ) from error


@contextlib.contextmanager
def memory_named(doing: str, folder: Path) -> Iterator[None]:
    """Turn a lack of memory outside of a training's batches into one line; the checkpoints in `folder` are kept.

    Args:
        doing: what needed the memory, such as `evaluating epoch 3`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        is_device = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
        change = "close other programs that use it, or choose a smaller encoder"
        if is_device:
            change += ", or train on the CPU with CUDA_VISIBLE_DEVICES= before the command"
        kept = f"; {folder} keeps the last checkpoint, continue with --resume" if has_checkpoint(folder) else ""
        where = "the GPU is out of memory" if is_device else "out of memory"
        raise InputError(f"{where} while {doing}: {change}{kept}") from error


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is not damaged; None where there is none.

    Raises:
        InputError: it was written by an earlier version.
    """
    paths = _newest_first(folder)
    for path in paths:
        if sha256(path)[:DIGITS] != path.name.split(".")[1]:
            is_last = path == paths[-1]
            say(f"{path} is damaged: {'starting again' if is_last else 'continuing from the one before'}")
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            return Checkpoint(tensors, _parse_notes(file.metadata(), path))
    return None


def read_notes(folder: Path) -> dict | None:
    """The notes of the newest checkpoint, which is not checked for damage; None where there is none to read.

    Raises:
        InputError: it was written by an earlier version.
    """
    for path in _newest_first(folder)[:1]:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            return _parse_notes(file.metadata(), path)
    return None


def _parse_notes(metadata: dict[str, str], path: Path) -> dict:
    notes = json.loads(metadata["notes"])
    if notes.pop("format", None) != FORMAT:
        raise InputError(
            f"{path} was written by an earlier version of this code and cannot be resumed: remove {path.parent.parent} "
            "and train again"
        )
    return notes


def tidy(folder: Path) -> None:
    """Remove what only an interrupted training needs: all but the newest checkpoint."""
    for path in (*_newest_first(folder)[1:], *folder.glob(".*")):
        path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"), reverse=True)

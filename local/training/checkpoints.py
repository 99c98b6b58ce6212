"""Checkpoints of a training: complete or not there, checked when read, the last good one where the newest is damaged.

A checkpoint is a safetensors file whose name ends with its own digest. It is written beside its place and moved there
in one step; the one before is kept until the next.
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

from kernel.encoders import is_out_of_memory
from kernel.inputs import InputError, sha256
from local.base.console import say
from local.base.files import write_tensors

KEPT = 2
DIGITS = 16  # of the digest


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands.

    Attributes:
        tensors: by name.
        notes: what JSON can say.
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
    """Add a checkpoint to a folder, and forget all but the newest KEPT.

    Raises:
        InputError: the disk is full; the ones before are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = _newest_first(folder)
    number = int(older[0].name.split(".")[0]) + 1 if older else 0
    unnamed = folder / ".unnamed"
    with full_disk_named(folder):
        write_tensors(checkpoint.tensors, unnamed, {"notes": json.dumps(checkpoint.notes)})
        with unnamed.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unnamed, folder / f"{number:06}.{sha256(unnamed)[:DIGITS]}.safetensors")
    for path in older[KEPT - 1 :]:
        path.unlink()


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line, with the checkpoints in `folder` kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for path in folder.glob(".*"):
            path.unlink()
        full = (errno.ENOSPC, errno.EDQUOT)
        # safetensors and shutil.copytree say so in their messages alone
        told = any(f"os error {code})" in str(error) or f"[Errno {code}]" in str(error) for code in full)
        if not told and getattr(error, "errno", None) not in full:
            raise
        if not has_checkpoint(folder):
            raise InputError(
                f"the disk is full: no checkpoint was written to {folder}; free some space and run the command again, "
                "with --resume"
            ) from error
        raise InputError(
            f"the disk is full: {folder} keeps what was learnt until the last checkpoint; free some space and go on "
            "with --resume"
        ) from error


@contextlib.contextmanager
def memory_named(doing: str, folder: Path) -> Iterator[None]:
    """Turn a lack of memory outside of a training's steps into one line, with the checkpoints in `folder` kept.

    Args:
        doing: what needed the memory, as `judging epoch 3`.
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
    """The newest checkpoint that is as it was written; None where there is none."""
    for path in _newest_first(folder):
        if sha256(path)[:DIGITS] != path.name.split(".")[1]:
            say(f"{path} is damaged: going on from the one before")
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return Checkpoint(tensors, json.loads(file.metadata()["notes"]))
    return None


def read_notes(folder: Path) -> dict | None:
    """The notes of the newest checkpoint, which is not checked for damage; None where there is none to read."""
    for path in _newest_first(folder)[:1]:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            return json.loads(file.metadata()["notes"])
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left anything to go on from."""
    return any(folder.glob("*.safetensors"))


def tidy(folder: Path) -> None:
    """Forget what only an interruption would have needed: all but the newest of each kind of file."""
    for pattern in ("[0-9]*.safetensors", "best-*.safetensors"):
        for path in sorted(folder.glob(pattern))[:-1]:
            path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"), reverse=True)


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments of an optimiser as named tensors; its rates are the recipe's business."""
    for place, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                yield f"{place}.{name}", torch.as_tensor(value)


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Take up the moments that `flatten_optimiser` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        state.setdefault(int(place), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

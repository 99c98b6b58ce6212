"""The folder of a run: made in a hidden folder beside it, and there as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from local.base import distributed
from local.base.console import say
from local.base.run_folder import NOTE_FILE, keep_note
from local.training.checkpoints import full_disk_named, memory_named, tidy
from local.training.checks import CHECKPOINTS, has_checkpoint, is_first, partial_of

EVENTS = "tensorboard"


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out` when the block ends; after an error it stays if it has checkpoints."""
    partial = partial_of(out)
    checkpoints = partial / CHECKPOINTS
    if is_first():
        with full_disk_named(checkpoints):
            prepare(partial, out)
    distributed.barrier()
    try:
        with full_disk_named(checkpoints), memory_named("embedding the photos and choosing the bank", checkpoints):
            yield partial
            if is_first():
                put_in_place(partial, out)
    except Exception as error:
        if is_first() and has_checkpoint(checkpoints) and "--resume" not in str(error):
            say(f"{checkpoints} keeps what was trained: continue with --resume")
        raise
    finally:
        if is_first() and not has_checkpoint(checkpoints):
            shutil.rmtree(partial, ignore_errors=True)


def prepare(partial: Path, out: Path) -> None:
    """Make the folder that is to become `out`, with the checkpoints to continue from, and a note of the user's."""
    if has_checkpoint(partial / CHECKPOINTS):  # where they are: a disk that was full has no room for a copy
        for path in partial.iterdir():
            if path.name not in (CHECKPOINTS, EVENTS, NOTE_FILE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)
    if not has_checkpoint(out / CHECKPOINTS):
        partial.mkdir(parents=True)
        return
    kept = out.with_name(f".{out.name}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    try:
        for name in (CHECKPOINTS, EVENTS):
            if (out / name).is_dir():
                shutil.copytree(out / name, kept / name)
        os.replace(kept, partial)
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Move `partial` to `out`; the run that was there is removed afterwards."""
    tidy(partial / CHECKPOINTS)
    before = out.with_name(f".{out.name}.before")
    if out.exists():
        keep_note(out, partial)
        os.replace(out, before)
    os.replace(partial, out)
    shutil.rmtree(before, ignore_errors=True)

"""Check what a training is given, without torch, so that a mistake is answered immediately."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, read_manifest
from local.base.run_folder import CACHE
from local.data.folder import find_competition
from local.encoders.source import find_source
from local.recipes.recipe import Recipe

CHECKPOINTS = "checkpoints"


def check_start(recipe: Recipe, data: Path | None, out: Path, resumes: bool = False) -> None:
    """Check the folders and names that a training is given. Nothing is left behind.

    Args:
        data: None if the competition is on Kaggle alone.
        out: as `named` gives it.

    Raises:
        InputError: `out` exists already, or is not a run that could be continued; it cannot be written, or was
            interrupted; `data` is not a competition; there is no such encoder.
    """
    if os.path.lexists(out):  # also a link to nothing, which no folder replaces; unlike Path's, it takes any name
        if not resumes:
            raise InputError(f"{out} exists already: give another --out, continue it with --resume, or remove it")
        refuse_no_run(out)
    if is_first():
        refuse_unwritable(out)
    if has_checkpoint(partial_of(out) / CHECKPOINTS) and not resumes:
        raise InputError(f"{out} was interrupted: continue with --resume, or remove {partial_of(out)}")
    if data:
        find_competition(data)
    for one in recipe.encoder.each:
        find_source(one.name, recipe.encoder.pretrained)


def refuse_no_run(out: Path) -> None:
    """Check that `out` is a run.

    Raises:
        InputError: it is something else, or damaged.
    """
    if not os.path.lexists(out / MANIFEST):
        raise InputError(f"--resume cannot continue {out}: it is not a run, {MANIFEST} is missing; give another --out")
    read_manifest(out / MANIFEST)


def named(out: Path) -> Path:
    """The path of a run's folder, ending with the folder's name; "." and ".." do not."""
    return out if out.name not in ("", "..") else out.resolve()


def partial_of(out: Path) -> Path:
    """The hidden folder beside `out` in which the run is made."""
    return out.with_name(f".{out.name}.partial")


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left anything to continue from."""
    return any(folder.glob("*.safetensors"))


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["RANK"]) == 0


def is_restarted() -> bool:
    """Whether torchrun started this process again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def refuse_unwritable(out: Path) -> None:
    """Write to the folders of the run and of the cache for a test, and remove what was written.

    Raises:
        InputError: nothing can be written there.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
        nearest = (made[-1] if made else out).parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(nearest))
        out.parent.mkdir(parents=True, exist_ok=True)
        for folder in filter(os.path.lexists, (out.parent, out.parent / CACHE)):
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=folder) as probe:
                (Path(probe) / "probe").write_bytes(b"probe")
    except OSError as error:
        where = f"{error.filename or out.parent}: {error.strerror or error}"
        raise InputError(f"--out {out} cannot be written ({where}): give another --out") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()

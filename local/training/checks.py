"""What can be checked before a training without torch, so that a mistake of the user is answered at once."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from kernel.inputs import InputError
from local.base.run_folder import CACHE
from local.data.folder import find_competition
from local.encoders.source import find_source
from local.recipes.recipe import Recipe

CHECKPOINTS = "checkpoints"


def check_start(recipe: Recipe, data: Path, out: Path, resumes: bool = False) -> None:
    """Whether a training can begin, as far as folders and names tell. Nothing is left behind.

    Raises:
        InputError: `out` exists already, cannot be written or was interrupted; `data` is no competition; there is no
            such encoder.
    """
    out = named(out)
    if os.path.exists(out) and not resumes:  # unlike Path's, it takes any name
        raise InputError(f"{out} exists already: give another --out, continue it with --resume, or remove it")
    if is_first():
        refuse_unwritable(out)
    if has_checkpoint(partial_of(out) / CHECKPOINTS) and not resumes:
        raise InputError(f"{out} was interrupted: continue with --resume, or remove {partial_of(out)}")
    find_competition(data)
    find_source(recipe.encoder.encoder, recipe.encoder.pretrained, recipe.encoder.image_size)


def named(out: Path) -> Path:
    """A run's folder by a path that ends with its name, as `.` does not."""
    return out if out.name not in ("", "..") else out.resolve()


def partial_of(out: Path) -> Path:
    """The hidden folder beside a run's in which it is made."""
    return out.with_name(f".{out.name}.partial")


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left anything to go on from."""
    return any(folder.glob("*.safetensors"))


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["RANK"]) == 0


def is_restarted() -> bool:
    """Whether torchrun started this process again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def refuse_unwritable(out: Path) -> None:
    """Try to write where the run and the cache will be, before hours of work; what is made for it is removed again.

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

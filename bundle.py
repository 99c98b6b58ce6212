"""Bundle kernel/ and trained runs into one offline Kaggle script with its weights.

python bundle.py runs/NAME                 writes build/kernel.py and build/weights/
python bundle.py runs/A runs/B runs/C      an ensemble

An ensemble sums the log-probabilities of runs with the same --data and reference. Held-out observations decide the
weights of the runs, and a run that does not improve the ensemble is left out. With fewer than six held-out observations
only the best run is kept.

The script is readable, and accepts only the weights that it was bundled with. The same inputs give the same bytes.
Nothing is pickled or encoded. Code that would have another meaning in one file is refused with its line number.

A library that Kaggle's image lacks (open_clip), or has in an older version (timm), is added to the weights as a wheel
of the installed version. For libraries that are not pure Python, such as torch and Pillow, Kaggle's version is used;
the log of the kernel gives both versions.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from kernel.competitions import competition_of, module_of
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, Weights, read_weights
from local.base.console import Progress, command_parser, run, say
from local.base.files import write_json
from local.base.repository import commit
from local.base.run_folder import REFERENCE_FILE
from local.bundling.flatten import flatten
from local.bundling.introduction import introduce
from local.bundling.metadata import (
    DATASET_METADATA,
    KERNEL_METADATA,
    PLACEHOLDER,
    dataset_metadata,
    has_owner,
    read_kernel_metadata,
    with_owner,
    write_metadata,
)
from local.bundling.weights import gather_weights
from local.publishing.credentials import find_owner

ROOT = Path(__file__).resolve().parent
BEFORE = ".weights.before"  # the old weights, while they are replaced
DIGEST_LINE = 'MANIFEST_SHA256 = ""'  # of kernel/manifest.py


def bundle(runs: list[Path], out: Path, metadata_path: Path = ROOT / KERNEL_METADATA) -> None:
    """Write `out`/kernel.py and `out`/weights/. On any failure both stay as they were.

    Raises:
        InputError: a run, the metadata or the kernel cannot be bundled, or `out` would overwrite a run.
    """
    refuse_a_run_as_out(runs, out)
    metadata = with_owner(read_kernel_metadata(metadata_path), find_owner())
    weights, partial, script = out / "weights", out / ".weights.partial", out / ".kernel.py.partial"
    is_new = not os.path.lexists(out)
    try:
        clean_up(out)
        partial.mkdir(parents=True)
        with Progress("copying the weights"):
            best, *_ = gather_weights(runs, partial)
        write_json(dataset_metadata(metadata), partial / DATASET_METADATA)
        script.write_text(make_script(read_weights(partial), sha256(partial / MANIFEST)), encoding="utf-8")
        replace_bundle(out)
        copy_reference(best, out)
        write_metadata(out, metadata)
    except OSError as error:
        raise InputError(f"cannot bundle into {out} ({error}): what was there before is unchanged") from error
    finally:
        with suppress(OSError):
            remove(partial)
            remove(script)
            if is_new:
                out.rmdir()  # of a bundle that failed; a folder with anything in it stays
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    say(f"{out / 'kernel.py'}: {(out / 'kernel.py').stat().st_size:,} bytes; {weights}: {size / 1e6:.1f} MB")
    if not has_owner(metadata):
        say(
            f"{PLACEHOLDER} stands for your Kaggle name: local/publish.py fills it in; to push by hand, set "
            "KAGGLE_USERNAME and bundle again"
        )


def refuse_a_run_as_out(runs: list[Path], out: Path) -> None:
    """Check that a bundle written to `out` does not replace or mix with the files of a run.

    Raises:
        InputError: `out` is a run or lies in one, or a run lies in the weights that would be replaced.
    """
    target = out.resolve()
    for folder in runs:
        own = folder.resolve()
        if target.is_relative_to(own) or own.is_relative_to(target / "weights"):
            raise InputError(f"--out {out} would write into the run {folder}: give another --out")


def make_script(weights: Weights, digest: str) -> str:
    """The script that accepts these weights only; `digest` is the SHA-256 of their manifest."""
    module = module_of(competition_of(weights.manifest.competition))
    introduction = introduce(weights, digest, commit("kernel"))
    script = flatten(ROOT / "kernel", introduction=introduction, chosen={"competitions": module})
    if script.count(DIGEST_LINE) != 1:
        raise InputError(f"kernel/manifest.py must contain {DIGEST_LINE} once: the digest is written there")
    return script.replace(DIGEST_LINE, f'MANIFEST_SHA256 = "{digest}"')


def replace_bundle(out: Path) -> None:
    """Replace the old weights and script by the new ones: both, or neither if one cannot be replaced.

    The old weights are kept until both are replaced, so that `clean_up` can restore them if the process is killed.
    """
    weights, before = out / "weights", out / BEFORE
    if weights.exists():
        os.replace(weights, before)
    try:
        os.replace(out / ".weights.partial", weights)
        os.replace(out / ".kernel.py.partial", out / "kernel.py")
    except BaseException:
        if before.exists():
            remove(weights)
            os.replace(before, weights)
        elif not (out / ".weights.partial").exists():
            remove(weights)
        raise
    remove(before)


def copy_reference(best: Path, out: Path) -> None:
    """Copy what local/predict.py needs of the best run beside the weights; it is not sent to Kaggle."""
    remove(out / REFERENCE_FILE)
    if (best / REFERENCE_FILE).is_file():
        shutil.copyfile(best / REFERENCE_FILE, out / REFERENCE_FILE)


def clean_up(out: Path) -> None:
    """Remove the temporary files of a killed process; restore the old weights if the new ones lack their script."""
    weights, before, script = out / "weights", out / BEFORE, out / "kernel.py"
    if before.exists():
        manifest = weights / MANIFEST
        is_complete = (
            manifest.is_file()
            and script.is_file()
            and f'MANIFEST_SHA256 = "{sha256(manifest)}"' in script.read_text(encoding="utf-8", errors="replace")
        )
        if is_complete:
            remove(before)
        else:
            remove(weights)
            os.replace(before, weights)
    remove(out / ".weights.partial")
    remove(out / ".kernel.py.partial")


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link to one, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    bundle(options.runs, options.out)


if __name__ == "__main__":
    run(main)

"""Bundle kernel/ and trained runs into one offline Kaggle script with its weights.

python bundle.py runs/NAME                 writes build/kernel.py and build/weights/
python bundle.py runs/A runs/B runs/C      an ensemble; cross-validation weighs them, and leaves out what does not pay
"""

import os
import shutil
from pathlib import Path

from kernel.mounts import InputError, sha256
from local.bundling.flatten import flatten
from local.bundling.weights import gather_weights
from local.console import command_parser, run, say
from local.files import write_json
from local.make_run import commit
from local.publishing.metadata import (
    DATASET_METADATA,
    KERNEL_METADATA,
    PLACEHOLDER,
    dataset_metadata,
    has_owner,
    read_kernel_metadata,
    with_owner,
    write_metadata,
)
from local.publishing.preflight import find_owner

ROOT = Path(__file__).resolve().parent
DIGEST_LINE = 'MANIFEST_SHA256 = ""'  # of kernel/mounts.py


def bundle(runs: list[Path], out: Path, metadata_path: Path = ROOT / KERNEL_METADATA) -> None:
    """Write `out`/kernel.py and `out`/weights/; on any failure both stay as they were.

    Raises:
        InputError: a run, the metadata or the kernel cannot be bundled.
    """
    metadata = with_owner(read_kernel_metadata(metadata_path), find_owner())
    body = flatten(ROOT / "kernel")
    if body.count(DIGEST_LINE) != 1:
        raise InputError(f"kernel/mounts.py must hold the line {DIGEST_LINE} once: the script's digest goes there")
    partial, weights = out / ".weights.partial", out / "weights"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        digest = sha256(gather_weights(runs, partial))
        write_json(dataset_metadata(metadata), partial / DATASET_METADATA)
        script = out / ".kernel.py.partial"
        script.write_text(banner(digest) + body.replace(DIGEST_LINE, f'MANIFEST_SHA256 = "{digest}"'), encoding="utf-8")
        shutil.rmtree(weights, ignore_errors=True)
        os.replace(partial, weights)
        os.replace(script, out / "kernel.py")
        write_metadata(out, metadata)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    say(f"{out / 'kernel.py'}: {(out / 'kernel.py').stat().st_size:,} bytes; {weights}: {size / 1e6:.1f} MB")
    if not has_owner(metadata):
        say(
            f"{PLACEHOLDER} stands for your Kaggle name: local/publish.py fills it in; to push by hand, set "
            "KAGGLE_USERNAME and bundle again"
        )


def banner(digest: str) -> str:
    """The script's first lines: what it is, and of what it was made."""
    return f'''"""An offline Kaggle kernel for few-shot species recognition, made by bundle.py from kernel/.

commit    {commit("kernel")}
manifest  {digest}

It finds the competition and the weights under /kaggle/input, has a valid submission on disk before it imports torch,
and replaces it by the predictions: observation embeddings, averaged over photos and views, matched against a bank.
"""
'''


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    bundle(options.runs, options.out)


if __name__ == "__main__":
    run(main)

"""Bundle kernel/ and trained runs into one offline Kaggle script with its weights.

python bundle.py runs/NAME                 writes build/kernel.py and build/weights/
python bundle.py runs/A runs/B runs/C      an ensemble; cross-validation weighs them, and leaves out what does not pay
"""

import argparse
import os
import shutil
from pathlib import Path

from kernel.mounts import InputError, sha256
from local.bundling.flatten import flatten
from local.bundling.weights import gather_weights
from local.console import run, say
from local.files import write_json
from local.make_run import commit
from local.publishing.metadata import PLACEHOLDER, dataset_metadata, read_kernel_metadata

ROOT = Path(__file__).resolve().parent
DIGEST_LINE = 'MANIFEST_SHA256 = ""'  # of kernel/mounts.py


def bundle(runs: list[Path], out: Path) -> None:
    """Write `out`/kernel.py and `out`/weights/; on any failure both stay as they were.

    Raises:
        InputError: a run, the metadata or the kernel cannot be bundled.
    """
    metadata = read_kernel_metadata(ROOT / "kernel-metadata.json")
    body = flatten(ROOT / "kernel")
    if body.count(DIGEST_LINE) != 1:
        raise InputError(f"kernel/mounts.py must hold the line {DIGEST_LINE} once: the script's digest goes there")
    partial, weights = out / ".weights.partial", out / "weights"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        digest = sha256(gather_weights(runs, partial))
        write_json(dataset_metadata(metadata), partial / "dataset-metadata.json")
        script = out / ".kernel.py.partial"
        script.write_text(banner(digest) + body.replace(DIGEST_LINE, f'MANIFEST_SHA256 = "{digest}"'), encoding="utf-8")
        shutil.rmtree(weights, ignore_errors=True)
        os.replace(partial, weights)
        os.replace(script, out / "kernel.py")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    say(f"{out / 'kernel.py'}: {(out / 'kernel.py').stat().st_size:,} bytes; {weights}: {size / 1e6:.1f} MB")
    if PLACEHOLDER in metadata["id"]:
        say(f"before pushing, put your Kaggle name for {PLACEHOLDER} in kernel-metadata.json and bundle again")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    bundle(options.runs, options.out)


if __name__ == "__main__":
    run(main)

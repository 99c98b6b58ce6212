"""The whole way in a few minutes, with nothing but this repository: draw a competition, train, bundle, rehearse, score.

python local/demo.py
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bundle import bundle
from kernel.mounts import InputError
from local.competition import labelled, read_competition, sort_ids
from local.console import run, say
from local.generate import generate
from local.make_run import train_run
from local.metrics import describe
from local.plots import plot_predictions
from local.recipe import read_recipe
from local.rehearse import rehearse


def demonstrate(out: Path, species: int, seed: int) -> None:
    """Leave in `out` a competition, a run, a bundle, and the rehearsal's scored submission."""
    if out.exists():
        if not (out / "contact-sheet.png").is_file():
            raise InputError(f"{out} exists and is no earlier demo: give another --out")
        shutil.rmtree(out)
    started = time.monotonic()

    def step(line: str) -> None:
        say(f"\n[{time.monotonic() - started:4.0f} s] {line}")

    step(f"1/4 Drawing a competition: {species} species of fungi, in FungiCLEF 2025's folders and columns.")
    drawn = generate(out, species=species, seed=seed)
    step("2/4 Training a small encoder from scratch, and building the bank of prototypes.")
    train_run(read_recipe("demo", [f"seed={seed}"]), drawn.competition, out / "run")
    step("3/4 Bundling kernel/ and the run into one script and its weights.")
    bundle([out / "run"], out / "build")
    step("4/4 Rehearsing the script as Kaggle runs it: alone, offline, the test labels absent.")
    report = rehearse(drawn.competition, out / "build", drawn.solution)
    scenario = report["scenarios"][0]
    if not scenario["ok"]:
        raise InputError(f"the rehearsal failed: {scenario['reason']}; its log is in {out / 'build' / 'rehearsal'}")
    submission, pictures = out / "build" / "rehearsal" / "plain" / "submission.csv", out / "predictions.png"
    plot_predictions(drawn.competition, submission, drawn.solution, pictures)

    classes = len(sort_ids(labelled(read_competition(drawn.competition), "train").class_ids))
    step("Done. On the hidden test observations, with 95% intervals:")
    say(f"  bundle  {describe(report)}")
    say(f"  chance  Recall@1 {1 / classes:.3f}  Recall@5 {5 / classes:.3f}  Recall@10 {10 / classes:.3f}")
    for what, path in (
        ("the fungi", drawn.contact_sheet),
        ("the training curve", out / "run" / "training-curve.png"),
        ("what was recognised", pictures),
        ("the script for Kaggle", out / "build" / "kernel.py"),
        ("its submission", submission),
    ):
        say(f"  {what:22} {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--species", type=int, default=60, help="how many classes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing and the training (default %(default)s)")
    options = parser.parse_args()
    demonstrate(options.out, options.species, options.seed)


if __name__ == "__main__":
    run(main)

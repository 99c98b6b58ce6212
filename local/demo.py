"""Run the whole pipeline on made-up fungi in a few minutes: draw, train, bundle, rehearse, evaluate.

python local/demo.py
"""

import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bundle import bundle
from kernel.inputs import InputError
from local.base.console import command_parser, run, say
from local.base.metrics import describe
from local.drawing.competition import check_numbers, generate
from local.evaluate import report
from local.recipes.recipe import read_recipe
from local.rehearsal.report import rehearse

MARKER = ".demo"  # a file in a folder that the next demo may replace


def demonstrate(out: Path, species: int, seed: int) -> None:
    """Make a competition, a run, a bundle, a scored submission and a report in `out`. An earlier demo is replaced."""
    check_numbers(species, seed)
    recipe = read_recipe("demo", [f"seed={seed}"])
    if out.exists():
        if not (out / MARKER).is_file():
            raise InputError(f"{out} exists and is not a demo: give another --out")
        shutil.rmtree(out)
    started = time.monotonic()

    def step(line: str) -> None:
        say(f"\n[{time.monotonic() - started:4.0f} s] {line}")

    step(f"1/5 Drawing a competition: {species} species of fungi, in FungiCLEF 2025's folders and columns.")
    drawn = generate(out, species=species, seed=seed)
    (out / MARKER).touch()
    # Imported here because torch takes seconds, and `--help` and mistakes must be answered immediately.
    from local.data.competition import read_competition
    from local.training.plots import plot_predictions
    from local.training.run import train_run

    step("2/5 Training a small encoder from scratch, and building the bank of prototypes.")
    train_run(recipe, drawn.competition, out / "run")
    step("3/5 Bundling kernel/ and the run into one script and its weights.")
    bundle([out / "run"], out / "build")
    step("4/5 Rehearsing the script as Kaggle runs it: alone, offline, without the test labels.")
    rehearsed = rehearse(drawn.competition, out / "build", drawn.solution)
    if rehearsed.failed:
        reason = rehearsed.scenarios[0].reason
        raise InputError(f"the rehearsal failed: {reason}; its log is in {out / 'build' / 'rehearsal'}")
    submission, pictures = out / "build" / "rehearsal" / "plain" / "submission.csv", out / "predictions.png"
    plot_predictions(drawn.competition, submission, drawn.solution, pictures)

    step("5/5 Evaluating the run on its held-out observations.")
    page = report(out / "run", drawn.competition)

    classes = len(read_competition(drawn.competition).in_splits("train").classes)
    step("Done. On the hidden test observations, with 95% intervals:")
    say(f"  bundle  {describe(rehearsed.scores)}")
    say(f"  chance  Recall@1 {1 / classes:.3f}  Recall@5 {5 / classes:.3f}  Recall@10 {10 / classes:.3f}")
    for what, path in (
        ("the training curve", out / "run" / "training-curve.png"),
        ("example predictions", pictures),
        ("the script for Kaggle", out / "build" / "kernel.py"),
        ("its submission", submission),
        ("the report of the run", page),
    ):
        say(f"  {what:22} {path}")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--species", type=int, default=60, help="number of classes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and training (default: %(default)s)")
    options = parser.parse_args()
    demonstrate(options.out, options.species, options.seed)


if __name__ == "__main__":
    run(main)

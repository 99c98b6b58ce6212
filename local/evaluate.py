"""Evaluate a run on what was held out from it: all figures as metrics.json, and a page to look at, report.html.

python local/evaluate.py runs/best --data data/fungi-clef-2025
python local/evaluate.py runs/best --data data/fungi-clef-2025 --against runs/baseline --focus "Amanita fulvoides"

Nothing is embedded again: the embeddings are those that training has cached. The page contains its photos and works
offline, and every number on it is in metrics.json. It shows

- how good the run is: Recall@1/5/10, macro and weighted F1, log-loss, with 95% intervals; with --against, the paired
  difference from other runs, what both would do together, and how likely a leaderboard of its size ranks them wrongly;
- where it fails: by taxonomic rank, number of training observations and of photos, habitat and month; confusion
  matrices in taxonomic order; the commonest confusions side by side; poisonous species taken for edible ones and the
  reverse, at the costs of FungiCLEF 2024; the species of --focus; the best and worst recognised observations, each
  guess beside the photo that supports it most; unreadable photos; a table of all classes to search (press /) and sort;
- whether it can be trusted: reliability, calibration error and what of it is chance, coverage of five guesses, risk by
  coverage, confidence by rank, and what it means when views of a photo disagree;
- what to try next; then the training, a map of the embeddings, and everything that reproduces the run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, run, say
from local.base.files import write_json, write_text
from local.base.run_folder import require_answers
from local.data.folder import find_competition
from local.runs import open_run


def report(folder: Path, data: Path, others: Sequence[Path] = (), focus: Sequence[str] = ()) -> Path:
    """Write metrics.json and report.html into a run's folder. What training left in metrics.json stays there.

    Returns:
        The page.

    Raises:
        InputError: something of the user's is wrong; then nothing is written.
    """
    for run_folder in (folder, *others):
        open_run(run_folder)
        require_answers(run_folder)
    find_competition(data)
    # Imported here, since torch, scikit-learn and matplotlib take seconds, and a mistake is to be answered at once.
    from local.report.evidence import read_evidence
    from local.report.figures import evaluate
    from local.report.page import render

    evidence = read_evidence(folder, data)
    figures = json.loads(json.dumps(evaluate(evidence, others, focus), default=float, allow_nan=False))
    page = render(figures, data)
    by_training = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    write_json(by_training | {"evaluation": figures}, folder / "metrics.json")
    write_text(page, folder / "report.html")
    return folder / "report.html"


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="RUN", help="runs to compare with")
    parser.add_argument("--focus", nargs="+", default=[], metavar="SPECIES", help="species to look at closely")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    page = report(options.run, options.data, options.against, options.focus)
    say(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)

"""Evaluate a run on its held-out observations: write all figures to metrics.json, and a page to read, report.html.

python local/evaluate.py runs/best --data data/fungi-clef-2025
python local/evaluate.py runs/best --data data/fungi-clef-2025 --against runs/baseline --focus "Amanita fulvoides"

Photos are not embedded again: training has cached the embeddings. The page contains its photos and works offline; every
number on it is also in metrics.json. It shows

- how good the run is: Recall@1/5/10, macro and weighted F1, and log-loss, with 95% intervals, of predictions by
  settings that other observations chose; with and without the observations of which the bank has a near-duplicate,
  and these pairs of photos; with --against, the paired difference from other runs, the gain of an ensemble, and the
  probability that the leaderboard shows the better run as the worse one;
- where it fails: by taxonomic rank, number of observations in the bank, number of photos, habitat and month; confusion
  matrices in taxonomic order; poisonous species taken for edible ones and the reverse, by the costs of FungiCLEF 2024;
  the species of --focus; a table of all classes to search (press /) and sort;
- every error beside the most similar photo of the predicted class, to filter by confusion, rank, shots and confidence.
  Photos can be marked as mislabelled or duplicate, and the marks saved as a CSV for train.py --exclude;
- whether its probabilities can be trusted: calibration, risk by coverage, confidence by rank, agreement of views;
- what to try next; the training, a map of the embeddings, and all that is needed to reproduce the run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import Progress, command_parser, counted, run, say
from local.base.files import read_json, write_json, write_text
from local.base.metrics import headline_names
from local.base.run_folder import require_answers
from local.base.runs import open_run
from local.data.folder import find_competition


def report(folder: Path, data: Path, others: Sequence[Path] = (), focus: Sequence[str] = ()) -> Path:
    """Write report.html into a run's folder, and the figures into its metrics.json beside what training left there.

    Returns:
        The path of the page.

    Raises:
        InputError: a folder is not a run or not a competition, a run has no answers, or a species is unknown.
            Then nothing is written.
    """
    for run_folder in (folder, *others):
        open_run(run_folder)
        require_answers(run_folder)
    find_competition(data)
    by_training = read_json(folder / "metrics.json")
    with Progress("reading the run and its data"):
        # Imported here because torch, scikit-learn and matplotlib take seconds, and mistakes must be answered at once.
        from local.report.evidence import read_evidence
        from local.report.figures import compute_figures
        from local.report.page import render

        evidence = read_evidence(folder, data)
    figures = compute_figures(evidence, others, focus)
    page = render(figures, data)
    write_json(by_training | {"evaluation": asdict(figures)}, folder / "metrics.json")
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
    for line in describe_scores(read_json(options.run / "metrics.json")["evaluation"]):
        say(line)


def describe_scores(figures: dict) -> Iterator[str]:
    """The headline, without weights and without near-duplicates if there are any, and the gain over each other run."""

    def described(scores: dict, sign: str = "") -> str:
        return "  ".join(
            f"{label} {one['value']:{sign}.3f} [{one['low']:{sign}.3f}, {one['high']:{sign}.3f}]"
            for name, label in headline_names(figures["metric"]).items()
            if (one := scores[name])
        )

    yield f"{counted(figures['measured']['scored'], 'held-out observation')}: {described(figures['headline'])}"
    if figures["unweighted"]:
        yield f"the same, unweighted: {described(figures['unweighted'])}"
    found = figures["duplicates"]
    if found["duplicates"]:
        what = f"{counted(found['observations'], 'observation')} with near-duplicates in the bank"
        without = found["without_duplicates"]
        yield f"without {what}: {described(without) if without else 'none is left'}"
    for other in figures["against"]:
        yield f"minus {other['run']}, on {other['observations']:,}: {described(other['gain'], '+')}"


if __name__ == "__main__":
    run(main)

"""Rehearse the bundle: run it as Kaggle would, offline, and score its submission.

python local/rehearse.py --data data/fungi-clef-2025
python local/rehearse.py --data DIR --solution DIR/solution.csv --json build/rehearsal.json
python local/rehearse.py --data DIR --scenario all      also what can go wrong on Kaggle

The script runs alone in its own process, without network, with read-only inputs that have no test labels. The scenarios
are new and old mounts, a larger test set, unreadable and missing photos, a slow disk, a throttled CPU, memory, wrong
weights, kills at random moments, and the timm of Kaggle's image.

It also estimates how long the test set would take on Kaggle's GPUs.

The last line is `ready to push`, or says why not; then the exit code is 1.
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.start import positive_seconds
from local.base.console import command_parser, run, say
from local.base.files import refuse_unwritable_file
from local.rehearsal.rehearsal import Rehearsal
from local.rehearsal.report import play_all
from local.rehearsal.scenarios import SCENARIOS


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--solution", type=Path, metavar="CSV", help="the true test classes, to compute scores")
    parser.add_argument(
        "--scenario",
        choices=(*SCENARIOS, "all"),
        default="plain",
        metavar="NAME",
        help=f"all, or one of {', '.join(SCENARIOS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit", type=positive_seconds, metavar="SECONDS", help="default: the competition's own limit"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results and scores to this file")
    options = parser.parse_args()
    if options.json:
        refuse_unwritable_file(options.json)
    with Rehearsal(options.data, options.build, options.solution, options.time_limit) as rehearsal:
        report = play_all(rehearsal, list(SCENARIOS) if options.scenario == "all" else [options.scenario])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    say(f"submissions and logs: {options.build / 'rehearsal'}")
    say(report.verdict)
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)

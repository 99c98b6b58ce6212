"""Rehearse the bundle: run it as Kaggle would, offline, and score its submission.

python local/rehearse.py --data data/fungi-clef-2025
python local/rehearse.py --data DIR --solution DIR/solution.csv --json build/rehearsal.json
python local/rehearse.py --data DIR --scenario all      what can go wrong on Kaggle goes wrong here first

The script runs alone, renamed, in its own process, without network, over read-only inputs without labels. The scenarios
are new and old mounts, a larger test set, unreadable and missing photos, a slow disk, a throttled CPU, memory, wrong
weights, kills at random moments, and the timm of Kaggle's image.

The last line is `ready to push`, or says what is not; then the exit code is 1.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, run, say
from local.base.metrics import describe, score
from local.rehearsal.record import write_record
from local.rehearsal.scenarios import BY_NAME, SCENARIOS, class_of, conduct
from local.rehearsal.trial import Ran, Rehearsal


def rehearse(data: Path, build: Path, solution: Path | None = None, time_limit: float | None = None) -> dict:
    """Run the bundle once as Kaggle would; leave submission.csv and kernel.log in `build`/rehearsal/plain.

    Args:
        data: the competition's folder, as downloaded.
        solution: CSV of observation and class id, to score against.
        time_limit: seconds for the kernel's own budget and for the process; None is the competition's.

    Returns:
        The report that `--json` writes.

    Raises:
        InputError: the data, the bundle or the solution is not what it should be.
    """
    with Rehearsal(data, build, solution, time_limit) as rehearsal:
        return report_on(rehearsal, ["plain"])


def report_on(rehearsal: Rehearsal, names: Sequence[str]) -> dict:
    """Conduct scenarios, telling each outcome as it comes; their report, with the scores and timings of `plain`.

    The report stays beside the bundle as well, for `local/publish.py` to find.
    """
    report = {"scenarios": []}
    for name in names:
        result = conduct(rehearsal, BY_NAME[name])
        report["scenarios"].append(result)
        verdict = "ok" if result["ok"] else "FAILED"
        say(f"{name:18} {verdict:6} {result['seconds']:7.1f} s  {result['reason']}".rstrip())
        if name == "plain":
            report |= measure(rehearsal, rehearsal.performed["plain"][0][0])
    report["network"] = "namespace" if rehearsal.isolation else "guard"
    write_record(rehearsal.build, report)
    return report


def measure(rehearsal: Rehearsal, ran: Ran) -> dict[str, float | None]:
    """Scores, if there is a solution and a sound run, and timings."""
    scores = {}
    if rehearsal.truth and not ran.fault:
        truth = [class_of(rehearsal, observation) for observation in ran.guesses]
        scores = score(truth, list(ran.guesses.values()))
        say(describe(scores, ran.table.competition.guesses))
    return {
        **scores,
        "photos_per_second": float(ran.done["speed"]) if ran.done else None,
        "peak_memory_mb": round(ran.outcome.peak_memory_mb, 1),
    }


def conclude(results: Sequence[dict]) -> str:
    """The one line that a person can trust: `ready to push`, or what is not."""
    failed = [result["name"] for result in results if not result["ok"]]
    skipped = [result["name"] for result in results if result["reason"].startswith("skipped")]
    if failed:
        return f"not ready to push: {', '.join(failed)} failed"
    if len(results) < len(SCENARIOS):
        return f"{results[0]['name']} is ok; --scenario all says whether the bundle is ready to push"
    return "ready to push" + (f" (skipped: {', '.join(skipped)})" if skipped else "")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--solution", type=Path, metavar="CSV", help="the test answers, to score against")
    parser.add_argument(
        "--scenario",
        choices=(*BY_NAME, "all"),
        default="plain",
        metavar="NAME",
        help=f"all, or one of {', '.join(BY_NAME)} (default: %(default)s)",
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="default: the competition's own limit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome and the scores there too")
    options = parser.parse_args()
    with Rehearsal(options.data, options.build, options.solution, options.time_limit) as rehearsal:
        report = report_on(rehearsal, list(BY_NAME) if options.scenario == "all" else [options.scenario])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"submissions and logs: {options.build / 'rehearsal'}")
    verdict = conclude(report["scenarios"])
    say(verdict)
    if verdict.startswith("not ready"):
        sys.exit(1)


if __name__ == "__main__":
    run(main)

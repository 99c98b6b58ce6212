"""Rehearse the bundle: run it as Kaggle would, offline, and score its submission.

python local/rehearse.py --data data/fungi-clef-2025
python local/rehearse.py --data DIR --solution DIR/solution.csv --json build/rehearsal.json
"""

import argparse
import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.mounts import InputError, read_weights
from kernel.observations import TestTable, find_test_table, read_table
from kernel.submission import check_submission
from local.competition import find_layout
from local.console import run, say
from local.kaggle_metadata import read_kernel_metadata
from local.metrics import describe, score
from local.sandbox import Outcome, find_isolation, run_isolated
from local.staging import fingerprint, stage_bundle, stage_competition

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ("plain",)
DONE = re.compile(r"^done: .* ([0-9.]+) photos/s$")


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
    find_layout(data)
    metadata, manifest = read_kernel_metadata(ROOT / "kernel-metadata.json"), read_weights(build / "weights").manifest
    if not (build / "kernel.py").is_file():
        raise InputError(f"{build} holds no kernel.py: run python bundle.py runs/NAME first")
    if solution and not solution.is_file():
        raise InputError(f"no solution {solution}: give a CSV of observation and class id")
    limit, out = time_limit or manifest["competition"]["time_limit"], build / "rehearsal" / "plain"
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("submission.csv", "kernel.log"):
        (out / stale).unlink(missing_ok=True)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=build) as temporary:
        stage = Path(temporary).resolve()
        inputs, source, working = stage / "input", stage / "src", stage / "working"
        stage_competition(data, inputs / "competitions" / metadata["competition_sources"][0])
        stage_bundle(build, inputs / "datasets" / metadata["dataset_sources"][0], source)
        working.mkdir()
        before, isolation = fingerprint(inputs), find_isolation(inputs)
        say("network: " + ("cut off by a network namespace" if isolation else "refused by a guard in the interpreter"))
        arguments = ["--input", str(inputs), "--working", str(working), "--time-limit", str(limit)]
        with (out / "kernel.log").open("w", encoding="utf-8") as log:

            def hear(line: str) -> None:
                lines.append(line)
                log.write(line + "\n")
                say(f"  | {line}")

            outcome = run_isolated(source / "script.py", arguments, [inputs, source], working, isolation, limit, hear)
        if (working / "submission.csv").is_file():
            shutil.copyfile(working / "submission.csv", out / "submission.csv")
        table = find_test_table(inputs, manifest)
        reason = what_is_wrong(outcome, lines, out / "submission.csv", table, manifest["class_ids"])
        if not reason and fingerprint(inputs) != before:
            reason = "it changed its inputs"
    speed = next((match for line in reversed(lines) if (match := DONE.match(line))), None)
    scenario = {"name": "plain", "ok": not reason, "seconds": round(outcome.seconds, 2), "reason": reason}
    scores = score_submission(out / "submission.csv", solution, table) if solution and not reason else {}
    return {
        "scenarios": [scenario],
        **scores,
        "photos_per_second": float(speed[1]) if speed else None,
        "peak_memory_mb": round(outcome.peak_memory_mb, 1),
        "network": "namespace" if isolation else "guard",
    }


def what_is_wrong(
    outcome: Outcome, lines: Sequence[str], submission: Path, table: TestTable, class_ids: Sequence[str]
) -> str:
    """Why Kaggle would not score this run, or an empty string."""
    if outcome.timed_out:
        return "killed at the time limit"
    if outcome.code:
        return f"exit code {outcome.code}: {lines[-1] if lines else 'no output'}"
    if not submission.is_file():
        return "it left no submission.csv"
    try:
        check_submission(submission, table, class_ids)
    except InputError as error:
        return str(error)
    return ""


def score_submission(submission: Path, solution: Path, table: TestTable) -> dict[str, float]:
    """Recall@1/5/10 and macro-F1 of a submission, with their intervals.

    Args:
        solution: CSV with the observation's id in the first column and its class id in the second.

    Raises:
        InputError: the solution is of other observations.
    """
    with solution.open(encoding="utf-8-sig", newline="") as file:
        truth = {row[0]: row[1] for row in list(csv.reader(file))[1:]}
    identity, predictions = table.layout.header
    rows = read_table(submission, table.layout.header)
    unknown = [row[identity] for row in rows if row[identity] not in truth]
    if unknown:
        raise InputError(f"{solution} lacks observation {unknown[0]} of the submission: give the matching solution")
    several = table.layout.guesses > 1
    guesses = [row[predictions].split() if several else [row[predictions]] for row in rows]
    return score([truth[row[identity]] for row in rows], guesses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--solution", type=Path, metavar="CSV", help="the test answers, to score against")
    parser.add_argument("--scenario", choices=(*SCENARIOS, "all"), default="plain", help="default: %(default)s")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="default: the competition's own limit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome and the scores there too")
    options = parser.parse_args()
    report = rehearse(options.data, options.build, options.solution, options.time_limit)
    scenario = report["scenarios"][0]
    say(
        f"{scenario['name']}: {'ok' if scenario['ok'] else 'FAILED, ' + scenario['reason']}, {scenario['seconds']} s, "
        f"{report['peak_memory_mb']:.0f} MB at the peak; see {options.build / 'rehearsal' / scenario['name']}"
    )
    if "recall_at_1" in report:
        say(describe(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not scenario["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)

"""Rehearse the bundle: run it as Kaggle would, offline, and score its submission.

python local/rehearse.py --data data/fungi-clef-2025
python local/rehearse.py --data DIR --solution DIR/solution.csv --json build/rehearsal.json
"""

import argparse
import csv
import json
import os
import re
import shutil
import sys
import tempfile
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
from local.sandbox import find_isolation, run_isolated

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ("plain",)
# What of a competition's folder a kernel needs to see; whatever else lies there, such as a solution, stays out.
VISIBLE = {
    "fungiclef": ("metadata/*/*.csv", "*SAMPLE_SUBMISSION*.csv", "images/*/test/**/*"),
    "herbarium": ("*/test/**/*", "sample_submission.csv"),
    "class-folders": ("test/**/*", "sample_submission.csv"),
}
LABELS = ("category_id", "scientificName", "species", "specificEpithet", "genus", "family", "poisonous")
DONE = re.compile(r"^done: .* ([0-9.]+) photos/s$")


def stage_competition(data: Path, folder: Path) -> None:
    """Lay out the competition as Kaggle would mount it, with the test labels absent."""
    layout, marker = find_layout(data)
    for pattern in VISIBLE[layout.name]:
        for source in data.glob(pattern):
            if source.is_file():
                place(source, folder / source.relative_to(data))
    staged = folder / marker.relative_to(data)
    if staged.suffix == ".csv":
        drop_columns(staged, LABELS)


def place(source: Path, target: Path) -> None:
    """Make a file appear elsewhere, without copying it where the file system can do without."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def drop_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Rewrite a CSV file without some columns, if it has any of them."""
    rows = read_table(path, ())
    kept = [name for name in rows[0] if name not in columns] if rows else []
    if rows and len(kept) < len(rows[0]):
        path.unlink()  # it may be a link to the user's own file
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, to tell whether any was touched."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def rehearse(data: Path, build: Path, out: Path, limit: float) -> tuple[dict, dict]:
    """Run the bundle once, in folders like Kaggle's.

    Args:
        out: where submission.csv and kernel.log are left.
        limit: seconds, for the kernel's own budget and for the process.

    Returns:
        The scenario's entry of the JSON report, and the measurements beside it.
    """
    metadata = read_kernel_metadata(ROOT / "kernel-metadata.json")
    if not (build / "kernel.py").is_file():
        raise InputError(f"{build} holds no kernel.py: run python bundle.py runs/NAME first")
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("submission.csv", "kernel.log"):
        (out / stale).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=build) as temporary:
        stage = Path(temporary).resolve()
        inputs, source, working = stage / "input", stage / "src", stage / "working"
        stage_competition(data, inputs / "competitions" / metadata["competition_sources"][0])
        for file in (build / "weights").rglob("*"):
            if file.is_file():
                target = inputs / "datasets" / metadata["dataset_sources"][0] / file.relative_to(build / "weights")
                place(file, target)
        place(build / "kernel.py", source / "script.py")
        working.mkdir()
        before = fingerprint(inputs)
        isolation = find_isolation(inputs)
        say("network: " + ("cut off by a network namespace" if isolation else "refused by a guard in the interpreter"))
        arguments = ["--input", str(inputs), "--working", str(working), "--time-limit", str(limit)]
        with (out / "kernel.log").open("w", encoding="utf-8") as log:
            lines = []

            def hear(line: str) -> None:
                lines.append(line)
                log.write(line + "\n")
                say(f"  | {line}")

            outcome = run_isolated(source / "script.py", arguments, [inputs, source], working, isolation, limit, hear)
        submission = working / "submission.csv"
        reason = ""
        if outcome.timed_out:
            reason = f"killed at the limit of {limit:g} s"
        elif outcome.code:
            reason = f"exit code {outcome.code}: {lines[-1] if lines else 'no output'}"
        elif not submission.is_file():
            reason = "it left no submission.csv"
        elif fingerprint(inputs) != before:
            reason = "it changed its inputs"
        else:
            manifest = read_weights(build / "weights").manifest
            try:
                check_submission(submission, find_test_table(inputs, manifest), manifest["class_ids"])
            except InputError as error:
                reason = str(error)
        if submission.is_file():
            shutil.copyfile(submission, out / "submission.csv")
    speed = next((match for line in reversed(lines) if (match := DONE.match(line))), None)
    scenario = {"name": "plain", "ok": not reason, "seconds": round(outcome.seconds, 2), "reason": reason}
    measured = {
        "photos_per_second": float(speed[1]) if speed else None,
        "peak_memory_mb": round(outcome.peak_memory_mb, 1),
        "network": "namespace" if isolation else "guard",
    }
    return scenario, measured


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
    find_layout(options.data)
    manifest = read_weights(options.build / "weights").manifest
    if options.solution and not options.solution.is_file():
        raise InputError(f"no solution {options.solution}: give a CSV of observation and class id")
    limit = options.time_limit or manifest["competition"]["time_limit"]
    out = options.build / "rehearsal" / "plain"
    scenario, report = rehearse(options.data, options.build, out, limit)
    say(
        f"plain: {'ok' if scenario['ok'] else 'FAILED, ' + scenario['reason']} in {scenario['seconds']} s, "
        f"{report['peak_memory_mb']:.0f} MB at the peak; {out / 'submission.csv'}, {out / 'kernel.log'}"
    )
    if options.solution and scenario["ok"]:
        scores = score_submission(out / "submission.csv", options.solution, find_test_table(options.data, manifest))
        report = {**scores, **report}
        say(describe(scores))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"scenarios": [scenario], **report}, indent=1) + "\n", encoding="utf-8")
    if not scenario["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)

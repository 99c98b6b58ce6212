"""A valid submission first: find the weights and the test table, and write the fallback before anything can fail.

Only the standard library is imported until then.
"""

import argparse
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from kernel.inputs import InputError, escape_control, escape_unprintable, install_wheels, list_folder, prepare_torch
from kernel.manifest import MANIFEST_SHA256, Weights, find_weights, in_tiles
from kernel.observations import TestTable, find_test_table
from kernel.submission import fallback_answer, write_submission
from kernel.tables import describe_left_out
from kernel.budget import Budget

STARTED = time.monotonic()
PACKAGES = ".packages"  # folder of unpacked wheels, in the working folder


@dataclass(frozen=True)
class Setup:
    """What is known once the fallback submission is written.

    Attributes:
        weights: the bundle's, with the views of test photos.
        table: the test observations.
        budget: the time limit, which counts from the start of the process.
        working: the folder of the submission.
        is_rerun: whether Kaggle scores this run on the hidden test set, where nobody sees an error.
    """

    weights: Weights
    table: TestTable
    budget: Budget
    working: Path
    is_rerun: bool


def start() -> Setup:
    """Write the fallback submission, and make everything ready for torch to be imported."""
    escape_unprintable(sys.stdout, sys.stderr)
    prepare_torch()
    options = parse_options()
    is_rerun = "KAGGLE_IS_COMPETITION_RERUN" in os.environ
    handle_errors(options.working, is_rerun, "the fallback submission")
    weights, table = write_fallback(options.input, options.working / "submission.csv")
    limit = options.time_limit or weights.manifest.competition.time_limit
    weights = replace(weights, manifest=in_tiles(weights.manifest, table.competition.grids))
    weights.start_checks()
    setup = Setup(weights, table, Budget(limit, STARTED), options.working, is_rerun)
    install_wheels(weights.wheels(), options.working / PACKAGES)
    return setup


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Predict every observation of the mounted competition's test set.", allow_abbrev=False
    )
    path = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--input", default=Path("/kaggle/input"), help="what is mounted (default %(default)s)", **path)
    parser.add_argument("--working", default=Path("/kaggle/working"), help="for the CSV (default %(default)s)", **path)
    parser.add_argument(
        "--time-limit", type=positive_seconds, metavar="SECONDS", help="default: the competition's own limit"
    )
    return parser.parse_args()


def positive_seconds(text: str) -> float:
    """The value of --time-limit. Raises argparse's error if it is no positive, finite number."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def write_fallback(inputs: Path, submission: Path) -> tuple[Weights, TestTable]:
    """Find the weights and the test table, and write the fallback submission: `fallback_answer` in every row.

    Without weights the sample submission gives the row, so that the scored rerun ends with a valid file all the same.

    Raises:
        InputError: the weights, the competition or the test table are missing or damaged.
    """
    weights, problem = None, None
    try:
        weights = find_weights(inputs)
        print(f"{weights.folder}: manifest {MANIFEST_SHA256 or 'of a run, not of a bundle'}", flush=True)
    except Exception as error:
        problem = error
    try:
        if weights:
            manifest = weights.manifest
            trained = manifest.competition
            table = find_test_table(inputs, trained.name, trained.resolution, trained.settings)
        else:
            table = find_test_table(inputs)
        answer = fallback_answer(table, weights.manifest if weights else None)
        try:
            submission.parent.mkdir(parents=True, exist_ok=True)
            write_submission(submission, table, [answer] * len(table.observations))
        except OSError as error:
            raise InputError(f"{submission} cannot be written ({error}): give another --working") from error
    except Exception as error:
        problem = problem or error
    if problem:
        print(list_folder(inputs), flush=True)
        raise problem
    found = f"{len(table.observations)} observations{describe_left_out(table.left_out)}"
    print(f"{table.folder}: {found}; the fallback submission is written", flush=True)
    return weights, table


def handle_errors(working: Path, is_rerun: bool, submission: str) -> None:
    """From now on, report an uncaught error: a mistake of the user in one line, anything else with its traceback.

    The visible run fails, with exit code 2 for a mistake of the user and 1 otherwise. The scored rerun succeeds: nobody
    would see its traceback, a script that fails is not scored, and a valid submission is on disk.

    Args:
        submission: what is on disk, in words.
    """

    def report(kind: type, error: BaseException, trace: object) -> None:
        if issubclass(kind, InputError):
            print(f"error: {escape_control(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(kind, error, trace)
        sys.stdout.flush()
        remove_packages(working)
        if is_rerun:
            print(f"scored rerun: {submission} will be scored", file=sys.stderr, flush=True)
        os._exit(0 if is_rerun else 2 if issubclass(kind, InputError) else 1)

    sys.excepthook = report


def remove_packages(working: Path) -> None:
    """Remove the unpacked wheels: the files in the working folder become the kernel's output."""
    shutil.rmtree(working / PACKAGES, ignore_errors=True)

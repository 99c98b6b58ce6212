"""The kernel's story: a valid submission first, then a good one."""

import argparse
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kernel.inputs import InputError, escape_unprintable, install_wheels, tree
from kernel.manifest import MANIFEST_SHA256, Weights, find_weights
from kernel.observations import TestTable, find_test_table
from kernel.submission import fallback_guesses, write_submission
from kernel.tables import describe_left_out

STARTED = time.monotonic()
IS_RERUN = "KAGGLE_IS_COMPETITION_RERUN" in os.environ  # Kaggle sets it when it scores the hidden test set


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Predict every observation of the mounted competition's test set.", allow_abbrev=False
    )
    here = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--input", default=Path("/kaggle/input"), help="what is mounted (default %(default)s)", **here)
    parser.add_argument("--working", default=Path("/kaggle/working"), help="for the CSV (default %(default)s)", **here)
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="default: the competition's own limit")
    return parser.parse_args()


def report_failure(packages: Path, stands: str, kind: type, error: BaseException, trace) -> None:
    """The last word on an uncaught error, installed before anything heavy is imported.

    In the visible run it fails loudly. In the scored rerun nobody sees a traceback, a script that fails is not scored,
    and a submission is on disk: so it says what happened and ends well.

    Args:
        packages: the folder of unpacked wheels.
        stands: which submission is on disk, in words.
    """
    if issubclass(kind, InputError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    shutil.rmtree(packages, ignore_errors=True)
    if IS_RERUN:
        print(f"scored rerun: {stands}", file=sys.stderr, flush=True)
    os._exit(0 if IS_RERUN else 2 if issubclass(kind, InputError) else 1)


def open_inputs(options: argparse.Namespace) -> tuple[Weights, TestTable]:
    """Find the weights and the test table, and have the fallback submission on disk before anything can fail."""
    weights, problem = None, None
    try:
        weights = find_weights(options.input)
        print(f"{weights.folder}: manifest {MANIFEST_SHA256 or 'of a run, not of a bundle'}", flush=True)
    except Exception as error:
        problem = error
    try:
        if weights:
            trained = weights.manifest
            table = find_test_table(options.input, trained.competition.name, trained.competition.resolution)
            guesses = fallback_guesses(table, trained.fallback_classes)
        else:
            table = find_test_table(options.input)
            guesses = fallback_guesses(table)
        options.working.mkdir(parents=True, exist_ok=True)
        write_submission(options.working / "submission.csv", table, [guesses] * len(table.observations))
    except Exception as error:
        problem = problem or error
    if problem:
        print(tree(options.input), flush=True)
        raise problem
    found = f"{len(table.observations)} observations{describe_left_out(table.left_out)}"
    print(f"{table.folder}: {found}; the fallback submission is written", flush=True)
    return weights, table


if __name__ == "__main__":
    escape_unprintable(sys.stdout, sys.stderr)
    OPTIONS = parse_options()
    PACKAGES = OPTIONS.working / ".packages"
    sys.excepthook = partial(report_failure, PACKAGES, "the fallback submission stands")
    WEIGHTS, TABLE = open_inputs(OPTIONS)
    install_wheels(WEIGHTS.wheels(), PACKAGES)

# Torch is imported from here on, with a valid submission on disk; timm too, from its wheel where one came along.
import torch

from kernel.encoders import describe_versions, open_encoder, pick_devices
from kernel.budget import Budget
from kernel.photos import UNREADABLE_FILE, UNREADABLE_LIMIT, name_unreadable, write_unreadable
from kernel.embeddings import Embeddings, embed_observations
from kernel.metadata_prior import weighted_prior
from kernel.bank import rank, read_banks


def embed_members(weights: Weights, table: TestTable, budget: Budget) -> list[Embeddings]:
    """Embed the test set with each member, best first, as far as time allows; at least with the first.

    In the scored rerun an error costs what is not embedded yet, and nothing that is.
    """
    members, devices, embedded = weights.manifest.members, pick_devices(), []
    for place, member in enumerate(members):
        name, encoder = member.name, None  # which lets go of the memory of the one before
        try:
            encoder = open_encoder(weights.file(member.encoder.file), member.encoder, devices)
            name += f" on {' and '.join(map(str, encoder.devices))}"
            embeddings = embed_observations(
                encoder,
                table.observations,
                member.views,
                member.pooling,
                budget,
                share=1 / (len(members) - place),
                is_optional=place > 0,
                keeps_going=IS_RERUN,
                name=name,
            )
        except Exception:
            if not (IS_RERUN and embedded):
                raise
            traceback.print_exc()
            print(f"scored rerun: {name} is left out, and what comes after it", flush=True)
            break
        if place and embeddings.late:
            print(f"{name}: no time for it, nor for what comes after it", flush=True)
            break
        embedded.append(embeddings)
        if embeddings.late:
            break
    return embedded


@dataclass(frozen=True)
class Prediction:
    """How the submission came about.

    Attributes:
        embedded: what each member made of the test set.
        fallbacks: observations that kept the fallback.
        seconds: that the embedding took.
    """

    embedded: list[Embeddings]
    fallbacks: int
    seconds: float


def predict(options: argparse.Namespace, weights: Weights, table: TestTable, budget: Budget) -> Prediction:
    """Embed the test set, rank the classes, and replace the fallback submission by the predictions."""
    manifest, opened = weights.manifest, budget.elapsed()
    print(describe_versions(manifest.members), flush=True)
    embedded = embed_members(weights, table, budget)
    seconds = budget.elapsed() - opened

    members = manifest.members[: len(embedded)]
    prior = weighted_prior(weights, members, table.observations)
    ranked = rank(
        [read_banks(weights.file(member.bank)) for member in members],
        [member.weight for member in members],
        [embeddings.values for embeddings in embedded],
        table.competition.guesses,
        prior,
    )
    seen = torch.stack([embeddings.seen for embeddings in embedded]).all(dim=0)
    answered = seen if prior is None else torch.ones_like(seen)  # where the photos say nothing, the metadata may
    fallback, class_ids = fallback_guesses(table, manifest.fallback_classes), manifest.class_ids
    guesses = [
        [class_ids[index] for index in row] if is_answered else fallback
        for row, is_answered in zip(ranked.tolist(), answered.tolist(), strict=True)
    ]
    write_submission(options.working / "submission.csv", table, guesses, class_ids)
    return Prediction(embedded, len(guesses) - int(answered.sum()), seconds)


def summarise(prediction: Prediction, table: TestTable, budget: Budget) -> None:
    """Print what happened, in one line.

    Raises:
        InputError: too many photos could not be read. The predictions are on disk all the same.
    """
    photos = sum(len(observation.photos) for observation in table.observations)
    failures, late = prediction.embedded[0].failures, prediction.embedded[0].late
    named = name_unreadable(prediction.embedded[0].unreadable)
    if named:
        print(f"unreadable: {named}; all in {UNREADABLE_FILE}", flush=True)
    causes = "".join(f", {count} {cause}" for cause, count in failures.most_common())
    views = " + ".join(
        "/".join(str(count) for count in sorted(embeddings.views, reverse=True)) or "0"
        for embeddings in prediction.embedded
    )
    print(
        f"done: {photos} photos ({failures.total()} unreadable{causes}), "
        f"{len(table.observations)} observations ({prediction.fallbacks} on the fallback, {late} too late), "
        f"{views} views, {budget.elapsed():.1f} s, {photos / max(prediction.seconds, 1e-9):.1f} photos/s",
        flush=True,
    )
    if failures.total() > UNREADABLE_LIMIT * photos:
        raise InputError(f"{failures.total()} of {photos} photos cannot be read{causes}, such as {named}: look there")


def has_busy_thread(patience: float = 1.0) -> bool:
    """Whether a thread is still at work after so many seconds, such as one that waits for a disk that hangs."""
    end = time.monotonic() + patience
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(0, end - time.monotonic()))
            if thread.is_alive():
                return True
    return False


if __name__ == "__main__":
    BUDGET = Budget(OPTIONS.time_limit or WEIGHTS.manifest.competition.time_limit, STARTED)
    PREDICTION = predict(OPTIONS, WEIGHTS, TABLE, BUDGET)
    sys.excepthook = partial(report_failure, PACKAGES, "the predictions stand")
    shutil.rmtree(PACKAGES, ignore_errors=True)  # what lies in the working folder becomes the kernel's output
    write_unreadable(PREDICTION.embedded[0].unreadable, OPTIONS.working / UNREADABLE_FILE)
    summarise(PREDICTION, TABLE, BUDGET)
    if has_busy_thread():
        sys.stdout.flush()
        os._exit(0)  # the interpreter would wait for that thread

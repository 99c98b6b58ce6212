"""Weigh the runs of an ensemble by their answers to the observations that were held out from each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from kernel.inputs import InputError
from local.banks.search import compare, worth
from local.base.console import say
from local.base.metrics import FEWEST, gained
from local.base.run_folder import VALIDATION_FILE

STEPS = 20  # weights are multiples of one twentieth


@dataclass(frozen=True)
class Answers:
    """A run's answers to its held-out observations.

    Attributes:
        asked: what they were asked: observations, classes and folds, as JSON.
        log_probabilities: (queries, classes).
        truth: (queries,) index of the true class, -1 where the bank lacks it.
        weights: (queries,), see `shot_weights` and `macro_weights` of `local.banks.folds`.
    """

    asked: str
    log_probabilities: torch.Tensor
    truth: np.ndarray
    weights: np.ndarray


def read_answers(run: Path) -> Answers | None:
    """The answers that training left in a run folder; None where nothing could be held out."""
    path = run / VALIDATION_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return Answers(
                json.dumps(file.metadata(), sort_keys=True),
                file.get_tensor("log_probabilities").float(),
                file.get_tensor("truth").numpy(),
                file.get_tensor("weights").numpy(),
            )
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): train the run again") from error


def weigh(runs: Sequence[Path], guesses: int) -> list[float]:
    """The weight of each run's log-probabilities, summing to 1; 0 for one that does not pay.

    The best run comes first; then, step after step, whichever run the answers gain most by is added once more, as often
    as it takes (Caruana et al. 2004, https://doi.org/10.1145/1015330.1015432). All of that is kept only when it gains
    on the best run alone beyond its 95% interval, so that an ensemble is not bought with luck. Too few observations for
    an interval are no evidence, and the best run stays alone.

    Args:
        guesses: of a row of the submission.
    """
    answers = [read_answers(run) for run in runs]
    if len(runs) == 1 or any(answer is None or answer.asked != answers[0].asked for answer in answers):
        if len(runs) > 1:
            say("the runs were not judged by the same held-out observations: they get equal weights")
        return [1 / len(runs)] * len(runs)
    logs, first = [answer.log_probabilities for answer in answers], answers[0]

    def worth_of(counts: Sequence[int]) -> np.ndarray:
        total = sum(count * log for count, log in zip(counts, logs, strict=True) if count)
        return first.weights * worth(compare(total, first.truth).places, guesses)

    alone = [[int(place == other) for other in range(len(runs))] for place in range(len(runs))]
    best_alone = max(alone, key=lambda counts: worth_of(counts).mean())
    counts = best = best_alone
    for _ in range(STEPS - 1):
        counts = max(
            ([count + more for count, more in zip(counts, one, strict=True)] for one in alone),
            key=lambda candidate: worth_of(candidate).mean(),
        )
        best = max(best, counts, key=lambda candidate: worth_of(candidate).mean())
    gain = gained(worth_of(best), worth_of(best_alone))
    if not gain["low"] > 0:
        best = best_alone
    for run, count in zip(runs, best, strict=True):
        say(f"{run}: weight {count / sum(best):.2f}" + ("" if count else ", it is left out"))
    interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
    if len(first.truth) < FEWEST:
        interval = f"(no evidence: an interval needs {FEWEST} held-out observations, the runs have {len(first.truth)})"
    say(f"the ensemble gains {gain['value']:+.3f} {interval} on its best run")
    return [count / sum(best) for count in best]

"""Weight the runs of an ensemble by their predictions of held-out observations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from kernel.inputs import InputError
from local.banks.search import evaluate_predictions
from local.base.console import progress, say
from local.base.files import write_tensors
from local.base.metrics import MIN_OBSERVATIONS, gained, mean_recall
from local.base.run_folder import VALIDATION_FILE

STEPS = 20  # weights are multiples of one twentieth


@dataclass(frozen=True, eq=False)
class HeldOutPredictions:
    """A run's predictions of its held-out observations, by which an ensemble is weighted and a report is made.

    Where settings were chosen on held-out observations, each is predicted with those that the others chose.

    Attributes:
        observations: the id of each.
        classes: the bank's class ids.
        log_probabilities: (observations, classes).
        truth: (observations,) int, index into `classes`; -1 for a class that the bank lacks.
        weights: (observations,), of mean 1; see `shot_weights` and `macro_weights` of `local.banks.folds`.
        view_votes: see `local.banks.search.Search.view_votes`.
    """

    observations: list[str]
    classes: list[str]
    log_probabilities: torch.Tensor
    truth: np.ndarray
    weights: np.ndarray
    view_votes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))

    def write(self, path: Path) -> None:
        """Write the file that `read_predictions` reads, in half precision."""
        notes = {"observations": json.dumps(self.observations), "classes": json.dumps(self.classes)}
        arrays = {"truth": self.truth, "weights": self.weights, "view_votes": self.view_votes}
        known = {name: torch.tensor(array) for name, array in arrays.items()}
        write_tensors({"log_probabilities": self.log_probabilities.half(), **known}, path, notes)

    def of(self, observations: Sequence[str]) -> "HeldOutPredictions":
        """The predictions of some of the observations, in their order; without the votes of views."""
        row_of = {name: row for row, name in enumerate(self.observations)}
        rows = [row_of[name] for name in observations]
        weights = self.weights[rows] / self.weights[rows].mean()
        return HeldOutPredictions(
            list(observations), self.classes, self.log_probabilities[rows], self.truth[rows], weights
        )


def read_predictions(run: Path) -> HeldOutPredictions | None:
    """The predictions that training saved in a run folder; None if nothing could be held out.

    Raises:
        InputError: the file is damaged.
    """
    path = run / VALIDATION_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            return HeldOutPredictions(
                json.loads(notes["observations"]),
                json.loads(notes["classes"]),
                file.get_tensor("log_probabilities").float(),
                *(file.get_tensor(name).numpy() for name in ("truth", "weights", "view_votes")),
            )
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or of an earlier version ({error}): train the run again") from error


def common_predictions(runs: Sequence[HeldOutPredictions | None]) -> list[HeldOutPredictions]:
    """The predictions of the observations that all runs held out, in one order: that of folds differs by seed.

    A run whose encoder was trained holds out fewer. Empty where the runs have other classes, or too few observations in
    common to say anything about the ensemble.
    """
    if None in runs or any(one.classes != runs[0].classes for one in runs):
        return []
    shared = set.intersection(*(set(one.observations) for one in runs))
    are_few = len(shared) < MIN_OBSERVATIONS and any(len(shared) < len(one.observations) for one in runs)
    return [] if are_few else [one.of([name for name in runs[0].observations if name in shared]) for one in runs]


def ensemble_weights(runs: Sequence[Path], guesses: int) -> list[float]:
    """Weights of the runs' log-probabilities, summing to 1; 0 for a run that does not help.

    Greedy selection (Caruana et al. 2004, https://doi.org/10.1145/1015330.1015432): start with the best run, and in
    each step add the run that helps most, the same one again if it does. The ensemble is used only if its gain over the
    best run is above 0 by its 95% interval. With too few observations for an interval, the best run stays alone.

    Args:
        guesses: in a row of the submission.
    """
    predictions = [read_predictions(run) for run in runs]
    if len(runs) == 1:
        return [1.0]
    predictions = common_predictions(predictions)
    if not predictions:
        say("the runs were not evaluated on the same held-out observations: they get equal weights")
        return [1 / len(runs)] * len(runs)
    logs, first = [one.log_probabilities for one in predictions], predictions[0]

    def recalls(counts: Sequence[int]) -> np.ndarray:
        total = sum(count * log for count, log in zip(counts, logs, strict=True) if count)
        return first.weights * mean_recall(evaluate_predictions(total, first.truth).ranks, guesses)

    single = np.eye(len(runs), dtype=int).tolist()
    best_single = max(single, key=lambda counts: recalls(counts).mean())
    counts = best = best_single
    for _ in progress(range(STEPS - 1), "weighting the runs"):
        counts = max(
            ([count + more for count, more in zip(counts, one, strict=True)] for one in single),
            key=lambda candidate: recalls(candidate).mean(),
        )
        best = max(best, counts, key=lambda candidate: recalls(candidate).mean())
    gain = gained(recalls(best), recalls(best_single))
    if not gain["low"] > 0:
        best = best_single
    for run, count in zip(runs, best, strict=True):
        say(f"{run}: weight {count / sum(best):.2f}" + ("" if count else ", it is left out"))
    interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
    if len(first.truth) < MIN_OBSERVATIONS:
        interval = (
            f"(no evidence: an interval needs {MIN_OBSERVATIONS} held-out observations, the runs have "
            f"{len(first.truth)})"
        )
    say(f"the ensemble gains {gain['value']:+.3f} {interval} over its best run")
    return [count / sum(best) for count in best]

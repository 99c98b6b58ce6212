"""Weight the runs of an ensemble by their predictions of held-out observations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from kernel.inputs import InputError
from local.banks.evaluation import evaluate_predictions
from local.banks.folds import FOLDS
from local.base.console import Progress, progress, say
from local.base.files import write_tensors
from local.base.metrics import LOG_LOSS, MIN_OBSERVATIONS, gained, held_out_scores, objective
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


@dataclass(frozen=True, eq=False)
class Blend:
    """Sums of the log-probabilities of runs, with how often each run counts as the candidates.

    Attributes:
        predictions: of each run, of the same observations and classes.
        guesses: in a row of the submission.
        metric: of the competition; see `local.base.metrics.objective`.
        known: the objective of candidates, which several folds compare.
    """

    predictions: Sequence[HeldOutPredictions]
    guesses: int
    metric: str = ""
    known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    @property
    def single(self) -> list[tuple[int, ...]]:
        """Each run alone."""
        return [tuple(row) for row in np.eye(len(self.predictions), dtype=int).tolist()]

    def log_probabilities(self, counts: Sequence[int]) -> torch.Tensor:
        """(observations, classes) of the runs together, as the kernel combines them."""
        pairs = zip(counts, self.predictions, strict=True)
        total = sum(count * one.log_probabilities for count, one in pairs if count)
        return total.div_(sum(counts)).log_softmax(dim=1)

    def objective(self, counts: tuple[int, ...]) -> np.ndarray:
        """(observations,) the weighted `objective` of each."""
        if counts not in self.known:
            first = self.predictions[0]
            found = evaluate_predictions(self.log_probabilities(counts), first.truth)
            self.known[counts] = first.weights * objective(self.metric, found.hits, found.losses, self.guesses)
        return self.known[counts]

    def choose(self, rows: np.ndarray) -> tuple[tuple[int, ...], dict[str, float]]:
        """The best counts on some of the observations, and their gain over the best run there.

        Args:
            rows: (observations,) bool.
        """

        def mean(counts: tuple[int, ...]) -> float:
            return self.objective(counts)[rows].mean()

        counts = best = best_single = max(self.single, key=mean)
        for _ in range(STEPS - 1):
            counts = max((tuple(np.add(counts, one).tolist()) for one in self.single), key=mean)
            best = max(best, counts, key=mean)
        gain = gained(self.objective(best)[rows], self.objective(best_single)[rows])
        return (best if gain["low"] > 0 else best_single), gain


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Runs with weights.

    Attributes:
        weights: of the runs' log-probabilities, summing to 1; 0 for a run that does not help.
        blend: None where the runs cannot be compared.
    """

    weights: list[float]
    blend: Blend | None = None

    def scores(self, is_macro: bool, seed: int) -> dict[str, float]:
        """The scores of the ensemble on the held-out observations, as `held_out_scores` gives those of a run.

        The same observations choose the weights. So each fifth of them is predicted with the weights that the others
        choose.

        Args:
            is_macro: see `held_out_scores`.
            seed: of the fifths.

        Returns:
            Empty if the runs were not evaluated on the same observations; without macro-F1 if some observations are of
            classes that the bank lacks, since the runs do not say which.
        """
        if self.blend is None:
            return {}
        first, blend = self.blend.predictions[0], self.blend
        part = np.random.default_rng(seed).permutation(len(first.truth)) % FOLDS
        guesses: list[list[str]] = [[]] * len(part)
        losses = np.zeros(len(part)) if blend.metric == LOG_LOSS else None
        for number in progress(range(FOLDS), "evaluating the ensemble", unit="part"):
            counts, _ = blend.choose(part != number)
            rows = np.flatnonzero(part == number)
            found = evaluate_predictions(blend.log_probabilities(counts)[torch.tensor(rows)], first.truth[rows])
            for row, labels in zip(rows, found.top, strict=True):
                guesses[row] = [first.classes[label] for label in labels]
            if losses is not None:
                losses[rows] = found.losses
        truth = [first.classes[label] if label >= 0 else "" for label in first.truth]
        scores = held_out_scores(truth, guesses, first.weights, is_macro, seed, losses)
        if (first.truth < 0).any():
            scores = {name: value for name, value in scores.items() if "macro_f1" not in name}
        return scores


def weigh_runs(runs: Sequence[Path], guesses: int, metric: str = "") -> Ensemble:
    """Weight runs by their predictions of held-out observations.

    Greedy selection (Caruana et al. 2004, https://doi.org/10.1145/1015330.1015432): start with the best run, and in
    each step add the run that helps most, the same one again if it does. The ensemble is used only if its gain over the
    best run is above 0 by its 95% interval. With too few observations for an interval, the best run stays alone.

    Args:
        guesses, metric: of the competition; see `Blend`.
    """
    predictions = [read_predictions(run) for run in runs]
    if len(runs) == 1:
        return Ensemble([1.0])
    predictions = common_predictions(predictions)
    if not predictions:
        say("the runs were not evaluated on the same held-out observations: they get equal weights")
        return Ensemble([1 / len(runs)] * len(runs))
    blend, count = Blend(predictions, guesses, metric), len(predictions[0].truth)
    with Progress("weighting the runs"):
        best, gain = blend.choose(np.ones(count, dtype=bool))
    for run, times in zip(runs, best, strict=True):
        say(f"{run}: weight {times / sum(best):.2f}" + ("" if times else ", it is left out"))
    interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
    if count < MIN_OBSERVATIONS:
        interval = f"(no evidence: an interval needs {MIN_OBSERVATIONS} held-out observations, the runs have {count})"
    if max(best) < sum(best):
        say(f"the ensemble gains {gain['value']:+.3f} {interval} over its best run")
    elif gain["value"] > 0:
        say(f"the best run stays alone: an ensemble would gain {gain['value']:+.3f} {interval} over it")
    else:
        say("the best run stays alone: no ensemble of these runs is better")
    return Ensemble([times / sum(best) for times in best], blend)

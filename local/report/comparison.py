"""Compare a run with other runs, and with what the leaderboard can show of the difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm

from kernel.inputs import InputError
from kernel.observations import find_test_table
from local.banks.search import evaluate_predictions
from local.base.metrics import MIN_OBSERVATIONS
from local.data.observations import encode_labels, sort_ids
from local.report.evidence import Evidence, evaluate_answers, read_run_answers
from local.report.scores import (
    RECALLS,
    Estimate,
    Scores,
    gain_in,
    resampled_f1,
    score_answers,
    score_gains,
    value_of,
)


@dataclass(frozen=True)
class Comparison:
    """Another run on the observations that both runs held out.

    Attributes:
        is_evidence: whether there are enough observations for an interval.
        scores: the other run's.
        gain: this run's scores minus the other's, paired by observation.
        ensemble_gain: by metric, the score of both runs together minus that of the better one.
    """

    run: str
    path: str
    observations: int
    is_evidence: bool
    scores: Scores
    gain: Scores
    ensemble_gain: dict[str, Estimate]


@dataclass(frozen=True)
class Board:
    """One part of the leaderboard.

    Attributes:
        half_width: of the 95% interval of the score, as far as the draw of the test observations decides it.
        expected: the score that the held-out observations predict, with the interval of both samples.
        wrong_order: by run, the probability that the better of it and this run has the lower score on this part.
    """

    part: str
    observations: int
    half_width: float
    expected: Estimate
    wrong_order: dict[str, float]


@dataclass(frozen=True)
class Leaderboard:
    """The parts of the leaderboard, and the metric that it is ordered by."""

    metric: str
    boards: list[Board]


def compare_with(evidence: Evidence, other: Path) -> Comparison:
    """Compare with another run on the observations that both held out, unweighted.

    Raises:
        InputError: there are no such observations.
    """
    truth, own, others = common_answers(evidence, other)
    new, old = evaluate_answers(own, truth), evaluate_answers(others, truth)
    both = evaluate_predictions(torch.tensor(own + others), truth)
    metric = evidence.labelled.competition.metric
    better = max(new, old, key=lambda outcome: value_of(metric, truth, outcome))
    return Comparison(
        run=other.name,
        path=str(other),
        observations=len(truth),
        is_evidence=len(truth) >= MIN_OBSERVATIONS,
        scores=score_answers(truth, others),
        gain=score_gains(truth, new, old),
        ensemble_gain={name: gain_in(name, truth, both, better) for name in (*RECALLS, "macro_f1")},
    )


def common_answers(evidence: Evidence, other: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The true labels of the observations that both runs held out, and both runs' log-probabilities.

    Returns:
        (queries,) labels, and twice (queries, classes): the classes of the evidence, then those that only the other
        run has; minus infinity for a class that a run lacks.

    Raises:
        InputError: there are no such observations.
    """
    answers = read_run_answers(other)
    ids, bank = answers.observations, answers.classes
    row_of = {name: row for row, name in enumerate(ids)}
    rows = np.array([row for row, query in enumerate(evidence.queries) if query.id in row_of], dtype=int)
    if not len(rows):
        raise InputError(
            f"{other} and {evidence.run} have no held-out observation in common: compare runs of the same --data"
        )
    other_rows = np.array([row_of[evidence.queries[row].id] for row in rows])
    classes = [*evidence.classes, *sort_ids(set(bank) - set(evidence.classes))]
    own = np.full((len(rows), len(classes)), -np.inf, dtype=np.float32)
    others = own.copy()
    own[:, : len(evidence.classes)] = evidence.log_probabilities[rows]
    others[:, encode_labels(bank, classes)] = answers.log_probabilities.numpy()[other_rows]
    return evidence.truth[rows], own, others


def predict_leaderboard(evidence: Evidence, others: Sequence[Comparison], expected: float | None = None) -> Leaderboard:
    """What each part of the leaderboard will show, if the test set is as hard as the held-out observations.

    Args:
        expected: the score that the held-out observations predict; None is that of all of them, unweighted.
    """
    competition, outcome = evidence.labelled.competition, evidence.outcome
    value = value_of(competition.metric, evidence.truth, outcome) if expected is None else expected
    own_noise, boards = sampling_noise(evidence, competition.metric, len(evidence.queries)), []
    for part, observations in competition.boards(count_test_observations(evidence)).items():
        if observations:
            noise = sampling_noise(evidence, competition.metric, observations)
            width = float(np.hypot(noise, own_noise))
            interval = Estimate(value, max(0.0, value - width), min(1.0, value + width))
            orders = {other.run: wrong_order(other, competition.metric, observations) for other in others}
            boards.append(Board(part, observations, noise, interval, orders))
    return Leaderboard(competition.metric, boards)


def count_test_observations(evidence: Evidence) -> int:
    """The size of the test set; 0 for a folder without one."""
    labelled, trained = evidence.labelled, evidence.manifest.competition
    try:
        return len(find_test_table(labelled.folder, trained.name, labelled.resolution).observations)
    except InputError:
        return 0


def sampling_noise(evidence: Evidence, metric: str, observations: int) -> float:
    """Half of the 95% interval of a metric over so many observations like the held-out ones.

    A recall is a proportion. Macro-F1 is not: it is measured on bootstrap samples of that size.
    """
    if metric == "macro_f1":
        drawn = resampled_f1("macro", evidence.truth, evidence.guesses, observations)
        return float(np.subtract(*np.percentile(drawn, [97.5, 2.5])) / 2)
    recall = value_of(metric, evidence.truth, evidence.outcome)
    return float(1.96 * np.sqrt(recall * (1 - recall) / observations))


def wrong_order(other: Comparison, metric: str, observations: int) -> float:
    """The probability that so many observations show the better of two runs as the worse one."""
    gain = getattr(other.gain, metric)
    deviation = (gain.high - gain.low) / (2 * 1.96) * np.sqrt(other.observations / observations)
    if not other.is_evidence or not (deviation or gain.value):
        return 0.5  # it is not known which of them is better
    return float(norm.cdf(-abs(gain.value) / deviation)) if deviation else 0.0

"""Scores of held-out observations with 95% intervals; other runs; what the leaderboard can show of the difference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import norm
from sklearn.metrics import f1_score

from kernel.inputs import InputError
from kernel.observations import find_test_table
from local.banks.ensemble import read_predictions
from local.banks.evaluation import Evaluation, evaluate_predictions
from local.base import metrics
from local.base.metrics import GUESSES, LOG_LOSS, METRIC_NAMES, RESAMPLES, SCORE_NAMES
from local.data.observations import encode_labels, sort_ids
from local.report.evidence import Evidence, evaluate_answers

RECALLS = {f"recall_at_{count}": count for count in GUESSES}
CELLS = 20_000_000  # drawn counts in memory at once


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


# By the names of SCORE_NAMES. The log-loss is None if no observation is of a class of the bank.
Scores = dict[str, Estimate | None]


@dataclass(frozen=True)
class Comparison:
    """Another run on the observations that both runs held out.

    Attributes:
        is_evidence: whether there are enough observations for an interval.
        scores: the other run's.
        gain: this run's scores minus the other's, paired by observation.
        ensemble_gain: by metric, by how much both runs together are better than the better one.
    """

    run: str
    path: str
    observations: int
    is_evidence: bool
    scores: Scores
    gain: Scores
    ensemble_gain: Scores


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
class GroupRecalls:
    name: str
    observations: int
    recall_at_1: Estimate
    recall_at_5: Estimate
    recall_at_10: Estimate


def score_headline(evidence: Evidence) -> Scores:
    """All scores of a run, weighted; those that training printed are the same numbers, with the same intervals."""
    computed = score_answers(evidence.truth, evidence.outcome, evidence.classes, evidence.weights, evidence.is_macro)
    printed = evidence.manifest.members[0].validation
    return computed | {name: Estimate(**metrics.interval_of(printed, name)) for name in SCORE_NAMES if name in printed}


def score_answers(
    truth: np.ndarray,
    outcome: Evaluation,
    classes: Sequence[str],
    weights: np.ndarray | None = None,
    is_macro: bool = False,
) -> Scores:
    """All scores of a run.

    Args:
        classes: the class ids, in whose order training too resamples them.
        weights, is_macro: those of `held_out_scores`.
    """
    top, ids = outcome.top, np.array(classes)
    own = ids[truth], ids[top]
    scores = metrics.score(*own) if weights is None else metrics.held_out_scores(*own, weights, is_macro)
    return {name: Estimate(**metrics.interval_of(scores, name)) for name in METRIC_NAMES} | {
        "weighted_f1": estimate(*weighted_f1(truth, top[:, 0], weights)),
        "log_loss": mean_loss(outcome.losses, weights),
    }


def score_gains(
    truth: np.ndarray, new: Evaluation, old: Evaluation, weights: np.ndarray | None = None, is_macro: bool = False
) -> Scores:
    """The scores of `new` minus those of `old`, paired by observation, weighted as by `score_answers`."""
    (value, resampled), (old_value, old_resampled) = (weighted_f1(truth, one.top[:, 0], weights) for one in (new, old))
    return {metric: gain_in(metric, truth, new, old, weights, is_macro) for metric in METRIC_NAMES} | {
        "weighted_f1": estimate(value - old_value, resampled - old_resampled),
        "log_loss": mean_loss(new.losses - old.losses, weights),
    }


def gain_in(
    metric: str,
    truth: np.ndarray,
    new: Evaluation,
    old: Evaluation,
    weights: np.ndarray | None = None,
    is_macro: bool = False,
) -> Estimate:
    """How much better `new` is than `old` by a metric of a competition, paired by observation."""
    if metric == LOG_LOSS:
        return mean(metrics.cap_losses(old.losses) - metrics.cap_losses(new.losses), weights)
    if metric == "macro_f1":
        weights = None if is_macro else weights
        return Estimate(**metrics.macro_f1_gain(truth, new.top[:, 0], old.top[:, 0], weights))
    return mean((new.ranks < RECALLS[metric]).astype(float) - (old.ranks < RECALLS[metric]), weights)


def value_of(metric: str, truth: np.ndarray, outcome: Evaluation, weights: np.ndarray | None = None) -> float:
    """A metric of a competition, the more the better: minus a log-loss, a recall, or macro-F1 of the first guesses."""
    if metric == LOG_LOSS:
        return -float(np.average(metrics.cap_losses(outcome.losses), weights=weights))
    if metric == "macro_f1":
        return metrics.macro_f1(truth, outcome.top[:, 0], weights)
    return float(np.average(outcome.ranks < RECALLS[metric], weights=weights))


def recalls_by(ranks: np.ndarray, groups: Sequence[str | None], order: Sequence[str]) -> list[GroupRecalls]:
    """The recalls of each group of observations, in order; groups without observations are left out.

    Args:
        ranks: (observations,) of the true class.
        groups: (observations,) the name of the group of each; None is in no group.
    """
    groups = np.array(groups, dtype=object)
    grouped = [(name, ranks[groups == name]) for name in order]
    return [
        GroupRecalls(name, len(own), *(mean(own < count) for count in GUESSES)) for name, own in grouped if len(own)
    ]


def compare_with(evidence: Evidence, other: Path) -> Comparison:
    """Compare with another run on the observations that both held out, weighted as this run's headline is.

    Raises:
        InputError: there are no such observations.
    """
    rows, classes, own, others = common_answers(evidence, other)
    truth, weights, is_macro = evidence.truth[rows], evidence.weights[rows], evidence.is_macro
    weights = weights if weights.any() else np.ones(len(rows))
    new, old = evaluate_answers(own, truth), evaluate_answers(others, truth)
    both = evaluate_predictions(torch.tensor((own + others) / 2).log_softmax(dim=1), truth)
    metric = evidence.metric
    own_weights = None if is_macro and metric == "macro_f1" else weights
    better = max(new, old, key=lambda outcome: value_of(metric, truth, outcome, own_weights))
    return Comparison(
        run=other.name,
        path=str(other),
        observations=len(truth),
        is_evidence=len(truth) >= metrics.MIN_OBSERVATIONS,
        scores=score_answers(truth, old, classes, weights, is_macro),
        gain=score_gains(truth, new, old, weights, is_macro),
        ensemble_gain={name: gain_in(name, truth, both, better, weights, is_macro) for name in {*METRIC_NAMES, metric}},
    )


def common_answers(evidence: Evidence, other: Path) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Which queries the other run held out too, and both runs' log-probabilities of them.

    Returns:
        Indices of queries; ids of the classes of the evidence, then of those that only the other run has; and twice
        (these queries, classes), minus infinity for a class that a run lacks.
    """
    answers = read_predictions(other)
    bank = answers.classes
    other_rows = encode_labels([query.id for query in evidence.queries], answers.observations)
    rows = np.flatnonzero(other_rows >= 0)
    if not len(rows):
        raise InputError(
            f"{other} and {evidence.run} have no held-out observation in common: compare runs of the same --data"
        )
    classes = [*evidence.classes, *sort_ids(set(bank) - set(evidence.classes))]
    own = np.full((len(rows), len(classes)), -np.inf, dtype=np.float32)
    others = own.copy()
    own[:, : len(evidence.classes)] = evidence.log_probabilities[rows]
    others[:, encode_labels(bank, classes)] = answers.log_probabilities.numpy()[other_rows[rows]]
    return rows, classes, own, others


def predict_leaderboard(evidence: Evidence, others: Sequence[Comparison], value: float) -> list[Board]:
    """What each part of the leaderboard will show, if the test set is as hard as the held-out observations.

    Args:
        value: the score that the held-out observations predict.
    """
    competition, boards = evidence.labelled.competition, []
    if competition.form.is_set:
        return []  # it scores photos of several classes, and a held-out observation has one
    own_noise = sampling_noise(evidence, competition.metric, len(evidence.queries))
    for part, observations in competition.boards(count_test_observations(evidence)).items():
        if observations:
            noise = sampling_noise(evidence, competition.metric, observations)
            width = float(np.hypot(noise, own_noise))
            most = np.inf if competition.metric == LOG_LOSS else 1.0
            interval = Estimate(value, max(0.0, value - width), min(most, value + width))
            orders = {other.run: wrong_order(other, competition.metric, observations) for other in others}
            boards.append(Board(part, observations, noise, interval, orders))
    return boards


def count_test_observations(evidence: Evidence) -> int:
    """The size of the test set; 0 for a folder without one."""
    labelled, trained = evidence.labelled, evidence.manifest.competition
    try:
        table = find_test_table(labelled.folder, trained.name, labelled.resolution, trained.settings)
        return len(table.observations)
    except InputError:
        return 0


def sampling_noise(evidence: Evidence, metric: str, observations: int) -> float:
    """Half of the 95% interval of a metric over so many observations like the held-out ones.

    A log-loss is a mean, and a recall a proportion. Macro-F1 is neither: it is measured on bootstrap samples of that
    size.
    """
    if metric == LOG_LOSS:
        return float(1.96 * metrics.cap_losses(evidence.outcome.losses).std() / np.sqrt(observations))
    if metric == "macro_f1":
        drawn = resampled_f1("macro", evidence.truth, evidence.guesses, observations)
        return float(np.subtract(*np.percentile(drawn, [97.5, 2.5])) / 2)
    recall = value_of(metric, evidence.truth, evidence.outcome)
    return float(1.96 * np.sqrt(recall * (1 - recall) / observations))


def wrong_order(other: Comparison, metric: str, observations: int) -> float:
    """The probability that so many observations show the better of two runs as the worse one."""
    gain = other.gain[metric]
    deviation = (gain.high - gain.low) / (2 * 1.96) * np.sqrt(other.observations / observations)
    if not other.is_evidence or not (deviation or gain.value):
        return 0.5  # it is not known which of them is better
    return float(norm.cdf(-abs(gain.value) / deviation)) if deviation else 0.0


def mean(sample: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    return Estimate(**metrics.bounded(sample.astype(float), weights=weights))


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """A value with the interval of its values on resampled observations."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def mean_loss(losses: np.ndarray, weights: np.ndarray | None = None) -> Estimate | None:
    """The mean log-loss over the observations whose class is in the bank; None if there are none."""
    weights = np.ones(len(losses)) if weights is None else weights
    known = ~np.isnan(losses) & (weights > 0)
    return mean(losses[known], weights[known]) if known.any() else None


def weighted_f1(truth: np.ndarray, guesses: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """F1 averaged over classes by the number of their observations, and the same for RESAMPLES bootstrap samples."""
    weights = np.ones(len(truth), np.float32) if weights is None else weights.astype(np.float32)
    truth, guesses, weights = (values[weights > 0] for values in (truth, guesses, weights))
    value = f1_score(truth, guesses, average="weighted", sample_weight=weights, zero_division=0)
    return float(value), resampled_f1("weighted", truth, guesses, len(truth), weights)


def resampled_f1(
    average: str, truth: np.ndarray, guesses: np.ndarray, size: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """(RESAMPLES,) F1 scores, each of `size` observations drawn with replacement.

    The same as `sklearn.metrics.f1_score` of each sample, which would take a minute for 2,000 samples.

    Args:
        average: "weighted" or "macro", over the classes among the drawn truths and guesses; as in scikit-learn.
        weights: (observations,); None gives all the same weight.
    """
    labels, encoded = np.unique(np.concatenate([truth, guesses]), return_inverse=True)
    true, guessed = encoded[: len(truth)], encoded[len(truth) :]
    shape, rows = (len(truth), len(labels)), np.arange(len(truth))
    true_of, guessed_of = (csr_array((np.ones(len(rows), np.float32), (rows, one)), shape) for one in (true, guessed))
    hits_of = csr_array(((true == guessed).astype(np.float32), (rows, true)), shape)
    scores = []
    for counts in bootstrap_counts(len(truth), size):
        counts = counts if weights is None else counts * weights
        support, predicted, hits = (counts @ matrix for matrix in (true_of, guessed_of, hits_of))
        total = support + predicted
        class_weights = support if average == "weighted" else (total > 0).astype(np.float32)
        f1 = 2 * hits / np.where(total > 0, total, 1)
        scores.append((f1 * class_weights).sum(axis=1) / class_weights.sum(axis=1))
    return np.concatenate(scores)


def bootstrap_counts(count: int, size: int) -> Iterator[np.ndarray]:
    """How often each of `count` observations is drawn in a bootstrap sample of `size` observations.

    Yields (samples, count) float32, RESAMPLES samples in all, in parts that fit into memory.
    """
    rng, left = np.random.default_rng(0), RESAMPLES
    while left:
        part = min(left, max(1, CELLS // count))
        yield rng.multinomial(size, np.full(count, 1 / count), part).astype(np.float32)
        left -= part

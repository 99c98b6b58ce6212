"""Scores of held-out observations, each with its 95% interval."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from sklearn.metrics import f1_score

from local.banks.search import Evaluation
from local.base.metrics import GUESSES, RESAMPLES, bounded, held_out_scores, interval_of, macro_f1_gain, score
from local.report.evidence import evaluate_answers

RECALLS = {f"recall_at_{count}": count for count in GUESSES}
METRIC_NAMES = {name: f"Recall@{count}" for name, count in RECALLS.items()} | {"macro_f1": "macro-F1"}
SCORE_NAMES = METRIC_NAMES | {"weighted_f1": "weighted F1", "log_loss": "log-loss"}
CELLS = 20_000_000  # drawn counts in memory at once


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The scores of a run, or the differences between the scores of two runs."""

    recall_at_1: Estimate
    recall_at_5: Estimate
    recall_at_10: Estimate
    macro_f1: Estimate
    weighted_f1: Estimate
    log_loss: Estimate | None  # over the observations whose class is in the bank; None if there are none


def score_answers(
    truth: np.ndarray, log_probabilities: np.ndarray, weights: np.ndarray | None = None, is_macro: bool = False
) -> Scores:
    """The scores of (queries, classes) log-probabilities; `weights` and `is_macro` are those of `held_out_scores`."""
    outcome = evaluate_answers(log_probabilities, truth)
    scores = score(truth, outcome.top) if weights is None else held_out_scores(truth, outcome.top, weights, is_macro)
    values = {name: Estimate(**interval_of(scores, name)) for name in (*RECALLS, "macro_f1")}
    value, resampled = weighted_f1(truth, outcome.top[:, 0], weights)
    return Scores(**values, weighted_f1=estimate(value, resampled), log_loss=mean_loss(outcome.losses, weights))


def score_gains(truth: np.ndarray, new: Evaluation, old: Evaluation) -> Scores:
    """The scores of `new` minus those of `old`, paired by observation."""
    gains = {metric: gain_in(metric, truth, new, old) for metric in (*RECALLS, "macro_f1")}
    (value, resampled), (old_value, old_resampled) = (weighted_f1(truth, one.top[:, 0]) for one in (new, old))
    difference = estimate(value - old_value, resampled - old_resampled)
    return Scores(**gains, weighted_f1=difference, log_loss=mean_loss(new.losses - old.losses))


def gain_in(metric: str, truth: np.ndarray, new: Evaluation, old: Evaluation) -> Estimate:
    """How much better `new` is than `old` by a metric of a competition, paired by observation."""
    if metric == "macro_f1":
        return Estimate(**macro_f1_gain(truth, new.top[:, 0], old.top[:, 0]))
    return mean((new.ranks < RECALLS[metric]).astype(float) - (old.ranks < RECALLS[metric]))


def value_of(metric: str, truth: np.ndarray, outcome: Evaluation) -> float:
    """A metric of a competition: a recall, or the macro-F1 of the first guesses."""
    if metric == "macro_f1":
        return float(f1_score(truth, outcome.top[:, 0], average="macro", zero_division=0))
    return float((outcome.ranks < RECALLS[metric]).mean())


def mean(sample: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """A mean with its bootstrap interval."""
    return Estimate(**bounded(sample.astype(float), weights=weights))


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
    """F1 averaged over classes by the number of their observations, and the same for RESAMPLES bootstrap samples.

    Args:
        weights: (observations,); None gives all the same weight.
    """
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

"""Scores over observations, each with a 95% interval."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score

GUESSES = (1, 5, 10)
RESAMPLES = 2000


def score(truth: Sequence[str], guesses: Sequence[Sequence[str]], seed: int = 0) -> dict[str, float]:
    """Recall@1/5/10 and macro-F1, each with the bounds `_low` and `_high` of its 95% interval.

    Recalls are bootstrapped over observations. Macro-F1 is the mean of an F1 per class, so its classes are resampled:
    resampling observations loses classes and is biased low.

    Args:
        truth: the class id of each observation.
        guesses: class ids, best first, of each observation.
    """
    hits = hit_matrix(truth, guesses)
    per_class = f1_score(list(truth), [row[0] for row in guesses], average=None, zero_division=0)
    values = {f"recall_at_{count}": hits[:, index] for index, count in enumerate(GUESSES)} | {"macro_f1": per_class}
    scores = {}
    for name, sample in values.items():
        low, high = interval(sample, seed)
        scores |= {name: float(np.mean(sample)), f"{name}_low": low, f"{name}_high": high}
    return scores


def hit_matrix(truth: Sequence[str], guesses: Sequence[Sequence[str]]) -> np.ndarray:
    """(observations, len(GUESSES)) float: whether the true class is among the first 1, 5, 10 guesses."""
    rows = [[answer in row[:count] for count in GUESSES] for answer, row in zip(truth, guesses, strict=True)]
    return np.array(rows, dtype=float).reshape(-1, len(GUESSES))


def interval(sample: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean (percentiles; Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(sample, len(sample)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bounded(sample: np.ndarray, seed: int = 0) -> dict[str, float]:
    """A mean with its 95% interval: `value`, `low`, `high`."""
    low, high = interval(sample, seed)
    return {"value": float(np.mean(sample)), "low": low, "high": high}


def paired_gain(new: np.ndarray, old: np.ndarray) -> tuple[float, float]:
    """The mean difference between two methods on the same observations, and its standard error."""
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def gained(new: np.ndarray, old: np.ndarray) -> dict[str, float]:
    """The mean difference of `paired_gain` with its 95% interval (normal approximation): `value`, `low`, `high`."""
    gain, error = paired_gain(new, old)
    return {"value": gain, "low": gain - 1.96 * error, "high": gain + 1.96 * error}


def interval_of(scores: dict[str, float], name: str) -> dict[str, float]:
    """One of the scores of `score`: `value`, `low`, `high`."""
    return {"value": scores[name], "low": scores[f"{name}_low"], "high": scores[f"{name}_high"]}


def describe(scores: dict[str, float], guesses: int = max(GUESSES)) -> str:
    """One line: `Recall@1 .432 [.401, .463]  Recall@5 ...`.

    Args:
        guesses: in a row of what was scored; recalls at more than these would only repeat themselves.
    """
    counts = [count for count in GUESSES if count <= guesses]
    names = {f"recall_at_{count}": f"Recall@{count}" for count in counts} | {"macro_f1": "macro-F1"}
    return "  ".join(
        f"{label} {scores[name]:.3f} [{scores[name + '_low']:.3f}, {scores[name + '_high']:.3f}]"
        for name, label in names.items()
    )

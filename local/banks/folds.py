"""Split observations into those that are learnt from and those that judge; no observation is both."""

import numpy as np

FOLDS = 5
SCORES = 50_000_000  # of queries and classes at most; the queries are drawn where there would be more


def make_folds(classes: np.ndarray, seed: int, asked: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observation-disjoint folds, a class's observations spread over as many of them as it has.

    A class of one observation is always part of the reference: nothing can be asked of it, but it makes the other
    classes' queries as hard as they will be. What it is like to be asked for a class of one observation is told by the
    classes of two, and `shot_weights` gives these the part of both.

    Args:
        classes: (observations,) index of the class of each.
        asked: (observations,) bool, which may be queries; None for all.

    Returns:
        (reference, queries), each (observations,) bool, per fold.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(classes), -1)
    for index in rng.permutation(np.unique(classes)):
        own = rng.permutation(np.flatnonzero(classes == index if asked is None else (classes == index) & asked))
        if len(own) and (classes == index).sum() > 1:
            fold[own] = (np.arange(len(own)) + rng.integers(FOLDS)) % FOLDS
    limit = max(FOLDS, SCORES // (classes.max() + 1))
    left = rng.permutation(np.flatnonzero(fold >= 0))[:limit]
    chosen = np.isin(np.arange(len(fold)), left)
    return [(fold != number, chosen & (fold == number)) for number in range(FOLDS) if (chosen & (fold == number)).any()]


def shot_weights(shots: np.ndarray, classes: np.ndarray, most: int = 4) -> np.ndarray:
    """Weights of queries, of mean 1, that give each number of shots the part that it has in the whole reference.

    Equal ones where no query has a number of shots that is in the whole, as when all classes are of one size.

    Args:
        shots: (queries,) observations of the query's class in its fold's reference.
        classes: (observations,) class of each observation of the whole reference.
    """
    sizes = np.minimum(np.bincount(classes)[classes], most)
    shots = np.clip(shots, 1, most)
    wanted, found = np.bincount(sizes, minlength=most + 1), np.bincount(shots, minlength=most + 1)
    weights = (wanted / np.maximum(found, 1))[shots]
    return weights / weights.mean() if weights.any() else np.ones(len(shots))


def macro_weights(truth: np.ndarray) -> np.ndarray:
    """Weights of queries, of mean 1, that give every class the same part; `truth` is (queries,), the class of each."""
    _, places, sizes = np.unique(truth, return_inverse=True, return_counts=True)
    weights = 1 / sizes[places]
    return weights / weights.mean()

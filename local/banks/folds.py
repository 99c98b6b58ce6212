"""Hold out observations, and weight them: no observation is both in a reference set and a query of it."""

from collections.abc import Sequence

import numpy as np

FOLDS = 5
MAX_SHOTS = 4  # so many shots or more are one number
MAX_SCORES = 50_000_000  # queries times classes of a search, and of the predictions that a run keeps
MAX_FINAL_SCORES = 30_000_000_000  # queries times prototypes of the final evaluation: a quarter of an hour on one core


def make_folds(
    labels: np.ndarray, seed: int, query_mask: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds of observations, with the observations of a class spread over as many folds as possible.

    The only observation of a class is in every reference set and never a query, but it makes the queries of other
    classes as hard as they will be. Queries of classes with two observations represent such classes; `shot_weights`
    weights them accordingly.

    Args:
        labels: (observations,) index of the class of each.
        query_mask: (observations,) bool, which may be queries; None: all.

    Returns:
        Of each fold the reference set and the queries, both (observations,) bool.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(labels), -1)
    distinct, sizes = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    for index in rng.permutation(len(distinct)):
        own = members[index]
        queries = rng.permutation(own if query_mask is None else own[query_mask[own]])
        if len(queries) and len(own) > 1:
            fold[queries] = (np.arange(len(queries)) + rng.integers(FOLDS)) % FOLDS
    return [(fold != number, fold == number) for number in range(FOLDS) if (fold == number).any()]


def draw_queries(
    folds: Sequence[tuple[np.ndarray, np.ndarray]], limit: int, seed: int
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """The first folds, with at most `limit` queries in all; those of a lower limit are among those of a higher.

    Queries of as few folds as possible, because every fold costs a fit. Those of the last one are drawn at random.
    """
    rng, left, drawn = np.random.default_rng(seed), max(FOLDS, limit), []
    if sum(int(queries.sum()) for _, queries in folds) <= left:
        return folds
    for reference, queries in folds:
        own = np.zeros_like(queries)
        own[rng.permutation(np.flatnonzero(queries))[:left]] = True
        drawn.append((reference, own))
        left -= int(own.sum())
        if not left:
            break
    return drawn


def shot_weights(shots: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of queries, with mean 1: each number of shots counts as much as in the whole reference set.

    A query of few shots thus represents the classes of few observations. All weights are equal if no query has a number
    of shots that occurs in the whole reference set, as when all classes have the same size.

    Args:
        shots: (queries,) observations of the query's class in the reference set of its fold.
        labels: (observations,) class of each observation of the whole reference set.
    """
    sizes = np.minimum(np.bincount(labels)[labels], MAX_SHOTS)
    shots = np.clip(shots, 1, MAX_SHOTS)
    target, found = np.bincount(sizes, minlength=MAX_SHOTS + 1), np.bincount(shots, minlength=MAX_SHOTS + 1)
    weights = (target / np.maximum(found, 1))[shots]
    return weights / weights.mean() if weights.any() else np.ones(len(shots))


def macro_weights(truth: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Weights of queries, with mean 1: all classes count the same.

    Args:
        truth: (queries,) class of each.
        held_out: (held-out observations,) class of each, from which the queries were drawn. A query of a rare class
            thus represents those that were not drawn, and classes of which none was drawn.
    """
    classes, sizes = np.unique(held_out, return_counts=True)
    weights = 1 / sizes[np.searchsorted(classes, truth)]
    return weights / weights.mean()

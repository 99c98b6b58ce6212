"""Scores over observations, each with a 95% interval."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

GUESSES = (1, 5, 10)
METRIC_NAMES = {f"recall_at_{count}": f"Recall@{count}" for count in GUESSES} | {"macro_f1": "macro-F1"}
LOG_LOSS = "log_loss"  # the only score of which less is better
SCORE_NAMES = METRIC_NAMES | {"weighted_f1": "weighted F1", LOG_LOSS: "log-loss"}
WORST_LOSS = -math.log(1e-15)  # Kaggle raises smaller probabilities to this
RESAMPLES = 2000
MIN_OBSERVATIONS = 6  # for the 95% interval of a gain: fewer can all agree by chance more than once in 20 times


def headline_names(metric: str) -> dict[str, str]:
    """The scores that are always shown, with their labels; the log-loss first, where it is the competition's metric."""
    return ({LOG_LOSS: SCORE_NAMES[LOG_LOSS]} if metric == LOG_LOSS else {}) | METRIC_NAMES


def score(
    truth: Sequence[str],
    guesses: Sequence[Sequence[str]],
    seed: int = 0,
    weights: np.ndarray | None = None,
    losses: np.ndarray | None = None,
) -> dict[str, float]:
    """Recall@1/5/10 and macro-F1, each with the bounds `_low` and `_high` of its 95% interval; also the log-loss.

    Recalls and the log-loss are bootstrapped over observations. Macro-F1 is the mean of an F1 per class, so its classes
    are resampled: resampling observations would lose classes and be biased low.

    Args:
        truth: the class id of each observation.
        guesses: class ids, best first, of each observation.
        weights: (observations,), not negative: recalls are weighted means, and F1 is scikit-learn's with
            `sample_weight`. None: equal weights.
        losses: (observations,) minus the log-probability of the true class, NaN if it has none; None: no log-loss.
    """
    samples = [([f"recall_at_{count}" for count in GUESSES], hit_matrix(truth, guesses), weights)]
    samples.append((["macro_f1"], class_f1(truth, [row[0] for row in guesses], weights)[:, None], None))
    if losses is not None:
        samples.append(([LOG_LOSS], cap_losses(losses)[:, None], weights))
    scores = {}
    for names, sample, own in samples:
        means = np.average(sample, axis=0, weights=own)
        for name, mean, (low, high) in zip(names, means, intervals(sample, seed, own), strict=True):
            scores |= {name: float(mean), f"{name}_low": low, f"{name}_high": high}
    return scores


def losses_of(truth: Sequence[str], answers: Sequence[Mapping[str, float]]) -> np.ndarray:
    """(observations,) minus the log of the probability of the true class, whose mean is the log-loss.

    Args:
        answers: probabilities by class id, of each observation.
    """
    with np.errstate(divide="ignore"):
        losses = -np.log([one.get(name, 0.0) for name, one in zip(truth, answers, strict=True)])
    return cap_losses(losses)


def cap_losses(losses: np.ndarray) -> np.ndarray:
    """Losses as Kaggle counts them, also for NaN, that of a class without a probability."""
    return np.nan_to_num(np.minimum(losses, WORST_LOSS), nan=WORST_LOSS)


def held_out_scores(
    truth: Sequence[str],
    guesses: Sequence[Sequence[str]],
    weights: np.ndarray,
    is_macro: bool,
    seed: int = 0,
    losses: np.ndarray | None = None,
) -> dict[str, float]:
    """The scores of a run on its held-out observations, as the manifest keeps them.

    The names of `score` have the scores weighted as the selection of the bank weights them: an estimate for a test set
    with the classes of the reference set. The same names after `unweighted_` have those with equal weights.

    Args:
        weights: (observations,), see `shot_weights` and `macro_weights` of `local.banks.folds`.
        is_macro: the weights give all classes the same total. Macro-F1, which does so itself, is then unweighted.
        losses: see `score`.
    """
    plain = score(truth, guesses, seed, losses=losses)
    scores = score(truth, guesses, seed, weights, losses)
    if is_macro:
        scores |= {name: value for name, value in plain.items() if name.startswith("macro_f1")}
    return scores | {f"unweighted_{name}": value for name, value in plain.items()}


def macro_f1(truth: Sequence, firsts: Sequence, weights: np.ndarray | None = None) -> float:
    """The unweighted mean of F1 over the classes that are true or predicted, the metric of the Herbarium competitions.

    This is `sklearn.metrics.f1_score(truth, firsts, average="macro")`: a class that is predicted and never true has an
    F1 of 0. It is the only macro-F1 in this kit.

    Args:
        truth: (observations,) class of each.
        firsts: (observations,) first guess of each.
        weights: see `score`.
    """
    return float(class_f1(truth, firsts, weights).mean())


def class_f1(truth: Sequence, firsts: Sequence, weights: np.ndarray | None = None) -> np.ndarray:
    """(classes,) F1 of each class that is true or predicted, in sorted order; see `macro_f1`."""
    truth, firsts = np.asarray(list(truth)), np.asarray(list(firsts))
    if weights is not None:  # an observation of weight 0 adds no class
        truth, firsts, weights = (values[weights > 0] for values in (truth, firsts, weights))
    from sklearn.metrics import f1_score  # imported here, since it takes a second

    return f1_score(truth, firsts, average=None, sample_weight=weights, zero_division=0)


def macro_f1_gain(
    truth: Sequence, new: Sequence, old: Sequence, weights: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """The difference in `macro_f1` between the first guesses of two methods: `value`, `low`, `high`.

    Classes are resampled, also those that only one method predicts; each method's mean is over its own classes.

    Args:
        weights: see `score`.
    """
    truth, new, old = (np.asarray(list(values)) for values in (truth, new, old))
    if weights is not None:  # an observation of weight 0 adds no class
        truth, new, old, weights = (values[weights > 0] for values in (truth, new, old, weights))
    classes = np.unique(np.concatenate([truth, new, old]))
    counts = np.stack([np.isin(classes, np.concatenate([truth, firsts])) for firsts in (new, old)])
    per_class = np.zeros(counts.shape)
    for row, is_counted, firsts in zip(per_class, counts, (new, old), strict=True):
        row[is_counted] = class_f1(truth, firsts, weights)

    def gain(drawn: np.ndarray) -> float:
        return float(np.subtract(*(per_class[:, drawn].sum(axis=1) / np.maximum(counts[:, drawn].sum(axis=1), 1))))

    every = np.arange(len(classes))
    low, high = bootstrap_interval(gain, len(classes), seed)
    return {"value": gain(every), "low": low, "high": high}


def sample_f1(truth: Sequence[Collection], answers: Sequence[Collection]) -> np.ndarray:
    """(observations,) F1 of each answer that is a set: twice what both have, divided by the sum of their sizes.

    Its mean is `sklearn.metrics.f1_score(average="samples")`.

    Args:
        truth, answers: the classes of each observation, each once.
    """
    pairs = zip(truth, answers, strict=True)
    return np.array([2 * len({*own} & {*answer}) / (len(own) + len(answer)) for own, answer in pairs])


def set_scores(f1: np.ndarray) -> dict[str, float]:
    """The mean of (observations,) F1 of `sample_f1` as a score, with the bounds of its 95% interval; see `score`."""
    found = bounded(f1)
    return {"sample_f1": found["value"], "sample_f1_low": found["low"], "sample_f1_high": found["high"]}


def hit_matrix(truth: Sequence[str], guesses: Sequence[Sequence[str]]) -> np.ndarray:
    """(observations, len(GUESSES)) float: whether the true class is among the first 1, 5, 10 guesses."""
    rows = [[answer in row[:count] for count in GUESSES] for answer, row in zip(truth, guesses, strict=True)]
    return np.array(rows, dtype=float).reshape(-1, len(GUESSES))


def hits_of(ranks: np.ndarray) -> np.ndarray:
    """(queries, len(GUESSES)) float: whether the true class is among the first 1, 5, 10 guesses.

    Args:
        ranks: (queries,) rank of the true class, 0 for the first.
    """
    return (ranks[:, None] < np.array(GUESSES)).astype(float)


def mean_recall(hits: np.ndarray, guesses: int = max(GUESSES)) -> np.ndarray:
    """(queries,) the mean of each query's recalls at 1, 5 and 10, as far as a row of the submission has room.

    Args:
        hits: (queries, len(GUESSES)) of `hits_of`, or the smooth ones of `local.banks.evaluation.Evaluation`.
        guesses: in a row of the submission.
    """
    return hits[:, np.array(GUESSES) <= guesses].mean(axis=1)


def objective(metric: str, hits: np.ndarray, losses: np.ndarray, guesses: int) -> np.ndarray:
    """(queries,) what settings are chosen by, the more the better: minus the log-loss, or `mean_recall`.

    Args:
        metric: of the competition.
        hits: see `mean_recall`.
        losses: see `local.banks.evaluation.Evaluation`.
        guesses: in a row of the submission.
    """
    return -cap_losses(losses) if metric == LOG_LOSS else mean_recall(hits, guesses)


def interval(sample: np.ndarray, seed: int = 0, weights: np.ndarray | None = None) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean, or of a weighted one.

    Args:
        weights: see `score`; they are drawn together with their observations.
    """
    return intervals(sample[:, None], seed, weights)[0]


def intervals(samples: np.ndarray, seed: int = 0, weights: np.ndarray | None = None) -> list[tuple[float, float]]:
    """The `interval` of each column of (observations, scores), from the same resamples.

    Equal observations are counted together: of a million with a few hundred weights, that takes a tenth of the time.
    """
    weights = np.ones(len(samples)) if weights is None else weights
    rows = np.column_stack([samples * weights[:, None], weights])[weights > 0]
    kind = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        values, index = np.unique(column, return_inverse=True)
        kind = np.unique(kind * len(values) + index, return_inverse=True)[1]
    kinds = np.empty((kind.max() + 1, rows.shape[1]))
    kinds[kind] = rows

    def means(drawn: np.ndarray) -> np.ndarray:
        *totals, weight = np.bincount(kind[drawn], minlength=len(kinds)) @ kinds
        return np.array(totals) / weight

    return list(zip(*bootstrap_interval(means, len(rows), seed), strict=True))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float | np.ndarray], size: int, seed: int
) -> tuple[float, float] | tuple[list[float], list[float]]:
    """The 95% percentile interval (Efron 1979) of a statistic of drawn indices, (size,), or of several.

    `scipy.stats.bootstrap` gives the same numbers. It takes five times as long on 15,000 observations, of which a
    report makes a hundred intervals, and makes none of a single observation.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(size, size=size)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()


def bounded(sample: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """A mean, weighted or not, with its 95% interval: `value`, `low`, `high`."""
    low, high = interval(sample, weights=weights)
    return {"value": float(np.average(sample, weights=weights)), "low": low, "high": high}


def paired_gain(new: np.ndarray, old: np.ndarray) -> tuple[float, float]:
    """The mean difference between two methods on the same observations, and its standard error.

    With fewer than two observations the error is infinite, so that no gain exceeds it.
    """
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    if len(difference) < 2:
        return float(difference.sum()), math.inf
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def gained(new: np.ndarray, old: np.ndarray) -> dict[str, float]:
    """The mean difference of `paired_gain` with its 95% interval (normal approximation): `value`, `low`, `high`.

    With fewer than MIN_OBSERVATIONS the bounds are infinite: they are no evidence, even if all agree.
    """
    gain, error = paired_gain(new, old)
    margin = 1.96 * error if len(new) >= MIN_OBSERVATIONS else math.inf
    return {"value": gain, "low": gain - margin, "high": gain + margin}


def interval_of(scores: dict[str, float], name: str) -> dict[str, float]:
    """One of the scores of `score`: `value`, `low`, `high`."""
    return {"value": scores[name], "low": scores[f"{name}_low"], "high": scores[f"{name}_high"]}


def describe(scores: dict[str, float], guesses: int = max(GUESSES), prefix: str = "") -> str:
    """One line: `Recall@1 .432 [.401, .463]  Recall@5 ...`, after the log-loss, if it is known.

    Args:
        guesses: in a row of the submission; recalls at more than these are left out, since they repeat the last.
        prefix: of the names of the scores: `unweighted_`, or none.
    """
    counts = [count for count in GUESSES if count <= guesses]
    names = {LOG_LOSS: "log-loss"} | {f"recall_at_{count}": f"Recall@{count}" for count in counts}
    names |= {"macro_f1": "macro-F1", "sample_f1": "F1 per observation"}
    return "  ".join(
        f"{label} {scores[name]:.3f} [{scores[name + '_low']:.3f}, {scores[name + '_high']:.3f}]"
        for name, label in ((prefix + name, label) for name, label in names.items())
        if name in scores  # macro-F1 and log-loss are not always known
    )

"""Fit the metadata prior: from labelled observations to the tables that the kernel looks up. In float64, on the CPU.

estimator = PriorEstimator().fit(train, classes, train.taxa)
estimator.prior_.log_probabilities(val.observations)      the kernel's own code
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_array

from kernel.metadata_prior import CELL, FEATURES, MetadataPrior, feature_value, parse_number
from kernel.observations import Observation
from local.base.files import write_tensors
from local.data.observations import LabelledObservations

SHOTS, RECENCY = "shots", "recency"  # the terms that no metadata of the query's enter
# How many observations' worth the wider taxon speaks for: all fungi in an order, it in a family, that in a genus, that
# in a class. Small at the class: a species' one observation says much of where the next will be. These and the widths
# of the kernels below are of the flat middle of what the folds of FungiCLEF's Train liked; its Val had no say.
CONCENTRATIONS = (50.0, 20.0, 5.0, 0.5)
RIDGE = 1e-3  # on the squared weights, in nats per query: settles what the queries leave open, and no more
START = 0.3  # of every weight; what they stay at when there is nothing to choose them by
KM_PER_DEGREE = 111.2


def season_kernel(values: Sequence[str], days: float = 30.0) -> np.ndarray:
    """Gaussian around the year's circle between dekads: (values, values)."""
    dekads = np.array([int(value) for value in values])
    apart = np.abs(dekads[:, None] - dekads)
    return np.exp(-0.5 * (np.minimum(apart, 36 - apart) * 365.25 / 36 / days) ** 2)


def elevation_kernel(values: Sequence[str], steps: float = 1.0) -> np.ndarray:
    """Gaussian between steps of elevation: (values, values)."""
    heights = np.array([int(value) for value in values])
    return np.exp(-0.5 * ((heights[:, None] - heights) / steps) ** 2)


def place_kernel(values: Sequence[str], km: float = 4.0) -> np.ndarray:
    """Cauchy between the centres of cells: (values, values). Its tail keeps a whole country a little alike."""
    latitude, longitude = ((np.array([value.split(",") for value in values], dtype=float) + 0.5) * CELL).T
    narrowing = np.cos(np.radians((latitude[:, None] + latitude) / 2))
    north, east = latitude[:, None] - latitude, (longitude[:, None] - longitude) * narrowing
    return 1 / (1 + (north**2 + east**2) * (KM_PER_DEGREE / km) ** 2)


# Features whose neighbouring values are alike; values of the others are equal or not.
KERNELS: dict[str, Callable[[Sequence[str]], np.ndarray]] = {
    "season": season_kernel,
    "elevation": elevation_kernel,
    "location": place_kernel,
}


def spread(values: Sequence[str | None], known: Sequence[str], feature: str) -> np.ndarray:
    """Each observation as a distribution over the values of a feature: (observations, known); zero without a value."""
    kernel = KERNELS[feature](known) if feature in KERNELS else np.eye(len(known))
    kernel = kernel / kernel.sum(axis=1, keepdims=True)
    place = {value: row for row, value in enumerate(known)}
    return np.array([kernel[place[value]] if value in place else np.zeros(len(known)) for value in values])


def taxon_rings(owners: np.ndarray, ancestry: Sequence[tuple[str, ...]], mass: np.ndarray) -> list[np.ndarray]:
    """Counts of each class's relatives by closeness, each observation in exactly one ring.

    Args:
        owners: (observations,) index of the class.
        ancestry: of each class the names of its taxa, the widest first; "" for one that is not named.
        mass: (observations, values) distributions.

    Returns:
        From the widest taxon to the class itself (classes, values): sums over the observations that share this taxon
        with the class, but no narrower one. Without this, a genus of one species would hear that species twice. A class
        whose taxon is not named has no relatives by it, and may have some by a narrower or wider one that is.
    """
    own = np.zeros((len(ancestry), mass.shape[1]))
    np.add.at(own, owners, mass)
    ranks = [*zip(*ancestry, strict=True)]

    def relatives(shared: tuple[int, ...]) -> np.ndarray:
        """(classes, values): sums over the other classes that have the same taxon at each of some ranks."""
        lines = list(zip(*(ranks[rank] for rank in shared), strict=True))
        index = {line: number for number, line in enumerate(dict.fromkeys(lines))}
        group, each = np.array([index[line] for line in lines]), np.arange(len(lines))
        sums = csr_array((np.ones(len(lines)), (group, each)), shape=(len(index), len(lines))) @ own
        return (sums[group] - own) * np.array(["" not in line for line in lines])[:, None]

    rings = []
    for rank in range(len(ranks)):
        # Relatives at this rank without those at any narrower one, by inclusion and exclusion.
        narrower = range(rank + 1, len(ranks))
        subsets = [more for count in range(len(narrower) + 1) for more in combinations(narrower, count)]
        ring = sum((-1) ** len(more) * relatives((rank, *more)) for more in subsets)
        rings.append(np.maximum(ring, 0))
    return [*rings, own]


def log_ratios(
    owners: np.ndarray, ancestry: Sequence[tuple[str, ...]], mass: np.ndarray, concentrations: Sequence[float]
) -> np.ndarray:
    """(classes, values) log p(value | class) / p(value), each ring backing off to the next wider one.

    The mean of a Dirichlet whose prior is the wider taxon's estimate, the m-estimate of Cestnik (1990), level by level
    as in hierarchical Dirichlet smoothing (MacKay and Peto 1995).
    """
    total = mass.sum(axis=0)
    overall = (total + 1 / len(total)) / (total.sum() + 1)
    estimate = overall
    rings = taxon_rings(owners, ancestry, mass)
    for ring, concentration in zip(rings, concentrations, strict=True):
        estimate = (ring + concentration * estimate) / (ring.sum(axis=1, keepdims=True) + concentration)
    return np.log(estimate) - np.log(overall)


def conditional_logit(designs: Sequence[tuple[np.ndarray, np.ndarray]], terms: int) -> np.ndarray:
    """Weights of terms that make the answers likeliest: McFadden's conditional logit (1974), convex, weights >= 0.

    Args:
        designs: of each fold the (terms, queries, classes) it adds up, and the (queries,) indices of the true classes.

    Returns:
        (terms,)
    """
    start, queries = np.full(terms, START), sum(len(answers) for _, answers in designs)
    if not queries:
        return start

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = RIDGE * weights @ weights, 2 * RIDGE * weights
        for design, answers in designs:
            scores = np.tensordot(weights, design, 1)
            scores -= scores.max(axis=1, keepdims=True)
            chances = np.exp(scores)
            totals = chances.sum(axis=1, keepdims=True)
            each = np.arange(len(answers))
            value -= (scores[each, answers] - np.log(totals[:, 0])).sum() / queries
            expected = np.tensordot(design, chances / totals, ((1, 2), (0, 1)))
            slope += (expected - design[:, each, answers].sum(axis=1)) / queries
        return value, slope

    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * terms).x


def folds(years: np.ndarray, origins: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Observation-disjoint (fit, query) masks: what came before each of the last years, and that year.

    A rolling origin (Tashman 2000) is how a prior is used: fitted on the past, asked about the next year. Where years
    are unknown, five folds take turns.
    """
    distinct = np.unique(years[np.isfinite(years)])[1:][-origins:]
    for year in distinct:
        yield years < year, years == year
    if not len(distinct):
        fold = np.random.default_rng(0).permutation(len(years)) % 5
        for number in range(5):
            yield fold != number, fold == number


class PriorEstimator:
    """Fits the metadata prior, and chooses the features' weights by cross-validation on what it is given.

    Args:
        concentrations: of the order, family, genus and class; see CONCENTRATIONS.
        memory: years over which a class's observations lose all but 1/e of their say in its recency.
        origins: the last years that are asked about in turn, to choose the weights by.
        features: of kernel.metadata_prior.FEATURES, those to use.

    Attributes:
        weights_: of each feature and of RECENCY what the folds chose, and of SHOTS 1.
        prior_: what the kernel applies.
    """

    def __init__(
        self,
        concentrations: Sequence[float] = CONCENTRATIONS,
        memory: float = 2.0,
        origins: int = 5,
        features: Sequence[str] = tuple(FEATURES),
    ) -> None:
        self.concentrations, self.memory, self.origins = concentrations, memory, origins
        self.features = features

    def fit(
        self, reference: LabelledObservations, classes: Sequence[str], lineages: Mapping[str, tuple[str, ...]]
    ) -> "PriorEstimator":
        """Fit on labelled observations.

        Args:
            classes: all class ids, in the order of the bank.
            lineages: of each class the names of its taxa, the widest first; of them the narrowest ones count, one for
                each concentration but the class's.
        """
        years = np.array([year_of(observation) for observation in reference.observations])
        terms = (*self.features, RECENCY, SHOTS)
        designs = []
        # Without metadata there are no weights to choose, and of 32,000 classes the folds would not fit in memory.
        has_metadata = any(observation.metadata for observation in reference.observations)
        for past, asked in folds(years, self.origins) if has_metadata else ():
            known = sorted(set(reference.class_ids[past]))
            asked = asked & np.isin(reference.class_ids, known)
            if asked.any():
                values, tables = self._terms(reference.subset(past), known, lineages)
                design = lay_out(values, tables, terms, reference.subset(asked).observations)
                designs.append((design, np.searchsorted(known, reference.class_ids[asked].astype(str))))
        # The folds cannot weigh the shots: few-shot data leave out the classes that came often, so that in them a class
        # of four seems never to return. Probabilities go with counts, which is a weight of 1.
        chosen = dict(zip(terms, conditional_logit(designs, len(terms)).tolist(), strict=True))
        self.weights_ = chosen | {SHOTS: 1.0}
        self.prior_ = weighted(*self._terms(reference, classes, lineages), self.weights_)
        return self

    def _terms(
        self, reference: LabelledObservations, classes: Sequence[str], lineages: Mapping[str, tuple[str, ...]]
    ) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
        """Of each feature that has any its values, and of each term its table: (values or 1, classes), unweighted."""
        index = {class_id: place for place, class_id in enumerate(classes)}
        owners = np.array([index[class_id] for class_id in reference.class_ids])
        taxa = len(self.concentrations) - 1
        ancestry = [lineages[class_id][-taxa:] for class_id in classes]
        values, tables = {}, {}
        for feature in self.features:
            read = [feature_value(feature, observation.metadata) for observation in reference.observations]
            known = sorted({value for value in read if value is not None})
            if known:
                values[feature] = known
                tables[feature] = log_ratios(owners, ancestry, spread(read, known, feature), self.concentrations).T
        years = np.array([year_of(observation) for observation in reference.observations])
        recent = np.exp((years - np.nanmax(years, initial=-np.inf)) / self.memory)
        mass = np.nan_to_num(np.stack([recent, 1 - recent], axis=1))  # a year that is not known says nothing
        tables[RECENCY] = log_ratios(owners, ancestry, mass, self.concentrations).T[:1]
        tables[SHOTS] = np.log(np.maximum(np.bincount(owners, minlength=len(classes)), 0.5))[None]
        return values, tables


def weighted(
    values: Mapping[str, list[str]], tables: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> MetadataPrior:
    """What the kernel applies, of unweighted tables; a feature without weight is left out."""
    kept = {feature: known for feature, known in values.items() if weights[feature] > 0}
    classes = sum(weights[term] * tables[term][0] for term in (RECENCY, SHOTS))
    return MetadataPrior(
        torch.from_numpy(classes).log_softmax(dim=0).float(),
        kept,
        {feature: torch.from_numpy(weights[feature] * tables[feature]).float().contiguous() for feature in kept},
    )


def lay_out(
    values: Mapping[str, list[str]],
    tables: Mapping[str, np.ndarray],
    terms: Sequence[str],
    queries: Sequence[Observation],
) -> np.ndarray:
    """(terms, queries, classes) float32: what each term says by itself, looked up as the kernel does."""
    silent, design = dict.fromkeys(terms, 0.0), []
    for term in terms:
        alone = weighted(values, tables, silent | {term: 1.0})
        says = alone.log_likelihoods(queries) if term in FEATURES else alone.classes.expand(len(queries), -1)
        design.append(says.numpy())
    return np.stack(design)


def year_of(observation: Observation) -> float:
    """The year of an observation, NaN where the metadata do not say."""
    try:
        return parse_number(observation.metadata["year"])
    except (KeyError, ValueError):
        return math.nan


def write_prior(prior: MetadataPrior, path: Path) -> None:
    """Write what `kernel.metadata_prior.read_prior` reads."""
    write_tensors({"classes": prior.classes, **prior.tables}, path, {"values": json.dumps(prior.values)})

"""Fit the metadata prior: from labelled observations to the tables that the kernel looks up. In float64, on the CPU.

fit_prior(train, train.classes).log_probabilities(val.observations)
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

from kernel.competitions.fungi import METADATA
from kernel.metadata_prior import CELL, FEATURES, MetadataPrior, feature_value, parse_number
from kernel.observations import Observation
from local.base.files import write_tensors
from local.data.observations import LabelledObservations, encode_labels

SHOTS, RECENCY = "shots", "recency"  # the terms that do not depend on the query's metadata
# Pseudo-counts of the wider taxon: of all fungi in an order, of that in a family, of that in a genus, of that in a
# class. Small in a class, whose one observation says much of where the next will be. These and the widths of the
# smoothing kernels are from the flat middle of what cross-validation on FungiCLEF's Train preferred, without its Val.
CONCENTRATIONS = (50.0, 20.0, 5.0, 0.5)
MEMORY = 2.0  # years after which an observation counts 1/e in the recency of its class
ORIGINS = 5  # how many of the last years are folds
RIDGE = 1e-3  # penalty of the squared weights, in nats per query: it decides only what the queries leave open
MAX_SCORES = 10_000_000  # queries of a fold times classes, of which each term has one: thousands of queries are enough
INITIAL_WEIGHT = 0.3  # of every term, and the final one if there are no queries
KM_PER_DEGREE = 111.2


def season_kernel(values: Sequence[str], days: float = 30.0) -> np.ndarray:
    """Gaussian of the distance between dekads, around the circle of the year: (values, values)."""
    dekads = np.array([int(value) for value in values])
    distance = np.abs(dekads[:, None] - dekads)
    return np.exp(-0.5 * (np.minimum(distance, 36 - distance) * 365.25 / 36 / days) ** 2)


def elevation_kernel(values: Sequence[str], steps: float = 1.0) -> np.ndarray:
    """Gaussian of the difference in steps of elevation: (values, values)."""
    heights = np.array([int(value) for value in values])
    return np.exp(-0.5 * ((heights[:, None] - heights) / steps) ** 2)


def location_kernel(values: Sequence[str], km: float = 4.0) -> np.ndarray:
    """Cauchy of the distance between the centres of cells: (values, values). Its tail reaches over a whole country."""
    latitude, longitude = ((np.array([value.split(",") for value in values], dtype=float) + 0.5) * CELL).T
    shrinking = np.cos(np.radians((latitude[:, None] + latitude) / 2))  # of degrees of longitude, towards the poles
    north, east = latitude[:, None] - latitude, (longitude[:, None] - longitude) * shrinking
    return 1 / (1 + (north**2 + east**2) * (KM_PER_DEGREE / km) ** 2)


# Similarity of the values of a feature; values of the other features are equal or not.
SMOOTHING_KERNELS: dict[str, Callable[[Sequence[str]], np.ndarray]] = {
    "season": season_kernel,
    "elevation": elevation_kernel,
    "location": location_kernel,
}


def smooth(
    values: Sequence[str | None], known: Sequence[str], feature: str, labels: np.ndarray, classes: int
) -> np.ndarray:
    """The sum over each class's observations of their distributions over known values: (classes, known).

    Args:
        values: (observations,); one without a value has no distribution.
        labels: (observations,) index of the class of each.
    """
    kernel = SMOOTHING_KERNELS[feature](known) if feature in SMOOTHING_KERNELS else np.eye(len(known))
    kernel = kernel / kernel.sum(axis=1, keepdims=True)
    column = {value: number for number, value in enumerate(known)}
    columns = np.array([column.get(value, -1) for value in values])
    own = columns >= 0
    return csr_array((np.ones(own.sum()), (labels[own], columns[own])), shape=(classes, len(known))) @ kernel


def taxon_rings(own: np.ndarray, ancestry: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
    """Sums over each class's relatives by their closeness, each observation in exactly one ring.

    Args:
        own: (classes, values) sums of the distributions of each class's observations.
        ancestry: of each class the names of its taxa, the widest first; "" for one that is not named.

    Returns:
        From the widest taxon to the class itself (classes, values): sums over the observations that share this taxon
        with the class, but no narrower one. Otherwise the only species of a genus would count twice. A class whose
        taxon is not named has no relatives by it, but may have some by a narrower or wider one.
    """
    ranks = [*zip(*ancestry, strict=True)]

    def relatives(shared: tuple[int, ...]) -> np.ndarray:
        """(classes, values): sums over the other classes that have the same taxon at each of some ranks."""
        taxa = list(zip(*(ranks[rank] for rank in shared), strict=True))
        index = {taxon: number for number, taxon in enumerate(dict.fromkeys(taxa))}
        group, each = np.array([index[taxon] for taxon in taxa]), np.arange(len(taxa))
        sums = csr_array((np.ones(len(taxa)), (group, each)), shape=(len(index), len(taxa))) @ own
        return (sums[group] - own) * np.array(["" not in taxon for taxon in taxa])[:, None]

    rings = []
    for rank in range(len(ranks)):
        # Relatives at this rank but at no narrower one, by inclusion and exclusion.
        narrower = range(rank + 1, len(ranks))
        subsets = [more for count in range(len(narrower) + 1) for more in combinations(narrower, count)]
        ring = sum((-1) ** len(more) * relatives((rank, *more)) for more in subsets)
        rings.append(np.maximum(ring, 0))
    return [*rings, own]


def log_ratios(own: np.ndarray, ancestry: Sequence[tuple[str, ...]], concentrations: Sequence[float]) -> np.ndarray:
    """(classes, values) log p(value | class) / p(value), each ring backing off to the next wider one.

    Hierarchical Dirichlet smoothing (MacKay and Peto 1995): each level is the mean of a Dirichlet whose prior is the
    estimate of the wider taxon, with its concentration as pseudo-counts (the m-estimate of Cestnik 1990).

    Args:
        own, ancestry: see `taxon_rings`.
    """
    total = own.sum(axis=0)
    overall = (total + 1 / len(total)) / (total.sum() + 1)
    estimate = overall
    rings = taxon_rings(own, ancestry)
    for ring, concentration in zip(rings, concentrations, strict=True):
        estimate = (ring + concentration * estimate) / (ring.sum(axis=1, keepdims=True) + concentration)
    return np.log(estimate) - np.log(overall)


def conditional_logit(designs: Sequence[tuple[np.ndarray, np.ndarray]], terms: int) -> np.ndarray:
    """The weights >= 0 of terms with the highest likelihood: McFadden's conditional logit (1974), a convex problem.

    Args:
        designs: of each fold the terms, (terms, queries, classes), and the true classes, (queries,).

    Returns:
        (terms,)
    """
    start, queries = np.full(terms, INITIAL_WEIGHT), sum(len(truth) for _, truth in designs)
    if not queries:
        return start

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = RIDGE * weights @ weights, 2 * RIDGE * weights
        for design, truth in designs:
            logits = np.tensordot(weights, design, 1)
            logits -= logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits)
            totals = exponentials.sum(axis=1, keepdims=True)
            each = np.arange(len(truth))
            value -= (logits[each, truth] - np.log(totals[:, 0])).sum() / queries
            expected = np.tensordot(design, exponentials / totals, ((1, 2), (0, 1)))
            gradient += (expected - design[:, each, truth].sum(axis=1)) / queries
        return value, gradient

    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * terms).x


def rolling_origin_folds(years: np.ndarray, origins: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Observation-disjoint (fit, query) masks: the observations before each of the last years, and those of that year.

    The prior is used in this way too: fitted on the past, for the next year (rolling origin, Tashman 2000). If years
    are unknown, the folds are five random parts.
    """
    distinct = np.unique(years[np.isfinite(years)])[1:][-origins:]
    for year in distinct:
        yield years < year, years == year
    if not len(distinct):
        fold = np.random.default_rng(0).permutation(len(years)) % 5
        for number in range(5):
            yield fold != number, fold == number


def fit_prior(reference: LabelledObservations, classes: Sequence[str]) -> MetadataPrior:
    """Fit the prior on labelled observations.

    Args:
        classes: all class ids, in the order of the bank.
    """
    return weighted(*unweighted_terms(reference, classes), choose_weights(reference))


def choose_weights(reference: LabelledObservations) -> dict[str, float]:
    """The weights of the features and of RECENCY by cross-validation over years; that of SHOTS is 1."""
    years = years_of(reference)
    features = features_of(reference)
    terms = (*features, RECENCY, SHOTS)
    designs = []
    # Without metadata there are no weights to choose, and with 32,000 classes the folds would not fit in memory.
    for past, queries in rolling_origin_folds(years, ORIGINS) if reference.has_metadata else ():
        known = sorted(set(reference.class_ids[past]))
        rows = np.flatnonzero(queries & np.isin(reference.class_ids, known))
        if len(rows):
            drawn = np.sort(np.random.default_rng(0).permutation(rows)[: max(1, MAX_SCORES // len(known))])
            values, tables = unweighted_terms(reference.subset(past), known, features)
            design = design_matrix(values, tables, terms, reference.subset(drawn).observations)
            designs.append((design, np.searchsorted(known, reference.class_ids[drawn].astype(str))))
    # The folds cannot weight the shots: few-shot data omit the frequent classes, so that a class of four seems
    # never to return. Probabilities are proportional to counts, which is a weight of 1.
    return dict(zip(terms, conditional_logit(designs, len(terms)).tolist(), strict=True)) | {SHOTS: 1.0}


def features_of(reference: LabelledObservations) -> list[str]:
    """The features of FungiCLEF's columns, and one for each other column of the competition's metadata."""
    features = list(FEATURES)
    for column in [column for column in reference.competition.metadata if column not in METADATA]:
        texts = {observation.metadata.get(column, "") for observation in reference.observations} - {""}
        features.append(f"{'number' if all(map(is_number, texts)) else 'text'} {column}")
    return features


def is_number(text: str) -> bool:
    try:
        parse_number(text)
    except ValueError:
        return False
    return True


def unweighted_terms(
    reference: LabelledObservations, classes: Sequence[str], features: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """The values of each feature that has any, and the unweighted table of each term, (values or 1, classes).

    Args:
        features: by default those of the reference; see `features_of`.
    """
    labels = encode_labels(reference.class_ids, classes)
    taxa = len(CONCENTRATIONS) - 1
    ancestry = [reference.taxa[class_id][-taxa:] for class_id in classes]
    values, tables = {}, {}
    for feature in features or features_of(reference):
        read = [feature_value(feature, observation.metadata) for observation in reference.observations]
        known = sorted({value for value in read if value is not None})
        if known:
            values[feature] = known
            own = smooth(read, known, feature, labels, len(classes))
            tables[feature] = log_ratios(own, ancestry, CONCENTRATIONS).T
    years = years_of(reference)
    recent = np.exp((years - np.nanmax(years, initial=-np.inf)) / MEMORY)
    mass = np.nan_to_num(np.stack([recent, 1 - recent]))  # zeros for an unknown year
    own = np.stack([np.bincount(labels, each, minlength=len(classes)) for each in mass], axis=1)
    tables[RECENCY] = log_ratios(own, ancestry, CONCENTRATIONS).T[:1]
    tables[SHOTS] = np.log(np.maximum(np.bincount(labels, minlength=len(classes)), 0.5))[None]
    return values, tables


def weighted(
    values: Mapping[str, list[str]], tables: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> MetadataPrior:
    """The kernel's prior from unweighted tables; a feature of weight 0 is left out."""
    kept = {feature: known for feature, known in values.items() if weights[feature] > 0}
    classes = sum(weights[term] * tables[term][0] for term in (RECENCY, SHOTS))
    return MetadataPrior(
        torch.from_numpy(classes).log_softmax(dim=0).float(),
        kept,
        {feature: torch.from_numpy(weights[feature] * tables[feature]).float().contiguous() for feature in kept},
    )


def design_matrix(
    values: Mapping[str, list[str]],
    tables: Mapping[str, np.ndarray],
    terms: Sequence[str],
    queries: Sequence[Observation],
) -> np.ndarray:
    """(terms, queries, classes) float32: the value of each term alone, looked up as the kernel does."""
    zeros, design = dict.fromkeys(terms, 0.0), []
    for term in terms:
        alone = weighted(values, tables, zeros | {term: 1.0})
        own = alone.classes.expand(len(queries), -1) if term in (RECENCY, SHOTS) else alone.log_likelihoods(queries)
        design.append(own.numpy())
    return np.stack(design)


def years_of(reference: LabelledObservations) -> np.ndarray:
    """(observations,) years, NaN where the metadata have none."""

    def year_of(observation: Observation) -> float:
        try:
            return parse_number(observation.metadata["year"])
        except (KeyError, ValueError):
            return math.nan

    return np.array([year_of(observation) for observation in reference.observations])


def write_prior(prior: MetadataPrior, path: Path) -> None:
    """Write what `kernel.metadata_prior.read_prior` reads."""
    write_tensors({"classes": prior.classes, **prior.tables}, path, {"values": json.dumps(prior.values)})

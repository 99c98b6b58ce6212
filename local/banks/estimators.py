"""Fit banks: from the embeddings of a reference to what the kernel matches against. In float64, on the CPU.

Every estimator has scikit-learn's manners: parameters at the constructor, `fit(embeddings, observations, classes,
taxonomy)`, what was learnt in attributes with a trailing underscore. A transform has a `layers_`, a matcher has
`prototypes_`, `owners_`, `counts_`, `bias_` and `scale_`, the inverse temperature at which the bias was fitted;
`make_bank` puts one of each together.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import LogisticRegression

from kernel.bank import Bank, Layer, apply_layers
from local.base.files import write_tensors
from local.data.taxonomy import Taxonomy

SCALE = 16.0  # of cosines, where nothing is held out to fit it
NEVER = -100.0  # the bias of a class that the reference lacks
SHRINKAGE_SAMPLES = 4000  # photos
SCATTER_SAMPLES = 40_000  # residuals suffice for a covariance of a thousand features, and take seconds


def unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def group_means(values: np.ndarray, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, features), (rows,) -> the mean of each group (count, features), zeros for an empty one, and its size."""
    sizes = np.bincount(groups, minlength=count)
    members = csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(count, len(groups)))
    return members @ values / np.maximum(sizes, 1)[:, None], sizes


def pool(
    embeddings: np.ndarray, observations: np.ndarray, count: int | None = None, pooling: str = "mean"
) -> np.ndarray:
    """(photos, views, features), (photos,) -> observation embeddings, pooled as the kernel does.

    Args:
        count: of observations, the last of which may have no photo; None counts those that have one.
    """
    count = observations.max() + 1 if count is None else count
    photos = embeddings.mean(axis=1, dtype=np.float64)
    if pooling == "mean":
        return unit(group_means(photos, observations, count)[0])
    largest = np.full((count, photos.shape[1]), -np.inf)
    np.maximum.at(largest, observations, photos)
    return unit(np.where(np.isfinite(largest), largest, 0.0))


class Centring:
    """Subtract the reference's mean, which all photos have in common (SimpleShot, https://arxiv.org/abs/1911.04623)."""

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """See `Whitening.fit`."""
        self.mean_ = pool(embeddings, observations).mean(axis=0)
        self.layers_ = [layer(np.eye(len(self.mean_)), -self.mean_)]
        return self


class Whitening:
    """Centre, and shrink the directions in which one class varies within itself.

    What tells photos, views and specimens of one class apart tells nothing about the class (LDA; the covariance is
    shrunk as by Ledoit and Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4). Views count as variation too:
    that makes classes of a single photo useful, and the encoder insensitive to turning.

    Args:
        exponent: 1 whitens in full, 0 only centres.

    Attributes:
        mean_: (features,).
        variances_, directions_: eigenvalues (features,) and eigenvectors (features, features) of the covariance.
    """

    def __init__(self, exponent: float = 1.0):
        self.exponent = exponent

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """Learn from a reference.

        Args:
            embeddings: (photos, views, features), of length 1.
            observations: (photos,) index of the observation of each, 0 to observations - 1.
            classes: (photos,) index of the class of each.
            taxonomy: of the classes.
        """
        self.mean_ = pool(embeddings, observations).mean(axis=0)
        views = embeddings.shape[1]
        photos = embeddings.mean(axis=1, dtype=np.float64)
        means, _ = group_means(photos, classes, classes.max() + 1)
        chosen = np.arange(len(embeddings) * views)
        if len(chosen) > SCATTER_SAMPLES:
            chosen = np.sort(np.random.default_rng(0).choice(chosen, SCATTER_SAMPLES, replace=False))
        covariance = np.zeros((embeddings.shape[2],) * 2)
        for part in np.array_split(chosen, 1 + len(chosen) // 4096):  # in double precision, all at once fills gigabytes
            photo, view = np.divmod(part, views)
            residuals = embeddings[photo, view] - means[classes[photo]]
            covariance += residuals.T @ residuals / len(chosen)
        # How much to shrink follows from photos: the views of one are no independent samples.
        photos -= means[classes]
        several = np.flatnonzero(np.bincount(classes)[classes] > 1)
        several = np.random.default_rng(0).permutation(several)[:SHRINKAGE_SAMPLES]
        shrinkage = ledoit_wolf_shrinkage(photos[several], assume_centered=True) if len(several) > 1 else 1.0
        mean_variance = np.trace(covariance) / len(covariance)
        covariance = (1 - shrinkage) * covariance + shrinkage * mean_variance * np.eye(len(covariance))
        self.variances_, self.directions_ = np.linalg.eigh(covariance)
        return self

    def layers(self, exponent: float, mean: np.ndarray) -> list[Layer]:
        """The one linear map that subtracts a mean, (features,), and whitens by an exponent."""
        weight = self.directions_ * np.maximum(self.variances_, 1e-12) ** (-exponent / 2)
        weight /= np.abs(weight).max()  # lengths do not matter, and single precision likes moderate ones
        return [layer(weight, -mean @ weight)]

    @property
    def layers_(self) -> list[Layer]:
        """The map of the reference's own mean and the exponent of the constructor."""
        return self.layers(self.exponent, self.mean_)


class ClassMeans:
    """A prototype per class: the mean of its observations, each one voice, drawn towards its relatives.

    Prototypical networks' means (Snell et al. 2017, https://arxiv.org/abs/1703.05175). A class of one observation
    learns most from its relatives (James-Stein shrinkage): with n observations, the class's own mean has weight n.

    Args:
        genus: weight of the mean over the other classes of the class's genus; without any, nothing has it.
        family: weight of the mean over the other genera of its family, each genus being the mean of its classes;
            without any, nothing has it.
    """

    def __init__(self, genus: float = 0.0, family: float = 0.0):
        self.genus, self.family = genus, family

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """`embeddings`: (observations, features) in the transformed space; the rest as `Whitening.fit`."""
        count = len(taxonomy.genus)
        means, sizes = group_means(embeddings, classes, count)
        self.present_ = sizes > 0
        of_genus, other_classes = relatives(means, self.present_, taxonomy.genus)
        of_family, other_genera = related_genera(means, self.present_, taxonomy)
        genus, family = self.genus * (other_classes > 0), self.family * (other_genera > 0)
        weight = np.maximum(sizes + genus + family, 1e-9)[:, None]
        means = (sizes[:, None] * means + genus[:, None] * of_genus + family[:, None] * of_family) / weight
        self.prototypes_, self.owners_ = unit(means), np.arange(count)
        self.counts_ = sizes * np.linalg.norm(means, axis=1)
        self.bias_, self.scale_ = np.where(self.present_, 0.0, NEVER), SCALE
        return self


def relatives(values: np.ndarray, present: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the other classes of a class's group, (classes, features), and how many they are, (classes,)."""
    means, sizes = group_means(values[present], groups[present], groups.max() + 1)
    others = sizes[groups] - present
    totals = (means * sizes[:, None])[groups] - values * present[:, None]
    return totals / np.maximum(others, 1)[:, None], others


def related_genera(means: np.ndarray, present: np.ndarray, taxonomy: Taxonomy) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the other genera of a class's family, (classes, features), and how many they are, (classes,).

    A genus is the mean of its classes, so that one of many classes counts no more than another.
    """
    pairs = np.stack([taxonomy.family, taxonomy.genus], axis=1)
    genera, genus = np.unique(pairs, axis=0, return_inverse=True)
    genus = genus.reshape(-1)  # numpy 2.0.0 gives it a second axis
    genus_means, sizes = group_means(means[present], genus[present], len(genera))
    others, count = relatives(genus_means, sizes > 0, genera[:, 0])
    return others[genus], count[genus]


class SeveralPrototypes:
    """Every observation a prototype, or the centres of k-means where a class has more than `most` observations.

    A class that looks like several, a mushroom young and old, has no use for their mean; with `most` large this is the
    nearest neighbour.
    """

    def __init__(self, most: int = 3, seed: int = 0):
        self.most, self.seed = most, seed

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """As `ClassMeans.fit`."""
        prototypes, owners, counts = [], [], []
        for index in np.unique(classes):
            own = embeddings[classes == index]
            clusters, sizes = own, np.ones(len(own))
            if len(own) > self.most:
                kmeans = KMeans(self.most, n_init=1, random_state=self.seed).fit(own)
                clusters, sizes = kmeans.cluster_centers_, np.bincount(kmeans.labels_, minlength=self.most)
            prototypes.append(clusters)
            counts.append(sizes * np.linalg.norm(clusters, axis=1))
            owners.append(np.full(len(clusters), index))
        self.prototypes_, self.owners_ = unit(np.concatenate(prototypes)), np.concatenate(owners)
        self.counts_ = np.concatenate(counts)
        self.bias_ = np.where(np.isin(np.arange(len(taxonomy.genus)), classes), 0.0, NEVER)
        self.scale_ = SCALE
        return self


class Ridge:
    """Least squares on one-hot classes, its columns brought to one length, since classes differ in shots.

    With a `width` on that many rectified random features first (RanPAC, McDonnell et al. 2023,
    https://arxiv.org/abs/2307.02251).

    Args:
        penalty: of the squared weights, relative to the mean variance of a feature.
    """

    def __init__(self, penalty: float = 0.1, width: int = 0, seed: int = 0):
        self.penalty, self.width, self.seed = penalty, width, seed

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """As `ClassMeans.fit`."""
        self.layers_ = []
        if self.width:
            random = np.random.default_rng(self.seed).standard_normal((embeddings.shape[1], self.width))
            self.layers_ = [layer(random, np.zeros(self.width), rectified=True)]
            embeddings = unit(np.maximum(embeddings @ random, 0))
        count = len(taxonomy.genus)
        targets = np.eye(count)[classes]
        # The dual form: observations are fewer than features.
        gram = embeddings @ embeddings.T
        penalty = self.penalty * np.trace(gram) / len(gram)
        weights = embeddings.T @ np.linalg.solve(gram + penalty * np.eye(len(gram)), targets)
        self.prototypes_, self.owners_ = unit(weights.T), np.arange(count)
        self.counts_ = np.bincount(classes, minlength=count).astype(float)
        self.bias_, self.scale_ = np.where(self.counts_ > 0, 0.0, NEVER), SCALE
        return self


class Logistic:
    """Multinomial logistic regression, classes balanced.

    Its prototypes are the coefficients, which are no unit vectors, and its own temperature is 1: so the bank's
    log-probabilities are those of scikit-learn's model.

    Args:
        strength: scikit-learn's C, inverse of the penalty.
    """

    def __init__(self, strength: float = 10.0):
        self.strength = strength

    def fit(self, embeddings: np.ndarray, observations: np.ndarray, classes: np.ndarray, taxonomy: Taxonomy):
        """As `ClassMeans.fit`."""
        count = len(taxonomy.genus)
        model = LogisticRegression(C=self.strength, class_weight="balanced", max_iter=300, tol=1e-3)
        with warnings.catch_warnings():  # that many classes have few observations is what this is for
            warnings.simplefilter("ignore")
            model.fit(embeddings, classes)
        weights, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        self.prototypes_, self.bias_ = np.zeros((count, embeddings.shape[1])), np.full(count, NEVER)
        self.prototypes_[model.classes_], self.bias_[model.classes_] = weights, bias
        self.scale_ = 1.0
        self.owners_, self.counts_ = np.arange(count), np.bincount(classes, minlength=count).astype(float)
        return self


def layer(weight: np.ndarray, bias: np.ndarray, rectified: bool = False) -> Layer:
    """The kernel's form of a linear map."""
    return Layer(tensor(weight), tensor(bias), torch.tensor(float(rectified)))


def tensor(values: np.ndarray | float) -> torch.Tensor:
    """Single precision, as the kernel computes."""
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def make_bank(
    transform: Sequence[Layer],
    matcher,
    scale: float | None = None,
    share: float = 1.0,
    transduction: float = 0.0,
) -> Bank:
    """The kernel's bank of a fitted transform and a fitted matcher.

    Args:
        scale: inverse temperature; None leaves the matcher's own.
    """
    bank = Bank(
        layers=(*transform, *getattr(matcher, "layers_", ())),
        prototypes=tensor(matcher.prototypes_),
        prototype_labels=torch.tensor(matcher.owners_),
        counts=tensor(matcher.counts_),
        bias=tensor(matcher.bias_),
        logit_scale=tensor(matcher.scale_),
        mixture_weight=tensor(share),
        transduction=tensor(transduction),
    )
    return bank if scale is None else rescale(bank, scale)


def rescale(bank: Bank, scale: float) -> Bank:
    """The bank at another inverse temperature, which multiplies all of its logits, the bias included.

    The ranking of the classes does not change by it, and a class that the reference lacks stays out.
    """
    bias = torch.where(bank.bias > NEVER, bank.bias * (scale / bank.logit_scale), bank.bias)
    return replace(bank, bias=bias, logit_scale=tensor(scale))


def spread_over(bank: Bank, own: Sequence[str], classes: Sequence[str]) -> Bank:
    """A bank of some classes as one of more of them, of which the others are never the answer."""
    place = {class_id: index for index, class_id in enumerate(classes)}
    places = torch.tensor([place[class_id] for class_id in own])
    bias = torch.full((len(classes),), NEVER)
    bias[places] = bank.bias
    return replace(bank, prototype_labels=places[bank.prototype_labels], bias=bias)


def centroids(embeddings: np.ndarray, classes: np.ndarray, count: int) -> Bank:
    """The plainest bank: class means, after the mean embedding is subtracted.

    Args:
        embeddings: (observations, features), rows of length 1.
        classes: (observations,) index of the class of each, of `count` classes.
    """
    observations, taxonomy = np.arange(len(classes)), Taxonomy.unknown(count)
    transform = Centring().fit(embeddings[:, None], observations, classes, taxonomy).layers_
    space = apply(transform, embeddings)
    return make_bank(transform, ClassMeans().fit(space, observations, classes, taxonomy))


def apply(layers: Sequence[Layer], values: np.ndarray) -> np.ndarray:
    """The kernel's transform in double precision: (observations, features) -> the same in the prototypes' space."""
    return unit(apply_layers(layers, torch.tensor(values, dtype=torch.float64)).numpy())


def save_banks(banks: Sequence[Bank], path: Path) -> None:
    """Write what `kernel.bank.read_banks` reads."""
    tensors = {}
    for number, bank in enumerate(banks):
        for name, value in vars(bank).items():
            if name != "layers":
                tensors[f"{number}.{name}"] = value.clone()
        for place, part in enumerate(bank.layers):
            tensors |= {f"{number}.layers.{place}.{name}": value.clone() for name, value in vars(part).items()}
    write_tensors(tensors, path)


def commonest_classes(class_ids: np.ndarray, classes: Sequence[str], count: int = 10) -> list[str]:
    """The classes with the most observations, in order; what to answer when no photo speaks."""
    counts = Counter(class_ids)
    return sorted(classes, key=lambda class_id: -counts[class_id])[:count]

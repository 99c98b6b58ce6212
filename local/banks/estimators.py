"""Fit banks: from the embeddings of a reference set to what the kernel classifies with. On the CPU, sums in float64.

The estimators follow scikit-learn: parameters go to the constructor, `fit` returns self, and what was learned is in
attributes that end with an underscore. A matcher has `prototypes_`, `prototype_labels_`, `counts_`, `bias_` and
`logit_scale_`, the inverse temperature at which the bias was fitted. `make_bank` joins it with the layers before it.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.linear_model import LogisticRegression

from kernel.bank import Bank, Layer, apply_layers
from kernel.inputs import InputError
from local.banks.folds import FOLDS
from local.base.files import write_tensors
from local.base.scratch import scratch_array
from local.data.observations import Taxonomy
from local.data.stored_embeddings import StoredEmbeddings

LOGIT_SCALE = 16.0  # of cosines, where no held-out observations are there to fit it
TRAINED_MATCHERS = {"logistic", "projection"}
ABSENT = -100.0  # bias of a class without a reference observation
SHRINKAGE_SAMPLES = 4000  # photos
INVERSE_PENALTY = 10.0  # of logistic regression, scikit-learn's C
MAX_LOGITS = 200_000_000  # of logistic regression, observations times classes: 12 bytes of memory each
MAX_VALUES = 1_000_000_000  # of a projection, embeddings in all views and held-out scores: 8 bytes each or more
ROWS = 4096  # that are in double precision at once
COVARIANCE_SAMPLES = 40_000  # residuals: enough for the covariance of a thousand features, in seconds
HUBNESS_SAMPLES = 4096  # observations: each class needs only the nearest of other classes
HUBNESS_SCALE = 8.0  # inverse temperature of cosines; by cross-validation 4 and 16 gain less


def l2_normalize(values: np.ndarray) -> np.ndarray:
    """(..., features) -> the same with rows of length 1; rows of zeros stay zeros."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def group_means(values: np.ndarray, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the size of each group.

    Args:
        values: (rows, features).
        groups: (rows,) index of the group of each row.
        count: number of groups.

    Returns:
        (count, features), zeros for an empty group, and (count,).
    """
    sizes, means = np.bincount(groups, minlength=count), group_sums(values, groups, count)
    means /= np.maximum(sizes, 1)[:, None]
    return means, sizes


def group_sums(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """The sum of each group, (count, features); see `group_means`."""
    sums = scratch_array((count, values.shape[1]))
    for part in in_parts(len(values)):
        add_to_groups(sums, groups[part], values[part])
    return sums


def in_parts(rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ROWS rows."""
    for first in range(0, rows, ROWS):
        yield slice(first, min(first + ROWS, rows))


def add_to_groups(totals: np.ndarray, groups: np.ndarray, values: np.ndarray) -> None:
    """Add (rows, features) to the totals, (groups, features), of the group of each row, (rows,)."""
    rows = torch.from_numpy(values.astype(totals.dtype, copy=False))
    torch.from_numpy(totals).index_add_(0, torch.from_numpy(groups), rows)  # a sparse product takes seven times as long


def photo_means(embeddings: np.ndarray | StoredEmbeddings) -> Iterator[tuple[slice, np.ndarray]]:
    """The means over the views, (photos, features), of one part of the photos after another."""
    for part in in_parts(len(embeddings)):
        yield part, np.asarray(embeddings[part]).mean(axis=1, dtype=np.float64)


def pool(
    embeddings: np.ndarray | StoredEmbeddings, observations: np.ndarray, count: int | None = None, pooling: str = "mean"
) -> np.ndarray:
    """Observation embeddings, pooled over views and photos as the kernel does.

    Args:
        embeddings: (photos, views, features).
        observations: (photos,) index of the observation of each photo.
        count: number of observations, some of which may have no photo; None: the largest index plus 1.
        pooling: "mean" or "max" over the photos.

    Returns:
        (count, features) float32, rows of length 1; zeros for an observation without a photo.
    """
    count = int(observations.max()) + 1 if count is None else count
    pooled = scratch_array((count, embeddings.shape[2]), np.float32)
    if pooling == "max":
        pooled[:] = -np.inf
    for part, photos in photo_means(embeddings):
        if pooling == "mean":
            add_to_groups(pooled, observations[part], photos)  # only the direction matters, not the number of photos
        else:
            np.maximum.at(pooled, observations[part], photos.astype(np.float32))
    for part in in_parts(count):
        own = pooled[part].astype(np.float64)
        pooled[part] = l2_normalize(np.where(np.isfinite(own), own, 0.0))
    return pooled


def centre(mean: np.ndarray) -> list[Layer]:
    """Subtract the mean of the reference set, which all photos share (SimpleShot, https://arxiv.org/abs/1911.04623)."""
    return [layer(np.eye(len(mean)), -mean)]


@dataclass(frozen=True)
class WithinClassVariation:
    """How the photos of a class differ from its mean.

    Attributes:
        covariance: (features, features), over photos and views.
        samples: (photos, features) float32 differences of some photos, to estimate its shrinkage from: they are of
            photos alone, because views of one photo are not independent.
    """

    covariance: np.ndarray
    samples: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray | StoredEmbeddings, labels: np.ndarray) -> "WithinClassVariation":
        """The variation within the classes of a reference set.

        Args:
            embeddings: (photos, views, features), rows of length 1.
            labels: (photos,) index of the class of each photo.
        """
        views = embeddings.shape[1]
        sizes = np.bincount(labels)
        means = scratch_array((len(sizes), embeddings.shape[2]))
        for part, photos in photo_means(embeddings):
            add_to_groups(means, labels[part], photos)
        for part in in_parts(len(means)):
            means[part] /= np.maximum(sizes[part], 1)[:, None]

        def residuals(rows: np.ndarray) -> np.ndarray:
            photo, view = np.divmod(rows, views)
            return np.asarray(embeddings[photo])[np.arange(len(photo)), view] - means[labels[photo]]

        drawn = np.arange(len(embeddings) * views)
        if len(drawn) > COVARIANCE_SAMPLES:
            drawn = np.sort(np.random.default_rng(0).choice(drawn, COVARIANCE_SAMPLES, replace=False))
        covariance = np.zeros((embeddings.shape[2],) * 2)
        for part in np.array_split(drawn, 1 + len(drawn) // 4096):  # in float64, all at once would take gigabytes
            own = residuals(part)
            covariance += own.T @ own / len(drawn)
        rng = np.random.default_rng(0)
        if len(labels) - np.count_nonzero(sizes) > 1:
            usable = rng.permutation(np.flatnonzero(sizes[labels] > 1))[:SHRINKAGE_SAMPLES]
            samples = np.asarray(embeddings[usable]).mean(axis=1, dtype=np.float64) - means[labels[usable]]
        else:  # only one class has a second photo, or none: there are nothing but views
            samples = residuals(rng.permutation(drawn)[:SHRINKAGE_SAMPLES])
        return cls(covariance, samples.astype(np.float32))

    def scaled(self, scales: np.ndarray) -> "WithinClassVariation":
        """That of features times some (features,) factors, without those whose factor is 0."""
        kept = scales > 0
        covariance = self.covariance[np.ix_(kept, kept)] * np.outer(scales[kept], scales[kept])
        return WithinClassVariation(covariance, self.samples[:, kept] * scales[kept].astype(self.samples.dtype))


def scale_features(layers: Sequence[Layer], scales: np.ndarray) -> list[Layer]:
    """Layers that scale the features themselves, of layers that were fitted on scaled features.

    Args:
        layers: fitted on features times their factor, without those whose factor is 0.
        scales: (features,) factors.
    """
    first, kept = layers[0], torch.tensor(scales > 0)
    weight = torch.zeros(len(scales), first.weight.shape[1])
    weight[kept] = first.weight * torch.tensor(scales[scales > 0], dtype=weight.dtype)[:, None]
    return [replace(first, weight=weight), *layers[1:]]


class Whitening:
    """Centre, and shrink the directions in which a class varies within itself.

    Variation between photos, views and specimens of one class says nothing about the class, as in linear discriminant
    analysis. The within-class covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004,
    https://doi.org/10.1016/S0047-259X(03)00096-4). It includes the variation between views: so classes of a single
    photo contribute too, and the encoder's sensitivity to rotations is reduced.

    Attributes:
        variances_, directions_: eigenvalues (features,) and eigenvectors (features, features) of the within-class
            covariance.
    """

    def fit(self, embeddings: np.ndarray | StoredEmbeddings, labels: np.ndarray):
        """Fit on a reference set.

        Args:
            embeddings: (photos, views, features), rows of length 1.
            labels: (photos,) index of the class of each photo.
        """
        return self.fit_variation(WithinClassVariation.of(embeddings, labels))

    def fit_variation(self, variation: WithinClassVariation):
        """Fit on the variation within the classes of a reference set."""
        samples = variation.samples.astype(np.float64)
        shrinkage = ledoit_wolf_shrinkage(samples, assume_centered=True) if len(samples) > 1 else 1.0
        self.variances_, self.directions_ = np.linalg.eigh(shrunk_covariance(variation.covariance, shrinkage))
        return self

    def layers(self, exponent: float, mean: np.ndarray) -> list[Layer]:
        """One linear map that subtracts a mean, (features,), and whitens: exponent 1 fully, 0 not at all."""
        weight = self.directions_ * np.maximum(self.variances_, 1e-12) ** (-exponent / 2)
        weight /= np.abs(weight).max()  # only directions matter, and single precision prefers moderate values
        return [layer(weight, -mean @ weight)]


class ClassMeans:
    """One prototype per class: the mean of its observations, shrunk towards related classes.

    The means are those of prototypical networks (Snell et al. 2017, https://arxiv.org/abs/1703.05175). A class with one
    observation learns most from its relatives (James-Stein shrinkage): the mean of n observations has weight n.

    Args:
        genus: weight of the mean over the other classes of the genus. It is 0 where there are none.
        family: weight of the mean over the other genera of the family, each genus being the mean of its classes. It is
            0 where there are none.
        text: weight of the embedding of the class's name. It is 0 where there is none.
    """

    def __init__(self, genus: float = 0.0, family: float = 0.0, text: float = 0.0):
        self.genus, self.family, self.text = genus, family, text

    def fit(self, embeddings: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy):
        """Fit on a reference set.

        Args:
            embeddings: (observations, features) after the transform, rows of length 1.
            labels: (observations,) index of the class of each.
            taxonomy: of all classes, also those without an observation.
        """
        return self.fit_means(*group_means(embeddings, labels, len(taxonomy.genus)), taxonomy)

    def fit_means(self, means: np.ndarray, sizes: np.ndarray, taxonomy: Taxonomy, texts: np.ndarray | None = None):
        """Fit on the mean of each class, (classes, features), and the number of its observations, (classes,).

        Args:
            texts: of `align_texts`; None without names, and without a weight for them.
        """
        present, relatives = sizes > 0, []
        if self.genus:
            relatives.append((self.genus, OtherMeans(means, present, taxonomy.genus), np.arange(len(means))))
        if self.family:  # the mean over genera, so that every genus counts the same
            pairs = np.stack([taxonomy.family, taxonomy.genus], axis=1)
            genera, genus = np.unique(pairs, axis=0, return_inverse=True)
            genus = genus.reshape(-1)  # numpy 2.0.0 gives it a second axis
            sizes_of_genera = np.bincount(genus[present], minlength=len(genera))
            genus_means = group_sums(means, genus, len(genera))
            genus_means /= np.maximum(sizes_of_genera, 1)[:, None]
            relatives.append((self.family, OtherMeans(genus_means, sizes_of_genera > 0, genera[:, 0]), genus))
        prototypes, norms = scratch_array(means.shape, np.float32), np.empty(len(means))
        for part in in_parts(len(means)):  # with 65,000 classes, all at once would take gigabytes
            total, weight = sizes[part, None] * means[part], sizes[part].astype(float)
            for factor, others, index in relatives:
                mean, count = others.of(index[part])
                total += factor * mean
                weight += factor * (count > 0)
            if self.text:
                total += self.text * texts[part]
                weight += self.text * texts[part].any(axis=1)
            own = total / np.maximum(weight, 1e-9)[:, None]
            prototypes[part], norms[part] = l2_normalize(own), np.linalg.norm(own, axis=1)
        self.prototypes_, self.prototype_labels_ = prototypes, np.arange(len(sizes))
        self.counts_ = sizes * norms
        self.bias_, self.logit_scale_ = np.where(present, 0.0, ABSENT), LOGIT_SCALE
        return self


class OtherMeans:
    """The mean over the other members of each one's group.

    Args:
        values: (members, features), zeros for a member that is not present.
        present: (members,) bool, those that count.
        groups: (members,) index of the group of each.
    """

    def __init__(self, values: np.ndarray, present: np.ndarray, groups: np.ndarray):
        self.values, self.present, self.groups = values, present, groups
        self.sizes = np.bincount(groups[present], minlength=groups.max() + 1)
        self.totals = group_sums(values, groups, len(self.sizes))

    def of(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over the others of some members, (members, features), and their number, (members,)."""
        groups = self.groups[members]
        count = self.sizes[groups] - self.present[members]
        others = (self.totals[groups] - self.values[members]) * (count > 0)[:, None]  # without rounding errors of none
        return others / np.maximum(count, 1)[:, None], count


def align_texts(texts: np.ndarray, layers: Sequence[Layer], means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Move the embeddings of the classes' names to where the class means are.

    A CLIP's embeddings of texts and of photos lie in two different cones (Liang et al. 2022,
    https://arxiv.org/abs/2203.02053). So the mean over the classes is subtracted from the texts, as the layers subtract
    that of the photos, and then they are whitened in the same way. Their length is the average one of the class means.

    Args:
        texts: (classes, features), rows of length 1; zeros for a class without a name.
        layers: before the matcher: one linear map.
        means, sizes: see `ClassMeans.fit_means`.

    Returns:
        (classes, features) float32; zeros for a class without a name.
    """
    named, [linear] = texts.any(axis=1), layers
    mean, weight = texts[named].mean(axis=0, dtype=np.float64), linear.weight.double().numpy()
    length = np.linalg.norm(means[sizes > 0], axis=1).mean()
    aligned = scratch_array((len(texts), weight.shape[1]), np.float32)
    for part in in_parts(len(texts)):
        aligned[part] = named[part, None] * length * l2_normalize((texts[part] - mean) @ weight)
    return aligned


def reduce_hubness(bank: Bank, values: np.ndarray, labels: np.ndarray, weight: float) -> Bank:
    """Lower the bias of the classes whose prototypes are near to the observations of many other classes.

    Such hubs are among the first guesses of every query, and so take the ranks of other classes (Radovanović et al.
    2010, https://jmlr.org/papers/v11/radovanovic10a.html). How near a prototype is to the others is a smooth maximum
    of its cosines to observations, as in QB-Norm (Bogolin et al. 2022, https://arxiv.org/abs/2112.12777), here to those
    of the reference set that belong to other classes, so that it does not depend on the test set.

    Args:
        bank: with one prototype per class.
        values: (observations, features of the prototypes) of the reference set, rows of length 1.
        labels: (observations,) index of the class of each.
        weight: of the correction; 1 would subtract the smooth maximum from each cosine.
    """
    totals, sizes = torch.zeros(len(bank.bias)), np.bincount(labels, minlength=len(bank.bias))
    for part in in_parts(len(labels)):
        nearness = (HUBNESS_SCALE * (to_float32(values[part]) @ bank.prototypes.T)).exp_()
        nearness[torch.arange(len(nearness)), torch.tensor(labels[part])] = 0
        totals += nearness.sum(dim=0)
    hubness = (totals / to_float32(np.maximum(len(labels) - sizes, 1))).clamp(min=1e-9).log() / HUBNESS_SCALE
    lowered = bank.bias - weight * bank.logit_scale * hubness
    return replace(bank, bias=torch.where(bank.bias > ABSENT, lowered, bank.bias))


class NearestNeighbour:
    """Every observation is a prototype, so that a class scores as its nearest observation."""

    def fit(self, embeddings: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy):
        """See `ClassMeans.fit`."""
        order = np.argsort(labels, kind="stable")
        self.prototypes_, self.counts_ = scratch_array(embeddings.shape, np.float32), np.empty(len(order))
        self.prototype_labels_ = labels[order]
        for part in in_parts(len(order)):
            own = embeddings[order[part]].astype(np.float64)
            self.prototypes_[part], self.counts_[part] = l2_normalize(own), np.linalg.norm(own, axis=1)
        self.bias_ = np.where(np.isin(np.arange(len(taxonomy.genus)), labels), 0.0, ABSENT)
        self.logit_scale_ = LOGIT_SCALE
        return self


def refuse_large(matcher: str, observations: int, classes: int, values: int) -> None:
    """Check that a matcher that is trained fits in memory; the others read the embeddings part by part.

    Args:
        values: photos in all views times features.

    Raises:
        InputError: it does not.
    """
    scores = observations * classes
    if scores > MAX_LOGITS if matcher == "logistic" else values + scores // FOLDS > MAX_VALUES:
        raise InputError(
            f"the matcher {matcher} needs too much memory for {observations:,} observations of {classes:,} classes: "
            'set matcher = "means", and leave matcher out of choose'
        )


class LinearProbe:
    """Multinomial logistic regression with balanced classes.

    The prototypes are its coefficients, which are not of length 1, and its logit scale is 1. So the bank's
    log-probabilities are those of scikit-learn's model.
    """

    def fit(self, embeddings: np.ndarray, labels: np.ndarray, taxonomy: Taxonomy):
        """See `ClassMeans.fit`."""
        count = len(taxonomy.genus)
        model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=300, tol=1e-3)
        with warnings.catch_warnings():  # scikit-learn warns of many classes with few observations
            warnings.simplefilter("ignore")
            model.fit(embeddings.astype(np.float32), labels)  # half the time of float64
        weights, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        self.prototypes_, self.bias_ = np.zeros((count, embeddings.shape[1])), np.full(count, ABSENT)
        self.prototypes_[model.classes_], self.bias_[model.classes_] = weights, bias
        self.logit_scale_ = 1.0
        self.prototype_labels_ = np.arange(count)
        self.counts_ = np.bincount(labels, minlength=count).astype(float)
        return self


def layer(weight: np.ndarray, bias: np.ndarray) -> Layer:
    """A linear map as a layer of the kernel."""
    return Layer(to_float32(weight), to_float32(bias), torch.tensor(0.0))


def to_float32(values: np.ndarray | float) -> torch.Tensor:
    """A tensor in single precision, in which the kernel computes."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def make_bank(
    layers: Sequence[Layer],
    matcher: ClassMeans | NearestNeighbour | LinearProbe,
    logit_scale: float | None = None,
    mixture_weight: float = 1.0,
) -> Bank:
    """The kernel's bank of a fitted transform's layers and a fitted matcher.

    Args:
        logit_scale: inverse temperature; None: the matcher's own.
    """
    bank = Bank(
        layers=tuple(layers),
        prototypes=to_float32(matcher.prototypes_),
        prototype_labels=torch.tensor(matcher.prototype_labels_),
        counts=to_float32(matcher.counts_),
        bias=to_float32(matcher.bias_),
        logit_scale=to_float32(matcher.logit_scale_),
        mixture_weight=to_float32(mixture_weight),
        transduction=to_float32(0.0),
    )
    return bank if logit_scale is None else rescale(bank, logit_scale)


def rescale(bank: Bank, logit_scale: float) -> Bank:
    """The bank at another inverse temperature, which multiplies all logits, the bias included.

    The ranking of the classes stays the same, and an absent class stays absent.
    """
    bias = torch.where(bank.bias > ABSENT, bank.bias * (logit_scale / bank.logit_scale), bank.bias)
    return replace(bank, bias=bias, logit_scale=to_float32(logit_scale))


def expand_to_classes(bank: Bank, bank_classes: Sequence[str], classes: Sequence[str]) -> Bank:
    """The bank over a longer list of classes; those that `bank_classes` lacks are never predicted."""
    index = {class_id: label for label, class_id in enumerate(classes)}
    labels = torch.tensor([index[class_id] for class_id in bank_classes])
    bias = torch.full((len(classes),), ABSENT)
    bias[labels] = bank.bias
    return replace(bank, prototype_labels=labels[bank.prototype_labels], bias=bias)


def class_means_bank(embeddings: np.ndarray, labels: np.ndarray, count: int) -> Bank:
    """The simplest bank: centred class means.

    Args:
        embeddings: (observations, features), rows of length 1.
        labels: (observations,) index of the class of each, of `count` classes.
    """
    layers = centre(l2_normalize(embeddings).mean(axis=0))
    return make_bank(layers, ClassMeans().fit(transform(layers, embeddings), labels, Taxonomy.unknown(count)))


def transform(layers: Sequence[Layer], embeddings: np.ndarray) -> np.ndarray:
    """The kernel's layers in its precision: (rows, features) -> (rows, features out) float32, rows of length 1.

    In double precision it would take most of the time of a selection.
    """
    return l2_normalize(apply_layers(layers, to_float32(embeddings)).numpy())


def save_banks(banks: Sequence[Bank], path: Path) -> None:
    """Write what `kernel.bank.read_banks` reads."""
    tensors = {}
    for number, bank in enumerate(banks):
        tensors |= {f"{number}.{name}": value for name, value in vars(bank).items() if name != "layers"}
        for index, part in enumerate(bank.layers):
            tensors |= {f"{number}.layers.{index}.{name}": value for name, value in vars(part).items()}
    write_tensors(tensors, path)


def commonest_classes(class_ids: np.ndarray, classes: Sequence[str], count: int = 10) -> list[str]:
    """The classes with the most observations, in order: the prediction where no photo can be read."""
    counts = Counter(class_ids)
    return sorted(classes, key=lambda class_id: -counts[class_id])[:count]

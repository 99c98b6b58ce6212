"""Fit the bank that some settings describe, on the embeddings of labelled observations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernel.bank import Bank, Layer
from local.banks.estimators import (
    HUBNESS_SAMPLES,
    ClassMeans,
    LinearProbe,
    NearestNeighbour,
    Whitening,
    WithinClassVariation,
    add_to_groups,
    align_texts,
    centre,
    in_parts,
    make_bank,
    pool,
    reduce_hubness,
    rescale,
    scale_features,
    transform,
)
from local.banks.projection import ProjectionEnsemble
from local.base.scratch import scratch_array
from local.data.concatenated_encoders import FeatureBlock
from local.data.observations import Taxonomy
from local.data.stored_embeddings import StoredEmbeddings
from local.recipes.settings import CANDIDATES, BankSettings

KEPT = 2 << 30  # bytes of whitenings: of the folds and the weights of two encoders with 1,700 features each


@dataclass(frozen=True)
class Embedded:
    """Labelled observations as embeddings of their photos.

    Attributes:
        values: (photos, views, features), rows of length 1; in memory, or on disk.
        views: the name of each view.
        observations: (photos,) index of the observation of each photo.
        labels: (observations,) index of the class of each; -1 for a class that the bank lacks.
        taxonomy: of the bank's classes.
        head: the bank that was trained with the encoder, if there is one.
        texts: embeddings of the names of the bank's classes, (classes, features), if they are known; see
            `local.encoders.texts.embed_classes`.
        blocks: of the features, in their order; empty where neither encoders nor parts of a pooling are weighted.
    """

    values: np.ndarray | StoredEmbeddings
    views: tuple[str, ...]
    observations: np.ndarray
    labels: np.ndarray
    taxonomy: Taxonomy
    head: Bank | None = None
    texts: np.ndarray | None = None
    blocks: tuple[FeatureBlock, ...] = ()
    pooled_cache: dict = field(default_factory=dict, init=False, compare=False)
    transform_cache: dict = field(default_factory=dict, init=False, compare=False)
    variations: dict[bytes, WithinClassVariation] = field(default_factory=dict, init=False, compare=False)
    whitenings: dict[tuple[bytes, bytes], Whitening] = field(default_factory=dict, init=False, compare=False)

    def subset(self, mask: np.ndarray) -> "Embedded":
        """The observations where `mask`, (observations,) bool, is true."""
        photos = mask[self.observations]
        return replace(
            self,
            values=self.values[photos],
            observations=(np.cumsum(mask) - 1)[self.observations[photos]],
            labels=self.labels[mask],
        )

    def readable(self, mask: np.ndarray) -> np.ndarray:
        """Of the observations in `mask`, (observations,) bool, those with a photo that could be read."""
        return mask & (np.bincount(self.observations, minlength=len(mask)) > 0)

    def pooled(self, settings: BankSettings) -> np.ndarray:
        """(observations, features), rows of length 1 or 0, over the settings' views; the last two results are kept."""
        key = (settings.views, settings.pooling)
        if key not in self.pooled_cache:
            if len(self.pooled_cache) > 1:
                del self.pooled_cache[next(iter(self.pooled_cache))]
            columns = [self.views.index(view) for view in settings.views]
            pooled = pool(self.values[:, columns], self.observations, len(self.labels), settings.pooling)
            self.pooled_cache[key] = pooled
        return self.pooled_cache[key]

    @property
    def pool_parts(self) -> tuple[str, ...]:
        """The values of `pool_part` that these embeddings have, "all" among them."""
        own = {"all", *(block.part for block in self.blocks)}
        return tuple(name for name in CANDIDATES["pool_part"] if name in own)

    def scales(self, settings: BankSettings) -> np.ndarray | None:
        """(features,) float32 factors of at most 1, by `encoder_weights` and `pool_part`; None if all are 1."""
        if not settings.encoder_weights and settings.pool_part == "all":
            return None
        weights = settings.encoder_weights or (1.0,) * (1 + max(block.encoder for block in self.blocks))
        scales, largest = [], max(weights[block.encoder] for block in self.blocks)
        for block in self.blocks:
            own = {one.part for one in self.blocks if one.encoder == block.encoder}
            is_used = settings.pool_part not in own or settings.pool_part == block.part
            weight = weights[block.encoder] / largest  # only ratios count, and float32 has its limits
            scales.append(np.full(block.features, weight * is_used, dtype=np.float32))
        return np.concatenate(scales)

    def whitening(self, reference: np.ndarray, scales: np.ndarray | None = None) -> Whitening:
        """The within-class covariance of a reference set over all views; the exponent is chosen later.

        Those that were used last are kept. To fit one takes seconds where there are thousands of features, and a search
        tries the same factors of the features again for other settings.
        """
        mask = reference.tobytes()
        key = mask, b"" if scales is None else scales.tobytes()
        whitening = self.whitenings.pop(key, None)
        if whitening is None:
            variation = self._variation(reference, is_kept=scales is not None)
            whitening = Whitening().fit_variation(variation if scales is None else variation.scaled(scales))
            whitening.directions_ = whitening.directions_.astype(np.float32)  # the precision of the bank
        self.whitenings[key] = whitening
        while sum(one.directions_.nbytes for one in self.whitenings.values()) > max(KEPT, whitening.directions_.nbytes):
            del self.whitenings[next(iter(self.whitenings))]
        return whitening

    def _variation(self, reference: np.ndarray, is_kept: bool) -> WithinClassVariation:
        """The variation within the classes of a reference set, fitted once if it is kept for other factors."""
        mask = reference.tobytes()
        if mask in self.variations:
            return self.variations[mask]
        own = self.subset(reference)
        variation = WithinClassVariation.of(own.values, own.labels[own.observations])
        if is_kept:
            self.variations[mask] = variation
        return variation

    def transformed(self, settings: BankSettings, reference: np.ndarray) -> tuple[list[Layer], np.ndarray]:
        """The layers before the matcher, fitted on a reference set, and its embeddings after them.

        This is the slow part of a candidate. Its results are kept for the next candidates, until a setting before the
        matcher changes.

        Args:
            reference: (observations,) bool, the reference set.

        Returns:
            The layers, and (reference observations, features) float32, rows of length 1.
        """
        layers, kept = self._layers(settings, reference)
        if "values" not in kept:
            values = scratch_array((int(reference.sum()), layers[-1].weight.shape[1]), np.float32)
            for part, _, own in self._transformed_parts(settings, reference, layers):
                values[part] = own
            kept["values"] = values
        return layers, kept["values"]

    def class_means(self, settings: BankSettings, reference: np.ndarray) -> tuple[list[Layer], np.ndarray, np.ndarray]:
        """The layers as `transformed`, and the mean and the size of each class after them, kept as long.

        Returns:
            The layers, (classes, features), zeros for a class without an observation, and (classes,).
        """
        layers, kept = self._layers(settings, reference)
        if "means" not in kept:
            means = scratch_array((len(self.taxonomy.genus), layers[-1].weight.shape[1]))
            for _, rows, own in self._transformed_parts(settings, reference, layers):
                add_to_groups(means, self.labels[rows], own)
            sizes = np.bincount(self.labels[reference], minlength=len(means))
            for part in in_parts(len(means)):
                means[part] /= np.maximum(sizes[part], 1)[:, None]
            kept["means"] = means, sizes
        return layers, *kept["means"]

    def aligned_texts(self, settings: BankSettings, reference: np.ndarray) -> np.ndarray:
        """The embeddings of the classes' names where their `class_means` are, (classes, features), kept as long."""
        layers, means, sizes = self.class_means(settings, reference)
        _, kept = self._layers(settings, reference)
        if "texts" not in kept:
            kept["texts"] = align_texts(self.texts, layers, means, sizes)
        return kept["texts"]

    def _layers(self, settings: BankSettings, reference: np.ndarray) -> tuple[list[Layer], dict]:
        """The layers before the matcher, and what is kept beside them."""
        mask = reference.tobytes()
        key = (settings.views, settings.pooling, settings.whitening, settings.encoder_weights, settings.pool_part)
        if key not in self.transform_cache:
            self.transform_cache.clear()
            self.transform_cache[key] = {}
        if mask not in self.transform_cache[key]:
            self.transform_cache[key][mask] = fit_layers(settings, self, reference), {}
        return self.transform_cache[key][mask]

    def _transformed_parts(
        self, settings: BankSettings, reference: np.ndarray, layers: Sequence[Layer]
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """One part of the reference set after another: where it is in that, its observations, and their embeddings."""
        pooled, rows = self.pooled(settings), np.flatnonzero(reference)
        for part in in_parts(len(rows)):
            yield part, rows[part], transform(layers, pooled[rows[part]])


def fit_banks(
    settings: BankSettings,
    embedded: Embedded,
    reference: np.ndarray,
    logit_scales: Sequence[float] = (),
    seed: int = 0,
) -> list[Bank]:
    """The banks of some settings.

    Args:
        reference: (observations,) bool, the reference set.
        logit_scales: inverse temperatures, one per group of `logit_scale_groups`; empty: those of the matchers.
        seed: of matchers that are trained.
    """
    reference = embedded.readable(reference)
    banks = fit_matcher(settings, embedded, reference, seed)
    return finish(settings, banks, class_prior(settings, embedded, reference), logit_scales)


def fit_matcher(settings: BankSettings, embedded: Embedded, reference: np.ndarray, seed: int) -> list[Bank]:
    """The banks at the logit scales that they were fitted at, without the class prior; see `fit_banks`."""
    labels, weight = embedded.labels[reference], settings.nearest_neighbour_weight
    if settings.matcher == "head":
        banks = [embedded.head]
    elif settings.matcher == "projection":
        banks = fit_projection(settings, embedded.subset(reference), embedded.pooled(settings)[reference], seed)
    elif settings.matcher == "logistic":
        layers, values = embedded.transformed(settings, reference)
        banks = [make_bank(layers, LinearProbe().fit(values, labels, embedded.taxonomy))]
    else:
        layers, means, sizes = embedded.class_means(settings, reference)
        texts = embedded.aligned_texts(settings, reference) if settings.text_weight else None
        matcher = ClassMeans(settings.genus_weight, settings.family_weight, settings.text_weight)
        bank = make_bank(layers, matcher.fit_means(means, sizes, embedded.taxonomy, texts))
        if settings.hubness_weight:
            rows = np.flatnonzero(reference)
            if len(rows) > HUBNESS_SAMPLES:
                rows = np.sort(np.random.default_rng(seed).choice(rows, HUBNESS_SAMPLES, replace=False))
            values = transform(layers, embedded.pooled(settings)[rows])
            bank = reduce_hubness(bank, values, embedded.labels[rows], settings.hubness_weight)
        banks = [bank]
    banks = [replace(bank, mixture_weight=bank.mixture_weight * (1 - weight)) for bank in banks]
    if weight:
        layers, values = embedded.transformed(settings, reference)
        matcher = NearestNeighbour().fit(values, labels, embedded.taxonomy)
        banks.append(make_bank(layers, matcher, mixture_weight=weight))
    # Coefficients of a linear classifier are not means of observations, and test observations do not move them.
    transduction = torch.tensor(0.0 if settings.matcher == "logistic" else settings.transduction)
    return [replace(bank, transduction=transduction) for bank in banks]


def class_prior(settings: BankSettings, embedded: Embedded, reference: np.ndarray) -> torch.Tensor:
    """(classes,) log prior probabilities, by the number of observations, to add to the logits."""
    sizes = torch.bincount(torch.tensor(embedded.labels[reference]), minlength=len(embedded.taxonomy.genus))
    return settings.class_prior_exponent * sizes.clamp(min=1).log()


def finish(
    settings: BankSettings, banks: Sequence[Bank], log_prior: torch.Tensor, logit_scales: Sequence[float] = ()
) -> list[Bank]:
    """The banks at some logit scales, with the class prior, which no logit scale changes; see `fit_banks`."""
    groups = [banks[group] for group in logit_scale_groups(settings)]
    logit_scales = logit_scales or [float(group[0].logit_scale) for group in groups]
    scaled = [rescale(bank, scale) for group, scale in zip(groups, logit_scales, strict=True) for bank in group]
    return [replace(bank, bias=bank.bias + log_prior) for bank in scaled]


def fit_layers(settings: BankSettings, embedded: Embedded, reference: np.ndarray) -> list[Layer]:
    """The layers before the matcher; see `Embedded.transformed`."""
    pooled, rows = embedded.pooled(settings), np.flatnonzero(reference)
    mean = sum(pooled[rows[part]].sum(axis=0, dtype=np.float64) for part in in_parts(len(rows))) / len(rows)
    scales = embedded.scales(settings)
    scaled = mean if scales is None else (mean * scales)[scales > 0]
    if settings.whitening:
        layers = embedded.whitening(reference, scales).layers(settings.whitening, scaled)
    else:
        layers = centre(scaled)
    return layers if scales is None else scale_features(layers, scales)


def fit_projection(settings: BankSettings, reference: Embedded, pooled: np.ndarray, seed: int) -> list[Bank]:
    """The members of a projection ensemble, each with its own layers; `pooled` as the kernel will see it."""
    ensemble = ProjectionEnsemble(
        settings.whitening, genus=settings.genus_weight, family=settings.family_weight, seed=seed
    )
    labels, values, scales = reference.labels[reference.observations], reference.values, reference.scales(settings)
    if scales is not None:
        kept = scales > 0
        scales = scales / np.linalg.norm(pooled * scales, axis=1).mean()  # training expects embeddings of length 1
        values, pooled = np.asarray(values)[:, :, kept] * scales[kept], pooled[:, kept] * scales[kept]
    banks = ensemble.fit(values, reference.observations, labels, reference.taxonomy, pooled=pooled).banks_
    return [bank if scales is None else replace(bank, layers=scale_features(bank.layers, scales)) for bank in banks]


def logit_scale_groups(settings: BankSettings) -> list[slice]:
    """Which banks have the same logit scale: those of the matcher, and that of the nearest neighbour."""
    return [slice(-1), slice(-1, None)] if settings.nearest_neighbour_weight else [slice(None)]

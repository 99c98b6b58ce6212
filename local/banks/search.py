"""Select a bank by cross-validation, without the test set; no query is in the reference set that it is scored with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from kernel.bank import Bank, Layer, classify, collect_rows, largest, log_softmax_, refine_transductively
from kernel.metadata_prior import WeightedPrior
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
from local.banks.folds import FOLDS, MAX_SCORES, macro_weights, shot_weights
from local.banks.projection import ProjectionEnsemble
from local.base.console import progress
from local.base.metrics import GUESSES, gained, objective
from local.base.scratch import scratch_array
from local.data.joined_encoders import FeatureBlock
from local.data.observations import Taxonomy
from local.data.stored_embeddings import StoredEmbeddings
from local.recipes.settings import CANDIDATES, VIEW_GROUPS, BankSettings

Prior = torch.Tensor | WeightedPrior  # (queries, classes)
QUERIES = 256  # whose scores are compared at once: with tens of thousands of classes they stay under 100 MB
LOGIT_SCALE_QUERIES = 1000  # enough for one number
# Multiples of the logit scale that a matcher was fitted at; 1 comes first, and stays unless another is better.
LOGIT_SCALE_FACTORS = 2.0 ** np.array(sorted(np.arange(-3, 4.5, 0.5), key=abs))


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
        blocks: of the features, in their order; empty: they are of one encoder with one pooling.
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
        """(features,) factors of the features, by `encoder_weights` and `pool_part`; None if all are 1."""
        if not settings.encoder_weights and settings.pool_part == "all":
            return None
        scales = []
        for block in self.blocks:
            own = {one.part for one in self.blocks if one.encoder == block.encoder}
            is_used = settings.pool_part not in own or settings.pool_part == block.part
            weight = settings.encoder_weights[block.encoder] if settings.encoder_weights else 1.0
            scales.append(np.full(block.features, weight * is_used))
        return np.concatenate(scales)

    def whitening(self, reference: np.ndarray, scales: np.ndarray | None = None) -> Whitening:
        """The within-class covariance of a reference set over all views; the exponent is chosen later.

        It is fitted once, until other factors of the features are requested.
        """
        mask, key = reference.tobytes(), b"" if scales is None else scales.tobytes()
        if any(other != key for other, _ in self.whitenings):
            self.whitenings.clear()
        if (key, mask) not in self.whitenings:
            variation = self._variation(reference)
            if scales is not None:
                variation = variation.scaled(scales)
            self.whitenings[key, mask] = Whitening().fit_variation(variation)
        return self.whitenings[key, mask]

    def _variation(self, reference: np.ndarray) -> WithinClassVariation:
        """The variation within the classes of a reference set, kept where several factors of features are possible."""
        mask = reference.tobytes()
        if mask in self.variations:
            return self.variations[mask]
        own = self.subset(reference)
        variation = WithinClassVariation.of(own.values, own.labels[own.observations])
        if len(self.blocks) > 1:
            self.variations[mask] = variation
        return variation

    def transformed(self, settings: BankSettings, reference: np.ndarray) -> tuple[list[Layer], np.ndarray]:
        """The layers before the matcher, fitted on a reference set, and its embeddings after them.

        This is the slow part of a candidate, and successive candidates share it: results are kept until other views,
        another pooling or another whitening exponent are requested.

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
        values, pooled = (
            np.asarray(values)[:, :, kept] * scales[kept],
            pooled[:, kept] * scales[kept].astype(np.float32),
        )
    banks = ensemble.fit(values, reference.observations, labels, reference.taxonomy, pooled=pooled).banks_
    return [bank if scales is None else replace(bank, layers=scale_features(bank.layers, scales)) for bank in banks]


def logit_scale_groups(settings: BankSettings) -> list[slice]:
    """Which banks share a logit scale: those of the matcher, and that of the nearest neighbour."""
    return [slice(-1), slice(-1, None)] if settings.nearest_neighbour_weight else [slice(None)]


@dataclass(frozen=True)
class Evaluation:
    """Predictions beside the true classes.

    Attributes:
        top: (queries, at most 10) classes, best first.
        ranks: (queries,) rank of the true class, 0 for the first; the number of classes if the bank lacks it.
        losses: (queries,) minus the log-probability of the true class; NaN if the bank lacks it.
        logit_scales: those of the banks, with the lowest log-loss before transduction.
        inverse_temperature: times which the log-probabilities are these; see `fit_inverse_temperature`.
    """

    top: np.ndarray
    ranks: np.ndarray
    losses: np.ndarray
    logit_scales: tuple[float, ...] = ()
    inverse_temperature: float = 1.0


def evaluate_predictions(log_probabilities: torch.Tensor | Iterable[torch.Tensor], truth: np.ndarray) -> Evaluation:
    """Compare log-probabilities with the (queries,) true classes, -1 for one that the bank lacks.

    Equal log-probabilities are ranked in the order of the classes, as the kernel ranks them.

    Args:
        log_probabilities: (queries, classes), or chunks of it, of which only one is in memory at a time.
    """
    chunks = [log_probabilities] if isinstance(log_probabilities, torch.Tensor) else log_probabilities
    rest = torch.tensor(truth)

    def compare(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nonlocal rest
        target, rest = rest[: len(scores)], rest[len(scores) :]
        own, top = scores.gather(1, target.clamp(min=0)[:, None]), largest(scores, max(GUESSES))
        is_own = top == target[:, None]
        ranks = torch.where(target < 0, scores.shape[1], is_own.long().argmax(dim=1))
        below = torch.nonzero(~is_own.any(dim=1) & (target >= 0))[:, 0]
        if len(below):  # only they need a comparison with all scores, which is slow
            others, mark = scores[below], own[below]
            is_true = torch.empty_like(others)  # as numbers, of which torch adds up a row in a tenth of the time
            ranks[below] = torch.gt(others, mark, out=is_true).sum(dim=1).long()
            tied = torch.nonzero(torch.eq(others, mark, out=is_true).sum(dim=1) > 1)[:, 0]
            is_before = torch.arange(scores.shape[1]) < target[below][tied, None]
            ranks[below[tied]] += ((others[tied] == mark[tied]) & is_before).sum(dim=1)
        losses = torch.where(target < 0, torch.nan, -own[:, 0].double())
        return top, ranks, losses

    parts = map(compare, chain.from_iterable(chunk.split(QUERIES) for chunk in chunks))
    return Evaluation(*(each.numpy() for each in collect_rows(len(truth), parts)))


class Search:
    """Evaluates candidate settings on held-out observations, each candidate once.

    Args:
        embed: maps a resize mode ("crop", "squash") to the labelled observations in all views.
        resize_mode: any, to read the labels from.
        folds: (reference set, queries), each (observations,) bool.
        guesses: in a row of the submission.
        reference: (observations,) bool, the reference set of the final bank.
        predict_prior: maps a fold's (reference set, queries) to log-probabilities by the queries' metadata, (queries,
            classes), all at once or in slices; or to None.
        is_macro: all classes count the same, as in a macro-F1, rather than all observations.
        held_out: (observations,) bool, those that the queries were drawn from; None: all of them are queries.
        seed: of matchers that are trained, and of the parts of `nested_predictions`.
        metric: of the competition; see `local.base.metrics.objective`.
    """

    def __init__(
        self,
        embed: Callable[[str], Embedded],
        resize_mode: str,
        folds: Sequence[tuple[np.ndarray, np.ndarray]],
        guesses: int,
        reference: np.ndarray,
        predict_prior: Callable[[np.ndarray, np.ndarray], Prior | None] = lambda *fold: None,
        is_macro: bool = False,
        held_out: np.ndarray | None = None,
        seed: int = 0,
        metric: str = "",
    ):
        self.embed, self.folds, self.guesses, self.predict_prior, self.seed = embed, folds, guesses, predict_prior, seed
        self.resize_mode, self.metric = resize_mode, metric
        labels, count = embed(resize_mode).labels, len(embed(resize_mode).taxonomy.genus)
        self.encoders = 1 + max((block.encoder for block in embed(resize_mode).blocks), default=0)
        self.pool_parts = embed(resize_mode).pool_parts
        self.queries = np.concatenate([np.flatnonzero(queries) for _, queries in folds])
        self.truth = labels[self.queries]
        shots = [np.bincount(labels[fold], minlength=count + 1)[labels[queries]] for fold, queries in folds]
        if is_macro:
            self.weights = macro_weights(self.truth, self.truth if held_out is None else labels[held_out])
        else:
            self.weights = shot_weights(np.concatenate(shots), labels[reference])
        self.priors: dict[int, Prior | None] = {}
        self.evaluations: dict[BankSettings, Evaluation] = {}

    def evaluate(self, settings: BankSettings) -> Evaluation:
        """The evaluation of one candidate on all queries, fold after fold."""
        if settings not in self.evaluations:
            folds, logit_scales = self.fit_folds(settings)
            predicted = self.predict_all(settings, folds)
            inverse_temperature = self.fit_inverse_temperature(predicted, np.ones(len(self.truth), dtype=bool))
            evaluation = evaluate_predictions(sharpen_(predicted, inverse_temperature), self.truth)
            self.evaluations[settings] = replace(
                evaluation, logit_scales=logit_scales, inverse_temperature=inverse_temperature
            )
        return self.evaluations[settings]

    def weighted_objective(self, settings: BankSettings) -> np.ndarray:
        """(queries,) the weighted `objective`, of which the mean is maximised."""
        found = self.evaluate(settings)
        return self.weights * objective(self.metric, found.ranks, found.losses, self.guesses)

    def fit_folds(self, settings: BankSettings) -> tuple[list[list[Bank]], tuple[float, ...]]:
        """The banks of each fold, and the logit scales of all folds, those with the lowest log-loss."""
        embedded, fitted, log_priors = self.embed(settings.resize_mode), [], []
        for reference, _ in self.folds:
            readable = embedded.readable(reference)
            fitted.append(fit_matcher(settings, embedded, readable, self.seed))
            log_priors.append(class_prior(settings, embedded, readable))
        # One for all folds, fitted without transduction.
        drawn = draw_mask(len(self.truth), LOGIT_SCALE_QUERIES)
        rows = [np.flatnonzero(queries) for _, queries in self.folds]
        masks = np.split(drawn, np.cumsum([len(own) for own in rows])[:-1])
        pooled = [self.pooled(settings, own[mask]) for own, mask in zip(rows, masks, strict=True)]
        logit_scales = tuple(
            fit_logit_scale([banks[group] for banks in fitted], log_priors, pooled, self.truth[drawn])
            for group in logit_scale_groups(settings)
        )
        banks = [finish(settings, own, prior, logit_scales) for own, prior in zip(fitted, log_priors, strict=True)]
        return banks, logit_scales

    def pooled(self, settings: BankSettings, observations: np.ndarray) -> torch.Tensor:
        """(observations, features) of some observations, given by their indices or a mask."""
        return torch.from_numpy(self.embed(settings.resize_mode).pooled(settings)[observations])

    def predict(self, settings: BankSettings, folds: Iterable[Sequence[Bank]]) -> Iterator[torch.Tensor]:
        """Log-probabilities of the queries by their photos and metadata, (queries of a chunk, classes).

        Args:
            folds: the banks of each.
        """
        for number, ((_, queries), banks) in enumerate(zip(self.folds, folds, strict=True)):
            by_metadata = self.metadata_prior(number) if settings.metadata_weight else None
            first, rows = 0, np.flatnonzero(queries)
            # Transduction needs all queries at once, which are gigabytes of a million.
            parts = [rows] if any(bank.transduction for bank in banks) else [rows[part] for part in in_parts(len(rows))]
            for predicted in chain.from_iterable(classify(banks, self.pooled(settings, part)) for part in parts):
                if by_metadata is not None:
                    own = by_metadata[first : first + len(predicted)]
                    predicted = predicted + settings.metadata_weight * own
                first += len(predicted)
                yield predicted.log_softmax(dim=1) if settings.metadata_weight else predicted

    def predict_all(self, settings: BankSettings, folds: Iterable[Sequence[Bank]]) -> torch.Tensor:
        """The same of all queries at once, (queries, classes); a search has few enough."""
        [predicted] = collect_rows(len(self.truth), ((part,) for part in self.predict(settings, folds)))
        return predicted

    def fit_inverse_temperature(self, predicted: torch.Tensor, query_mask: np.ndarray) -> float:
        """`fit_inverse_temperature` on some of the queries, weighted as their scores are.

        Args:
            predicted: of `predict_all`.
            query_mask: (queries,) bool.
        """
        rows = np.flatnonzero(query_mask)
        rows = rows[draw_mask(len(rows), LOGIT_SCALE_QUERIES)]
        return fit_inverse_temperature(predicted[torch.from_numpy(rows)], self.truth[rows], self.weights[rows])

    def view_votes(self, settings: BankSettings, folds: Sequence[Sequence[Bank]], query_mask: np.ndarray) -> np.ndarray:
        """(rows, 3) int: a query, a class, and how many views of its photos have that class as their first guess.

        Each view is classified with the bank and the metadata of its observation, after transduction by all queries.

        Args:
            folds: of `fit_folds`.
            query_mask: (queries,) bool, the queries to return.
        """
        embedded, parts = self.embed(settings.resize_mode), []
        count = len(embedded.taxonomy.genus)
        columns = [embedded.views.index(view) for view in settings.views]
        index = np.full(len(embedded.labels), -1)
        index[self.queries[query_mask]] = np.flatnonzero(query_mask)
        for number, ((_, queries), banks) in enumerate(zip(self.folds, folds, strict=True)):
            pooled = self.pooled(settings, queries)
            usable = pooled[pooled.norm(dim=1) > 0]
            refined = [refine_transductively(bank, bank.transform(usable)) for bank in banks]
            fixed = [replace(one.bank, transduction=torch.tensor(0.0)) for one in refined]
            photos = np.flatnonzero(queries[embedded.observations] & (index[embedded.observations] >= 0))
            views = torch.tensor(embedded.values[photos][:, columns].astype(np.float32)).flatten(0, 1)
            owners = embedded.observations[photos].repeat(len(columns))
            by_metadata = self.metadata_prior(number) if settings.metadata_weight else None
            rows, labels, first = (np.cumsum(queries) - 1)[owners], [], 0
            for predicted in classify(fixed, views):
                if by_metadata is not None:
                    own = by_metadata[torch.tensor(rows[first : first + len(predicted)])]
                    predicted = predicted + settings.metadata_weight * own
                labels.append(predicted.argmax(dim=1).numpy())
                first += len(predicted)
            parts.append(index[owners] * count + np.concatenate([np.zeros(0, int), *labels]))
        cells, votes = np.unique(np.concatenate(parts), return_counts=True)
        return np.stack([cells // count, cells % count, votes], axis=1)

    def metadata_prior(self, number: int) -> Prior | None:
        """The log-probabilities by the metadata of a fold's queries, fitted once."""
        if number not in self.priors:
            prior = self.predict_prior(*self.folds[number])
            is_small = len(self.truth) * len(self.embed(self.resize_mode).taxonomy.genus) <= MAX_SCORES
            self.priors[number] = prior[:] if prior is not None and is_small else prior  # used by every candidate
        return self.priors[number]


def draw_mask(count: int, drawn: int) -> np.ndarray:
    """(count,) bool, true for `drawn` at random, or for all if there are fewer."""
    mask = np.zeros(count, dtype=bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:drawn].numpy()] = True
    return mask


def sharpen_(log_probabilities: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    """(queries, classes) log-probabilities at another temperature, in the same memory."""
    return log_softmax_(log_probabilities.mul_(inverse_temperature))


def fit_inverse_temperature(log_probabilities: torch.Tensor, truth: np.ndarray, weights: np.ndarray) -> float:
    """The factor of a run's log-probabilities with the lowest log-loss on queries, as of `fit_logit_scale`.

    A logit scale is that of one classifier before transduction, which moves prototypes towards the queries and so makes
    the same logits larger. Mixtures with nearest neighbours and with metadata change the temperature too. This factor
    corrects all of that, and leaves the order of the classes as it is.

    One more query counts, whose true class is the second guess, with the average probability of all second guesses: the
    rule of succession. Without it, no temperature would be low enough where all first guesses are right.

    Args:
        log_probabilities: (queries, classes).
        truth: (queries,); those of classes that the bank lacks, -1, do not count.
        weights: (queries,), not negative.

    Returns:
        1 where no query counts.
    """
    is_counted = (truth >= 0) & (weights > 0)
    if not is_counted.any():
        return 1.0
    logits, target = log_probabilities[torch.from_numpy(is_counted)], torch.tensor(truth[is_counted])
    own = torch.from_numpy(weights[is_counted] / weights[is_counted].mean())
    second = logits.topk(min(2, logits.shape[1]), dim=1).values[:, -1]

    def loss(log_factor: float) -> float:
        factor = float(np.exp(log_factor))
        total = (factor * logits).logsumexp(dim=1)
        losses = total - factor * logits.gather(1, target[:, None])[:, 0]
        return (own @ losses.double() + (own @ (total - factor * second).double()) / len(own)).item()

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 2), method="bounded", options={"xatol": 0.01}).x))


def fit_logit_scale(
    folds: Sequence[Sequence[Bank]],
    log_priors: Sequence[torch.Tensor],
    queries: Sequence[torch.Tensor],
    truth: np.ndarray,
) -> float:
    """The inverse temperature with the lowest log-loss (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        folds: the banks of each fold, whose probabilities are averaged, all at the logit scale of their fit.
        log_priors: (classes,) per fold, added to the logits at any logit scale.
        queries: (queries of the fold, features) per fold.
        truth: (queries,) fold after fold; -1 for a class that no bank has.
    """
    similarities = [
        [bank.similarities(bank.transform(own)) for bank in banks] for banks, own in zip(folds, queries, strict=True)
    ]
    targets = torch.tensor(truth).split([len(own) for own in queries])

    def loss(logit_scale: float) -> float:
        parts = []
        for banks, log_prior, own, target in zip(folds, log_priors, similarities, targets, strict=True):
            scaled = [rescale(bank, logit_scale) for bank in banks]
            scaled = [replace(bank, bias=bank.bias + log_prior) for bank in scaled]
            each = [bank.log_probabilities(one) for bank, one in zip(scaled, own, strict=True)]
            mean = each[0] if len(each) == 1 else torch.stack(each).logsumexp(0)
            parts.append(mean[target >= 0].gather(1, target[target >= 0, None]))
        return -torch.cat(parts).mean().item()

    return min((float(folds[0][0].logit_scale) * LOGIT_SCALE_FACTORS).tolist(), key=loss)


def coordinate_ascent(
    search: Search,
    settings: BankSettings,
    choose: Sequence[str],
    query_mask: np.ndarray,
    note: Callable[[dict], None] | None = None,
) -> BankSettings:
    """Improve one setting after another, in two passes; a candidate replaces the current value only if it is better.

    A trained head is compared with class means after all other settings have been chosen for each of the two.

    Args:
        settings: to start from; `views` are all that may be used.
        choose: the settings to improve, in this order.
        query_mask: (queries,) bool, the queries that decide.
        note: receives a `candidate_row` as soon as a candidate has been evaluated.
    """

    def best_of(key: str, current: BankSettings, candidates: Sequence[BankSettings]) -> BankSettings:
        def total(settings: BankSettings) -> float:
            return search.weighted_objective(settings)[query_mask].sum()  # 0 if there are no queries

        best = current
        for candidate in candidates:
            if note:
                note(candidate_row(search, key, candidate, current))
            if total(candidate) > total(best) + 1e-9:
                best = candidate
        return best

    if settings.matcher == "head" and "matcher" in choose:
        others = [key for key in choose if key != "matcher"]
        starts = [replace(settings, matcher=matcher) for matcher in ("means", "head")]
        means, head = (coordinate_ascent(search, start, others, query_mask, note) for start in starts)
        return best_of("matcher", means, [head])
    all_views = settings.views
    if "views" in choose:
        settings = replace(settings, views=all_views[:1])
    for _ in range(2):
        before = settings
        for key in choose:
            if key == "views":
                settings = add_views(settings, all_views, best_of)
            elif key == "encoder_weights":
                for encoder in range(search.encoders):
                    weighted = [with_weight(settings, search.encoders, encoder, value) for value in CANDIDATES[key]]
                    settings = best_of(key, settings, weighted)
            else:
                values = search.pool_parts if key == "pool_part" else CANDIDATES[key]
                settings = best_of(key, settings, [replace(settings, **{key: value}) for value in values])
        if settings == before:
            break
    return settings


def with_weight(settings: BankSettings, encoders: int, index: int, weight: float) -> BankSettings:
    """The settings with another weight of one of so many encoders. The largest is 1, and equal ones are left out."""
    weights = list(settings.encoder_weights or (1.0,) * encoders)
    weights[index] = weight
    scaled = tuple(round(one / max(weights), 4) for one in weights)
    return replace(settings, encoder_weights=scaled if len(set(scaled)) > 1 else ())


def most_candidates(settings: BankSettings, choose: Sequence[str], encoders: int = 1) -> int:
    """How many candidates `coordinate_ascent` evaluates at most."""
    groups = len(VIEW_GROUPS)
    counts = {key: len(CANDIDATES[key]) for key in choose}
    counts |= {key: groups * (groups + 1) // 2 for key in choose if key == "views"}
    counts |= {key: encoders * counts[key] for key in choose if key == "encoder_weights"}
    one_pass = sum(counts.values())
    if settings.matcher == "head" and "matcher" in choose:
        return 2 * 2 * (one_pass - len(CANDIDATES["matcher"])) + 1
    return 2 * one_pass


def add_views(settings: BankSettings, all_views: Sequence[str], best_of: Callable) -> BankSettings:
    """Add the group of views that gains most, then the next, until none gains; so the most useful views come first."""
    while True:
        left = [group for group in VIEW_GROUPS if set(group) <= set(all_views) - set(settings.views)]
        more = best_of("views", settings, [replace(settings, views=(*settings.views, *group)) for group in left])
        if more == settings:
            return settings
        settings = more


def describe_value(value: object) -> object:
    """The value of a setting for tables and messages."""
    return " ".join(map(str, value)) or "equal" if isinstance(value, tuple) else value


def candidate_row(search: Search, key: str, candidate: BankSettings, current: BankSettings) -> dict:
    """A row of the table of candidates: weighted scores, and the paired gain in `objective` over the current value."""
    evaluation, value = search.evaluate(candidate), getattr(candidate, key)
    weights, known = search.weights, ~np.isnan(evaluation.losses)
    recalls = {f"recall_at_{count}": float(np.average(evaluation.ranks < count, weights=weights)) for count in GUESSES}
    total = weights[known].sum()
    gain = gained(search.weighted_objective(candidate), search.weighted_objective(current))
    return {
        "key": key,
        "value": describe_value(value),
        **recalls,
        "log_loss": float(weights[known] @ evaluation.losses[known] / total) if total else float("nan"),
        "gain": gain["value"],
        "gain_low": gain["low"],
        "gain_high": gain["high"],
    }


@dataclass(frozen=True)
class NestedPredictions:
    """Predictions of the queries by settings that other queries chose.

    Attributes:
        log_probabilities: (queries, classes).
        view_votes: see `Search.view_votes`.
    """

    log_probabilities: torch.Tensor
    view_votes: np.ndarray


def nested_predictions(search: Search, settings: BankSettings, choose: Sequence[str]) -> NestedPredictions:
    """Predict each fifth of the queries as the other queries choose, the settings and the temperature: unbiased.

    Args:
        choose: the settings to choose; with none, all queries are predicted with `settings`.
    """
    count, rng = len(search.truth), np.random.default_rng(search.seed)
    part, chosen = rng.permutation(count) % FOLDS, [settings] * FOLDS
    if choose:
        parts = progress(range(FOLDS), "evaluating the selection", unit="part")
        chosen = [coordinate_ascent(search, settings, choose, part != number) for number in parts]
    predicted, votes = torch.empty(count, len(search.embed(settings.resize_mode).taxonomy.genus)), []
    for own in progress(list(dict.fromkeys(chosen)), "predicting the held-out observations", unit="choice"):
        folds, _ = search.fit_folds(own)
        found, numbers = search.predict_all(own, folds), [number for number, one in enumerate(chosen) if one == own]
        for number in numbers:
            rows = torch.from_numpy(np.flatnonzero(part == number))
            predicted[rows] = sharpen_(found[rows], search.fit_inverse_temperature(found, part != number))
        votes.append(search.view_votes(own, folds, np.isin(part, numbers)))
    return NestedPredictions(predicted, np.concatenate(votes))

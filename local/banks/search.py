"""Select a bank by cross-validation, without the test set; no query is in the reference set that it is scored with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from kernel.bank import Bank, collect_rows, refine_transductively
from kernel.metadata_prior import WeightedPrior
from kernel.ranking import classify
from local.banks.calibration import fit_inverse_temperature, fit_logit_scale, sharpen_
from local.banks.estimators import in_parts
from local.banks.evaluation import Evaluation, evaluate_predictions
from local.banks.fitting import Embedded, class_prior, finish, fit_matcher, logit_scale_groups
from local.banks.folds import FOLDS, MAX_SCORES, macro_weights, shot_weights
from local.base.console import progress
from local.base.metrics import GUESSES, gained, objective
from local.recipes.settings import CANDIDATES, VIEW_GROUPS, BankSettings

Prior = torch.Tensor | WeightedPrior  # (queries, classes)
LOGIT_SCALE_QUERIES = 1000  # enough for one number


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
        self.encoder_count = 1 + max((block.encoder for block in embed(resize_mode).blocks), default=0)
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
        """(queries,) the weighted `objective`, of which the mean is maximised, by smooth hits.

        Plain hits say nothing of how clear they are. A choice by them on a few hundred queries, among dozens of
        candidates, depends more on chance: settings that smooth hits choose have higher recalls on other queries.
        """
        found = self.evaluate(settings)
        return self.weights * objective(self.metric, found.smooth_hits, found.losses, self.guesses)

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
            if key == "pool_part" and settings.matcher == "head":
                continue  # the head needs the whole embedding, beside nearest neighbours too
            if key == "views":
                settings = add_views(settings, all_views, best_of)
            elif key == "encoder_weights":
                settings = weight_encoders(settings, search.encoder_count, best_of)
            else:
                values = search.pool_parts if key == "pool_part" else CANDIDATES[key]
                settings = best_of(key, settings, [replace(settings, **{key: value}) for value in values])
        if settings == before:
            break
    return settings


def weight_encoders(settings: BankSettings, count: int, best_of: Callable) -> BankSettings:
    """Choose the weight of the first of `count` encoders, then that of the next."""
    for encoder in range(count):
        candidates = [with_weight(settings, count, encoder, weight) for weight in CANDIDATES["encoder_weights"]]
        settings = best_of("encoder_weights", settings, candidates)
    return settings


def with_weight(settings: BankSettings, encoders: int, index: int, weight: float) -> BankSettings:
    """The settings with another weight of one of so many encoders. The largest is 1, and equal ones are left out."""
    weights = list(settings.encoder_weights or (1.0,) * encoders)
    weights[index] = weight
    scaled = tuple(float(f"{one / max(weights):.4g}") for one in weights)
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
    means = np.average(evaluation.hits, axis=0, weights=weights)
    recalls = {f"recall_at_{count}": float(mean) for count, mean in zip(GUESSES, means, strict=True)}
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

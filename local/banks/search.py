"""Choose a bank by cross-validation: no test split is looked at, and no observation judges what it was part of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernel.bank import Bank, Layer, classify
from local.banks.estimators import (
    Centring,
    ClassMeans,
    Logistic,
    Ridge,
    SeveralPrototypes,
    Whitening,
    apply,
    make_bank,
    pool,
    rescale,
)
from local.banks.folds import FOLDS, macro_weights, shot_weights
from local.banks.projection import ProjectionEnsemble
from local.base.metrics import GUESSES, gained
from local.data.taxonomy import Taxonomy
from local.recipes.settings import CANDIDATES, VIEW_GROUPS, BankSettings

SCALE_QUERIES = 1000
# Multiples of the inverse temperature that a matcher was fitted at; its own comes first, and stays unless another is
# better.
SCALES = 2.0 ** np.array(sorted(np.arange(-3, 4.5, 0.5), key=abs))
LINEAR = ("ridge", "random-ridge", "logistic")  # their columns are no places among the observations, and never move


@dataclass(frozen=True)
class Embedded:
    """Labelled observations as an encoder sees their photos.

    Attributes:
        values: (photos, views, features), of length 1.
        views: the name of each.
        observations: (photos,) 0 to observations - 1.
        classes: (observations,) index into the bank's classes; -1 for one that it lacks.
        taxonomy: of the bank's classes.
        head: the bank that was trained with the encoder, if one was.
    """

    values: np.ndarray
    views: tuple[str, ...]
    observations: np.ndarray
    classes: np.ndarray
    taxonomy: Taxonomy
    head: Bank | None = None
    memory: dict = field(default_factory=dict, compare=False)
    spaces: dict = field(default_factory=dict, compare=False)

    def of(self, wanted: np.ndarray) -> "Embedded":
        """The observations where `wanted`, (observations,) bool, is true."""
        photos = wanted[self.observations]
        return replace(
            self,
            values=self.values[photos],
            observations=(np.cumsum(wanted) - 1)[self.observations[photos]],
            classes=self.classes[wanted],
            memory={},
            spaces={},
        )

    def pooled(self, settings: BankSettings) -> np.ndarray:
        """(observations, features), of length 1 or 0, from the settings' views; the last two results are kept."""
        key = (settings.views, settings.pooling)
        if key not in self.memory:
            if len(self.memory) > 1:
                del self.memory[next(iter(self.memory))]
            columns = [self.views.index(view) for view in settings.views]
            self.memory[key] = pool(self.values[:, columns], self.observations, len(self.classes), settings.pooling)
        return self.memory[key]

    def space(
        self, settings: BankSettings, seen: np.ndarray, spread: Whitening | None = None
    ) -> tuple[list[Layer], np.ndarray]:
        """The layers before the matcher, fitted to a reference, and the reference's embeddings after them.

        Candidates in a row share them, and nothing takes longer: they are kept until other views or another whitening
        are asked for.

        Args:
            seen: (observations,) bool, the reference.
            spread: of the reference, to spare fitting it again.

        Returns:
            The layers, and (reference observations, features), of length 1.
        """
        asked, reference = (settings.views, settings.pooling, settings.whitening), seen.tobytes()
        if asked not in self.spaces:
            self.spaces.clear()
            self.spaces[asked] = {}
        if reference not in self.spaces[asked]:
            layers = fit_transform(settings, self, seen, spread)
            self.spaces[asked][reference] = layers, apply(layers, self.pooled(settings)[seen])
        return self.spaces[asked][reference]


def fit_spread(reference: Embedded) -> Whitening:
    """How classes vary within themselves, over all views; the exponent is given later."""
    return Whitening().fit(
        reference.values, reference.observations, reference.classes[reference.observations], reference.taxonomy
    )


def fit_banks(
    settings: BankSettings,
    embedded: Embedded,
    reference: np.ndarray,
    scales: Sequence[float] = (),
    seed: int = 0,
) -> list[Bank]:
    """The banks of some settings.

    Args:
        reference: (observations,) bool, of which to make them.
        scales: inverse temperatures, of the matcher's banks and of the nearest observation's; unless given, those that
            they were fitted at.
        seed: of matchers that draw at random.
    """
    # An observation none of whose photos could be read has no place.
    seen = reference & np.isin(np.arange(len(reference)), embedded.observations)
    banks = fit_matched(settings, embedded, seen, None, seed)
    return finish(settings, banks, class_prior(settings, embedded, seen), scales)


def fit_matched(
    settings: BankSettings, embedded: Embedded, seen: np.ndarray, spread: Whitening | None, seed: int
) -> list[Bank]:
    """The banks at the temperatures that they were fitted at, and without the class prior."""
    classes = embedded.classes[seen]
    given = (np.arange(len(classes)), classes, embedded.taxonomy)
    if settings.matcher == "head":
        banks = [embedded.head]
    elif settings.matcher == "projection":
        banks = fit_projection(settings, embedded.of(seen), embedded.pooled(settings)[seen], seed)
    else:
        transform, space = embedded.space(settings, seen, spread)
        banks = [make_bank(transform, make_matcher(settings, seed).fit(space, *given))]
    rest = 1 - settings.nearest_neighbour_weight
    banks = [replace(bank, mixture_weight=bank.mixture_weight * rest) for bank in banks]
    if settings.nearest_neighbour_weight:
        transform, space = embedded.space(settings, seen, spread)
        matcher = SeveralPrototypes(most=len(classes)).fit(space, *given)
        banks.append(make_bank(transform, matcher, share=settings.nearest_neighbour_weight))
    strength = torch.tensor(0.0 if settings.matcher in LINEAR else settings.transduction)
    return [replace(bank, transduction=strength) for bank in banks]


def class_prior(settings: BankSettings, embedded: Embedded, seen: np.ndarray) -> torch.Tensor:
    """(classes,) to add to the logits: how much likelier a class is by its number of observations."""
    sizes = torch.bincount(torch.tensor(embedded.classes[seen]), minlength=len(embedded.taxonomy.genus))
    return settings.class_prior_exponent * sizes.clamp(min=1).log()


def finish(
    settings: BankSettings, banks: Sequence[Bank], prior: torch.Tensor, scales: Sequence[float] = ()
) -> list[Bank]:
    """Banks at some inverse temperatures, one of each group of `in_scales`, with the class prior, which has none."""
    groups = [banks[group] for group in in_scales(settings)]
    scales = scales or [float(group[0].logit_scale) for group in groups]
    scaled = [rescale(bank, scale) for group, scale in zip(groups, scales, strict=True) for bank in group]
    return [replace(bank, bias=bank.bias + prior) for bank in scaled]


def fit_transform(
    settings: BankSettings, embedded: Embedded, seen: np.ndarray, spread: Whitening | None
) -> list[Layer]:
    """The layers before the matcher; see `fit_banks`."""
    pooled = embedded.pooled(settings)[seen]
    if settings.whitening:
        return (spread or fit_spread(embedded.of(seen))).layers(settings.whitening, pooled.mean(axis=0))
    given = (np.arange(len(pooled)), embedded.classes[seen], embedded.taxonomy)
    return Centring().fit(pooled[:, None], *given).layers_


def fit_projection(settings: BankSettings, reference: Embedded, pooled: np.ndarray, seed: int) -> list[Bank]:
    """The members of a projection ensemble, which learn a transform each; `pooled` as the kernel will see it."""
    start = Whitening(settings.whitening) if settings.whitening else Centring()
    ensemble = ProjectionEnsemble(start, genus=settings.genus_weight, family=settings.family_weight, seed=seed)
    classes = reference.classes[reference.observations]
    return ensemble.fit(reference.values, reference.observations, classes, reference.taxonomy, pooled=pooled).banks_


def in_scales(settings: BankSettings) -> list[slice]:
    """Which of the banks have one scale: those of its matcher, and that of the nearest observation."""
    return [slice(-1), slice(-1, None)] if settings.nearest_neighbour_weight else [slice(None)]


def make_matcher(settings: BankSettings, seed: int):
    """The unfitted estimator that `matcher` names."""
    matchers = {
        "means": lambda: ClassMeans(settings.genus_weight, settings.family_weight),
        "several": lambda: SeveralPrototypes(seed=seed),
        "ridge": Ridge,
        "random-ridge": lambda: Ridge(width=4096, seed=seed),
        "logistic": Logistic,
    }
    return matchers[settings.matcher]()


@dataclass(frozen=True)
class Outcome:
    """What one candidate answers to all queries.

    Attributes:
        top: (queries, at most 10) classes, best first.
        places: (queries,) the place of the true class, 0 for the first.
        losses: (queries,) minus the log-probability of the true class; NaN where the bank lacks it.
        scales: the inverse temperatures that fit best.
    """

    top: np.ndarray
    places: np.ndarray
    losses: np.ndarray
    scales: tuple[float, ...]


class Search:
    """Judges candidates on held-out observations, each candidate once.

    Args:
        embed: maps a resize mode ("crop", "squash") to the labelled observations in all views.
        resize_mode: any, to read classes from.
        folds: (reference, queries), each (observations,) bool.
        guesses: of a row of the submission.
        reference: (observations,) bool, of which the bank will be made in the end.
        ask_prior: maps a fold's (reference, queries) to the log-probabilities of the queries' metadata, (queries,
            classes), or None.
        is_macro: whether every class counts alike, as for a macro-F1, and not every observation.
        seed: of matchers that draw at random, and of the parts of `cross_validated`.
    """

    def __init__(
        self,
        embed: Callable[[str], Embedded],
        resize_mode: str,
        folds: Sequence[tuple[np.ndarray, np.ndarray]],
        guesses: int,
        reference: np.ndarray,
        ask_prior: Callable[[np.ndarray, np.ndarray], torch.Tensor | None] = lambda *fold: None,
        is_macro: bool = False,
        seed: int = 0,
    ):
        self.embed, self.folds, self.ask_prior, self.priors, self.seed = embed, folds, ask_prior, {}, seed
        classes, count = embed(resize_mode).classes, len(embed(resize_mode).taxonomy.genus)
        self.queries = np.concatenate([np.flatnonzero(queries) for _, queries in folds])
        self.truth = classes[self.queries]
        shots = [np.bincount(classes[known], minlength=count + 1)[classes[queries]] for known, queries in folds]
        self.weights = (
            macro_weights(self.truth) if is_macro else shot_weights(np.concatenate(shots), classes[reference])
        )
        self.guesses = guesses
        self.spreads: dict[tuple[str, int], Whitening] = {}
        self.outcomes: dict[BankSettings, Outcome] = {}

    def judge(self, settings: BankSettings) -> Outcome:
        """The outcome of one candidate."""
        if settings not in self.outcomes:
            log_probabilities, scales = self.log_probabilities(settings)
            self.outcomes[settings] = compare(log_probabilities, self.truth, scales)
        return self.outcomes[settings]

    def worth(self, settings: BankSettings) -> np.ndarray:
        """(queries,) what each answer is worth, weighted by shots."""
        return self.weights * worth(self.judge(settings).places, self.guesses)

    def log_probabilities(self, settings: BankSettings) -> tuple[torch.Tensor, tuple[float, ...]]:
        """(queries, classes), fold after fold, and the scales that they were made with."""
        embedded, fitted, priors, asked = self.embed(settings.resize_mode), [], [], []
        for number, (known, queries) in enumerate(self.folds):
            place = (settings.resize_mode, number)
            if settings.whitening and place not in self.spreads:
                self.spreads[place] = fit_spread(embedded.of(known))
            seen = known & np.isin(np.arange(len(known)), embedded.observations)
            fitted.append(fit_matched(settings, embedded, seen, self.spreads.get(place), self.seed))
            priors.append(class_prior(settings, embedded, seen))
            asked.append(torch.tensor(embedded.pooled(settings)[queries], dtype=torch.float32))
        # One scale over all folds, without transduction.
        scales = tuple(
            fit_scale([banks[group] for banks in fitted], priors, asked, self.truth) for group in in_scales(settings)
        )
        parts = []
        for number, (banks, prior, queries) in enumerate(zip(fitted, priors, asked, strict=True)):
            answers = torch.cat(list(classify(finish(settings, banks, prior, scales), queries)))
            if settings.metadata_weight:
                said = self.prior(number)
                if said is not None:
                    answers = answers + settings.metadata_weight * said
                answers = answers.log_softmax(dim=1)
            parts.append(answers)
        return torch.cat(parts), scales

    def prior(self, number: int) -> torch.Tensor | None:
        """What the metadata of a fold's queries say, fitted once."""
        if number not in self.priors:
            self.priors[number] = self.ask_prior(*self.folds[number])
        return self.priors[number]


def worth(places: np.ndarray, guesses: int) -> np.ndarray:
    """(queries,) places of the true classes -> the mean of the recalls that the submission's form has room for.

    All of them rather than one, since on a few hundred queries the choice by Recall@5 alone would be by a few hits.
    """
    return np.mean([places < count for count in GUESSES if count <= guesses], axis=0)


def fit_scale(
    folds: Sequence[Sequence[Bank]], priors: Sequence[torch.Tensor], queries: Sequence[torch.Tensor], truth: np.ndarray
) -> float:
    """The inverse temperature of least log-loss (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        folds: the banks of each, whose probabilities are averaged, at the temperature that all were fitted at.
        priors: (classes,) added to the logits of each fold, whatever the temperature.
        queries: (queries of the fold, features), one per fold.
        truth: (queries,) fold after fold; -1 for a class that no bank has.
    """
    # A thousand queries suffice for one number.
    asked = torch.zeros(len(truth), dtype=torch.bool)
    asked[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))[:SCALE_QUERIES]] = True
    queries = [own[part] for own, part in zip(queries, asked.split([len(own) for own in queries]), strict=True)]
    similarities = [
        [bank.similarities(bank.transform(own)) for bank in banks] for banks, own in zip(folds, queries, strict=True)
    ]

    def loss(scale: float) -> float:
        parts = []
        for banks, prior, known in zip(folds, priors, similarities, strict=True):
            scaled = [rescale(bank, scale) for bank in banks]
            scaled = [replace(bank, bias=bank.bias + prior) for bank in scaled]
            each = [bank.log_probabilities(own) for bank, own in zip(scaled, known, strict=True)]
            parts.append(torch.stack(each).logsumexp(dim=0))
        return torch.nn.functional.nll_loss(torch.cat(parts), torch.tensor(truth)[asked], ignore_index=-1).item()

    return min((float(folds[0][0].logit_scale) * SCALES).tolist(), key=loss)


def compare(log_probabilities: torch.Tensor, truth: np.ndarray, scales: tuple[float, ...] = ()) -> Outcome:
    """(queries, classes) against (queries,) true classes."""
    target = torch.tensor(truth)
    own = log_probabilities.gather(1, target.clamp(min=0)[:, None])
    earlier = torch.arange(log_probabilities.shape[1]) < target[:, None]
    places = ((log_probabilities > own) | ((log_probabilities == own) & earlier)).sum(dim=1)
    places = torch.where(target < 0, log_probabilities.shape[1], places)
    losses = torch.where(target < 0, torch.nan, -own[:, 0].double())
    top = log_probabilities.sort(dim=1, descending=True, stable=True).indices[:, : max(GUESSES)]
    return Outcome(top.numpy(), places.numpy(), losses.numpy(), scales)


def walk(
    search: Search,
    settings: BankSettings,
    choose: Sequence[str],
    queries: np.ndarray,
    note: Callable[[dict], None] | None = None,
) -> BankSettings:
    """Improve one setting after another, twice over; a candidate must gain on the present value to replace it.

    A head that was trained and class means compete when all else has been chosen for each of them.

    Args:
        settings: to start from; `views` are all that may be used.
        choose: the settings to improve, in this order.
        queries: (queries,) bool, those that may choose.
        note: is given a row of the table for every candidate, as soon as it is judged.
    """

    def best_of(key: str, present: BankSettings, candidates: Sequence[BankSettings]) -> BankSettings:
        chosen = present
        for candidate in candidates:
            if note:
                note(row(search, key, candidate, present))
            # Sums, since there may be no query, and then nothing is replaced.
            if search.worth(candidate)[queries].sum() > search.worth(chosen)[queries].sum() + 1e-9:
                chosen = candidate
        return chosen

    if settings.matcher == "head" and "matcher" in choose:
        others = [key for key in choose if key != "matcher"]
        starts = [replace(settings, matcher=matcher) for matcher in ("means", "head")]
        means, head = (walk(search, start, others, queries, note) for start in starts)
        return best_of("matcher", means, [head])
    every = settings.views
    if "views" in choose:
        settings = replace(settings, views=every[:1])
    for _ in range(2):
        before = settings
        for key in choose:
            if key == "views":
                settings = more_views(settings, every, best_of)
            else:
                settings = best_of(key, settings, [replace(settings, **{key: value}) for value in CANDIDATES[key]])
        if settings == before:
            break
    return settings


def more_views(settings: BankSettings, every: Sequence[str], best_of: Callable) -> BankSettings:
    """Add the group of views that gains most, then the next, until none gains: that is their order of worth too."""
    while True:
        left = [group for group in VIEW_GROUPS if set(group) <= set(every) - set(settings.views)]
        more = best_of("views", settings, [replace(settings, views=(*settings.views, *group)) for group in left])
        if more == settings:
            return settings
        settings = more


def row(search: Search, key: str, candidate: BankSettings, present: BankSettings) -> dict:
    """A row of the table of candidates: its scores, and the paired gain in worth over what it would replace.

    All are weighted as the choice is.
    """
    outcome, value = search.judge(candidate), getattr(candidate, key)
    weights, known = search.weights, ~np.isnan(outcome.losses)
    recalls = {f"recall_at_{count}": float(np.average(outcome.places < count, weights=weights)) for count in GUESSES}
    total = weights[known].sum()
    gain = gained(search.worth(candidate), search.worth(present))
    return {
        "key": key,
        "value": " ".join(value) if isinstance(value, tuple) else value,
        **recalls,
        "log_loss": float(weights[known] @ outcome.losses[known] / total) if total else float("nan"),
        "gain": gain["value"],
        "gain_low": gain["low"],
        "gain_high": gain["high"],
    }


def cross_validated(search: Search, settings: BankSettings, choose: Sequence[str]) -> np.ndarray:
    """(queries, 10) guesses, each by what the other four fifths of the queries choose, so unbiased by the choice."""
    rng = np.random.default_rng(search.seed)
    part = rng.permutation(len(search.truth)) % FOLDS
    top = np.zeros_like(search.judge(settings).top)
    for number in range(FOLDS):
        chosen = walk(search, settings, choose, part != number)
        top[part == number] = search.judge(chosen).top[part == number]
    return top

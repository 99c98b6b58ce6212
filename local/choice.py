"""Choose a bank by cross-validation: no test split is looked at, and no observation judges what it was part of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernel.bank import Bank, classify
from kernel.prior import fused
from local.banks import (
    SCALE,
    Centring,
    ClassMeans,
    Logistic,
    Ridge,
    SeveralPrototypes,
    Taxonomy,
    Whitening,
    apply,
    make_bank,
    pool,
)
from local.metrics import GUESSES, paired_gain
from local.recipe import Recipe

FOLDS = 5
SCORES = 50_000_000  # of queries and classes at most; the queries are drawn where there would be more
SCALES = 2.0 ** np.arange(1, 8.5, 0.5)
LINEAR = ("ridge", "random-ridge", "logistic")  # their columns are no places among the observations, and never move

# What each key that a recipe lets choose may become, the simplest first: it stays unless another is better.
CANDIDATES: dict[str, Sequence] = {
    "fit": ("crop", "squash"),
    "whitening": (0.0, 0.25, 0.5, 0.75, 1.0),
    "genus": (0.0, 0.25, 0.5, 1.0),
    "family": (0.0, 0.25, 0.5),
    "matcher": ("means", "several", *LINEAR),
    "nearest": (0.0, 0.2, 0.4),
    "shots": (0.0, 0.25, 0.5),
    "transduction": (0.0, 0.125, 0.25, 0.5, 1.0),
    "metadata": (0.0, 0.25, 0.5, 0.75, 1.0),
}
# Views join in groups: a turn to the left without the one to the right would favour a side.
VIEW_GROUPS = (
    ("hflip",),
    ("rotate90", "rotate270"),
    ("rotate15", "rotate345"),
    ("centre",),
    ("top-left", "top-right", "bottom-left", "bottom-right"),
    ("larger",),
)


@dataclass(frozen=True)
class Embedded:
    """Labelled observations as an encoder sees their photos.

    Attributes:
        values: (photos, views, features), of length 1.
        views: the name of each.
        observations: (photos,) 0 to observations - 1.
        classes: (observations,) index into the bank's classes; -1 for one that it lacks.
        taxonomy: of the bank's classes.
    """

    values: np.ndarray
    views: tuple[str, ...]
    observations: np.ndarray
    classes: np.ndarray
    taxonomy: Taxonomy
    memory: dict = field(default_factory=dict, compare=False)

    def of(self, wanted: np.ndarray) -> "Embedded":
        """The observations where `wanted`, (observations,) bool, is true."""
        photos = wanted[self.observations]
        return replace(
            self,
            values=self.values[photos],
            observations=(np.cumsum(wanted) - 1)[self.observations[photos]],
            classes=self.classes[wanted],
            memory={},
        )

    def pooled(self, recipe: Recipe) -> np.ndarray:
        """(observations, features), of length 1 or 0, from the recipe's views; computed once."""
        key = (recipe.views, recipe.pooling)
        if key not in self.memory:
            columns = [self.views.index(view) for view in recipe.views]
            self.memory[key] = pool(self.values[:, columns], self.observations, len(self.classes), recipe.pooling)
        return self.memory[key]


def fit_spread(reference: Embedded) -> Whitening:
    """How classes vary within themselves, over all views; the exponent is given later."""
    return Whitening().fit(
        reference.values, reference.observations, reference.classes[reference.observations], reference.taxonomy
    )


def fit_banks(
    recipe: Recipe,
    embedded: Embedded,
    reference: np.ndarray,
    scales: Sequence[float] = (),
    spread: Whitening | None = None,
) -> list[Bank]:
    """The banks that a recipe asks for.

    Args:
        reference: (observations,) bool, of which to make them.
        scales: inverse temperature of each.
        spread: of the reference, to spare fitting it again.
    """
    # An observation none of whose photos could be read has no place.
    seen = reference & np.isin(np.arange(len(reference)), embedded.observations)
    pooled, classes = embedded.pooled(recipe)[seen], embedded.classes[seen]
    given = (np.arange(len(classes)), classes, embedded.taxonomy)
    transform = []
    if recipe.whitening:
        transform = (spread or fit_spread(embedded.of(seen))).layers(recipe.whitening, pooled.mean(axis=0))
    elif recipe.centre:
        transform = Centring().fit(pooled[:, None], *given).layers_
    space = apply(transform, pooled)
    matchers = [make_matcher(recipe).fit(space, *given)]
    if recipe.nearest:
        matchers.append(SeveralPrototypes(most=len(classes)).fit(space, *given))
    sizes = np.bincount(classes, minlength=len(embedded.taxonomy.genus))
    for matcher in matchers:
        matcher.bias_ = matcher.bias_ + recipe.shots * np.log(np.maximum(sizes, 1))
    strength = 0.0 if recipe.matcher in LINEAR else recipe.transduction
    shares = (1 - recipe.nearest, recipe.nearest)
    scales = scales or [SCALE] * len(matchers)
    return [
        make_bank(transform, matcher, scale, share, strength)
        for matcher, scale, share in zip(matchers, scales, shares, strict=False)
    ]


def make_matcher(recipe: Recipe):
    """The unfitted estimator that a recipe names."""
    matchers = {
        "means": lambda: ClassMeans(recipe.genus, recipe.family),
        "several": lambda: SeveralPrototypes(seed=recipe.seed),
        "ridge": Ridge,
        "random-ridge": lambda: Ridge(width=4096, seed=recipe.seed),
        "logistic": Logistic,
    }
    return matchers[recipe.matcher]()


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
        embed: maps a `fit` ("crop", "squash") to the labelled observations in all views.
        fit: any that will do to read classes from.
        folds: (reference, queries), each (observations,) bool.
        guesses: of a row of the submission.
        reference: (observations,) bool, of which the bank will be made in the end.
        ask_prior: maps a fold's (reference, queries) to the log-probabilities of the queries' metadata, (queries,
            classes), or None.
    """

    def __init__(
        self,
        embed: Callable[[str], Embedded],
        fit: str,
        folds: Sequence[tuple[np.ndarray, np.ndarray]],
        guesses: int,
        reference: np.ndarray,
        ask_prior: Callable[[np.ndarray, np.ndarray], torch.Tensor | None] = lambda *fold: None,
    ):
        self.embed, self.folds, self.ask_prior, self.priors = embed, folds, ask_prior, {}
        classes, count = embed(fit).classes, len(embed(fit).taxonomy.genus)
        self.queries = np.concatenate([np.flatnonzero(queries) for _, queries in folds])
        self.truth = classes[self.queries]
        shots = [np.bincount(classes[known], minlength=count + 1)[classes[queries]] for known, queries in folds]
        self.weights = shot_weights(np.concatenate(shots), classes[reference])
        self.guesses = guesses
        self.spreads: dict[tuple[str, int], Whitening] = {}
        self.outcomes: dict[Recipe, Outcome] = {}

    def judge(self, recipe: Recipe) -> Outcome:
        """The outcome of one candidate."""
        if recipe not in self.outcomes:
            log_probabilities, scales = self.log_probabilities(recipe)
            self.outcomes[recipe] = compare(log_probabilities, self.truth, scales)
        return self.outcomes[recipe]

    def worth(self, recipe: Recipe) -> np.ndarray:
        """(queries,) what each answer is worth, weighted by shots."""
        return self.weights * worth(self.judge(recipe).places, self.guesses)

    def log_probabilities(self, recipe: Recipe) -> tuple[torch.Tensor, tuple[float, ...]]:
        """(queries, classes), fold after fold, and the scales that they were made with."""
        embedded, fitted, asked = self.embed(recipe.fit), [], []
        for number, (known, queries) in enumerate(self.folds):
            place = (recipe.fit, number)
            if recipe.whitening and place not in self.spreads:
                self.spreads[place] = fit_spread(embedded.of(known))
            fitted.append(fit_banks(recipe, embedded, known, spread=self.spreads.get(place)))
            asked.append(torch.tensor(embedded.pooled(recipe)[queries], dtype=torch.float32))
        # One scale over all folds, without transduction.
        scales = tuple(fit_scale(banks, asked, self.truth) for banks in zip(*fitted, strict=True))
        parts = []
        for number, (banks, queries) in enumerate(zip(fitted, asked, strict=True)):
            scaled = [replace(bank, scale=torch.tensor(scale)) for bank, scale in zip(banks, scales, strict=True)]
            answers = torch.cat(list(classify(scaled, queries)))
            if recipe.metadata:
                answers = fused(answers, self.prior(number), recipe.metadata).log_softmax(dim=1)
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


def fit_scale(banks: Sequence[Bank], queries: Sequence[torch.Tensor], truth: np.ndarray) -> float:
    """The inverse temperature of least log-loss (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        banks: one per fold.
        queries: (queries of the fold, features), one per fold.
        truth: (queries,) fold after fold; -1 for a class that no bank has.
    """
    pairs = list(zip(banks, queries, strict=True))
    similarities = torch.cat([bank.similarities(bank.transform(asked)) for bank, asked in pairs])
    bias = torch.cat([bank.bias.expand(len(asked), -1) for bank, asked in pairs])
    target = torch.tensor(truth)
    losses = [
        torch.nn.functional.cross_entropy(similarities * scale + bias, target, ignore_index=-1).item()
        for scale in SCALES.tolist()
    ]
    return float(SCALES[int(np.argmin(losses))])


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


def make_folds(classes: np.ndarray, asked: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observation-disjoint folds, a class's observations spread over as many of them as it has.

    A class of one observation is always part of the reference: nothing can be asked of it, but it makes the other
    classes' queries as hard as they will be. What it is like to be asked for a class of one observation is told by the
    classes of two, and `shot_weights` gives these the part of both.

    Args:
        classes: (observations,) index of the class of each.
        asked: (observations,) bool, which may be queries.

    Returns:
        (reference, queries), each (observations,) bool, per fold.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(classes), -1)
    for index in rng.permutation(np.unique(classes)):
        own = rng.permutation(np.flatnonzero((classes == index) & asked))
        if len(own) and (classes == index).sum() > 1:
            fold[own] = (np.arange(len(own)) + rng.integers(FOLDS)) % FOLDS
    limit = max(FOLDS, SCORES // (classes.max() + 1))
    left = rng.permutation(np.flatnonzero(fold >= 0))[:limit]
    chosen = np.isin(np.arange(len(fold)), left)
    return [(fold != number, chosen & (fold == number)) for number in range(FOLDS) if (chosen & (fold == number)).any()]


def shot_weights(shots: np.ndarray, classes: np.ndarray, most: int = 4) -> np.ndarray:
    """Weights of queries, of mean 1, that give each number of shots the part that it has in the whole reference.

    Args:
        shots: (queries,) observations of the query's class in its fold's reference.
        classes: (observations,) class of each observation of the whole reference.
    """
    sizes = np.minimum(np.bincount(classes)[classes], most)
    shots = np.clip(shots, 1, most)
    wanted, found = np.bincount(sizes, minlength=most + 1), np.bincount(shots, minlength=most + 1)
    weights = (wanted / np.maximum(found, 1))[shots]
    return weights / weights.mean()


def walk(search: Search, recipe: Recipe, queries: np.ndarray, table: list[dict] | None = None) -> Recipe:
    """Improve one key after another, twice over; a candidate must gain on the present value to take its place.

    Args:
        recipe: with the keys to choose in `choose`, and in `views` all that may be used.
        queries: (queries,) bool, those that may choose.
        table: to note every candidate in.
    """

    def best_of(key: str, present: Recipe, candidates: Sequence[Recipe]) -> Recipe:
        chosen = present
        for candidate in candidates:
            if table is not None:
                table.append(row(search, key, candidate, present))
            if search.worth(candidate)[queries].mean() > search.worth(chosen)[queries].mean() + 1e-12:
                chosen = candidate
        return chosen

    every = recipe.views
    if "views" in recipe.choose:
        recipe = replace(recipe, views=every[:1])
    for _ in range(2):
        before = recipe
        for key in recipe.choose:
            if key == "views":
                recipe = more_views(recipe, every, best_of)
            else:
                recipe = best_of(key, recipe, [replace(recipe, **{key: value}) for value in CANDIDATES[key]])
        if recipe == before:
            break
    return recipe


def more_views(recipe: Recipe, every: Sequence[str], best_of: Callable) -> Recipe:
    """Add the group of views that gains most, then the next, until none gains: that is their order of worth too."""
    while True:
        left = [group for group in VIEW_GROUPS if set(group) <= set(every) - set(recipe.views)]
        more = best_of("views", recipe, [replace(recipe, views=(*recipe.views, *group)) for group in left])
        if more == recipe:
            return recipe
        recipe = more


def row(search: Search, key: str, candidate: Recipe, present: Recipe) -> dict:
    """A row of the table of candidates: its scores, and the paired gain in worth over what it would replace."""
    outcome, value = search.judge(candidate), getattr(candidate, key)
    recalls = {f"recall_at_{count}": float((outcome.places < count).mean()) for count in GUESSES}
    gain, error = paired_gain(search.worth(candidate), search.worth(present))
    return {
        "key": key,
        "value": " ".join(value) if isinstance(value, tuple) else value,
        **recalls,
        "log_loss": float(np.nanmean(outcome.losses)),
        "gain": gain,
        "gain_low": gain - 1.96 * error,
        "gain_high": gain + 1.96 * error,
    }


def cross_validated(search: Search, recipe: Recipe) -> np.ndarray:
    """(queries, 10) guesses, each by what the other four fifths of the queries choose, so unbiased by the choice."""
    rng = np.random.default_rng(recipe.seed)
    part = rng.permutation(len(search.truth)) % FOLDS
    top = np.zeros_like(search.judge(recipe).top)
    for number in range(FOLDS):
        chosen = walk(search, recipe, part != number)
        top[part == number] = search.judge(chosen).top[part == number]
    return top

"""Where a run fails: by rank, by kind of observation, by class, and which classes are confused."""

import difflib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score

from kernel.inputs import InputError
from kernel.observations import Observation
from local.base.metrics import interval_of, score
from local.report.closeup import ClassCosine, Closeup, Neighbour
from local.report.evidence import Evidence, Rank
from local.report.scores import RECALLS, Estimate, mean

MOST_SHOTS = MOST_PHOTOS = 4  # observations with so many or more are one group
HABITATS = 12  # groups of their own; the others are one group
PAIRS = 25  # confusions that are shown
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
BINS = 20  # of a histogram of confidences
VISIBLE = 0.04  # of the side of a matrix, for a frame with a name
SHOWN = 8  # photos of a class in focus
MISSED, FALSE_ALARM = "poisonous taken for edible", "edible taken for poisonous"
COSTS = {MISSED: 100, FALSE_ALARM: 1}  # of FungiCLEF 2024


@dataclass(frozen=True)
class RankScores:
    """The scores at one rank of the taxonomy, where the probability of a group is the sum over its species.

    Attributes:
        groups: named ones in the taxonomy; `query_groups` among the held-out observations.
        by_species: the recall at 1 if the guess is the group of the first species. If this is better, large groups
            add up too many small probabilities.
        confidence: the mean probability of the first guess.
        right, wrong: histograms of it over BINS bins from 0 to 1.
    """

    rank: str
    groups: int
    query_groups: int
    recall_at_1: Estimate
    recall_at_5: Estimate
    macro_f1: Estimate
    by_species: Estimate
    confidence: float
    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Hierarchy:
    """How often the first guesses of all ranks are right; and how often they are the ranks of the first species."""

    accuracy: Estimate
    consistent: Estimate


@dataclass(frozen=True)
class GroupRecalls:
    """The recalls over one group of observations."""

    name: str
    observations: int
    recall_at_1: Estimate
    recall_at_5: Estimate
    recall_at_10: Estimate


@dataclass(frozen=True)
class ClassScores:
    """A row of the table of classes; a score is None where nothing was held out, or nothing guessed.

    Attributes:
        lineage: the names of the ranks above the species, None where one is not named.
        shots: observations in the bank; `queries` held out; `guessed` first guesses.
        probability: the mean of the right answer.
    """

    label: int
    id: str
    name: str
    lineage: list[str | None]
    poisonous: bool | None
    shots: int
    queries: int
    guessed: int
    recall_at_1: float | None
    recall_at_5: float | None
    f1: float | None
    probability: float | None
    photo: str | None


@dataclass(frozen=True)
class Span:
    """Neighbours in a matrix, from `start` to before `end`, that belong to one group of a wider rank."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of one rank.

    Attributes:
        groups: that are true or guessed, in the order of the taxonomy.
        cells: (true, guessed, observations), indices into `groups`.
    """

    rank: str
    groups: list[str]
    relatives: list[Span]
    cells: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Mistake:
    """A wrong first guess: one observation, and what resembles it most in the class that was guessed.

    Attributes:
        shared_rank: the finest rank that both classes share.
        count, fraction: how often the true class is taken for the other; None where only this one is meant.
    """

    true: int
    guessed: int
    shared_rank: str | None
    observation: str
    probability: float
    photo: str
    nearest: Neighbour | None
    count: int | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Careful:
    """What it costs to warn whenever poisonous species together are more probable than the threshold."""

    threshold: float
    cost: Estimate
    missed: int
    false_alarms: int


@dataclass(frozen=True)
class Deadly:
    """Confusions of poisonous and edible species; `counts` and `mistakes` are by the keys of `costs`."""

    costs: dict[str, int]
    poisonous_classes: int
    poisonous_queries: int
    counts: dict[str, int]
    cost: Estimate
    careful: Careful
    mistakes: dict[str, list[Mistake]]


@dataclass(frozen=True)
class FocusRank:
    """A class in focus at one rank; recalls are None where none of its observations was held out."""

    rank: str
    expected: str
    recall_at_1: Estimate | None
    recall_at_5: Estimate | None


@dataclass(frozen=True)
class ClassCount:
    """A class and how many observations are meant."""

    label: int
    observations: int


@dataclass(frozen=True)
class Focus:
    """A class to look at closely: its scores at every rank, what it is taken for, and what is taken for it."""

    label: int
    shots: int
    queries: int
    ranks: list[FocusRank]
    taken_for: list[ClassCount]
    taken_for_it: list[ClassCount]
    probability: float | None
    bank_photos: list[str]
    query_photos: list[str]
    resembles: list[ClassCosine]


def score_rank(evidence: Evidence, rank: Rank) -> RankScores:
    """The scores at one rank."""
    answers = evidence.rank_answers[rank.name]
    scores = score(answers.truth, answers.outcome.top)
    is_right = answers.outcome.ranks == 0
    edges = np.linspace(0, 1, BINS + 1)
    return RankScores(
        rank=rank.name,
        groups=int(rank.is_named.sum()),
        query_groups=len(np.unique(answers.truth)),
        **{name: Estimate(**interval_of(scores, name)) for name in ("recall_at_1", "recall_at_5", "macro_f1")},
        by_species=mean(rank.groups[evidence.guesses] == answers.truth),
        confidence=float(answers.confidence.mean()),
        right=np.histogram(answers.confidence[is_right], edges)[0].tolist(),
        wrong=np.histogram(answers.confidence[~is_right], edges)[0].tolist(),
    )


def score_hierarchy(evidence: Evidence) -> Hierarchy:
    """The accuracy of all ranks together; see `Hierarchy`."""
    answers = [(rank, evidence.rank_answers[rank.name].outcome) for rank in evidence.ranks]
    right = np.all([outcome.ranks == 0 for _, outcome in answers], axis=0)
    consistent = np.all([outcome.top[:, 0] == rank.groups[evidence.guesses] for rank, outcome in answers], axis=0)
    return Hierarchy(mean(right), mean(consistent))


def score_groups(evidence: Evidence) -> dict[str, list[GroupRecalls]]:
    """Recalls by shots, photos, habitat and month; without what the competition does not say."""
    habitats = [query.metadata.get("habitat") or None for query in evidence.queries]
    common = [name for name, _ in Counter(filter(None, habitats)).most_common(HABITATS)]
    habitats = [name if name in common else name and "others" for name in habitats]
    shots = [capped(count, MOST_SHOTS) for count in evidence.shots]
    photos = [capped(len(query.photos), MOST_PHOTOS) for query in evidence.queries]
    grouped = {
        "shots": recalls_by(evidence, shots, [capped(count, MOST_SHOTS) for count in range(MOST_SHOTS + 1)]),
        "photos": recalls_by(evidence, photos, [capped(count, MOST_PHOTOS) for count in range(MOST_PHOTOS + 1)]),
        "habitat": recalls_by(evidence, habitats, [*common, "others"]),
        "month": recalls_by(evidence, [month_of(query) for query in evidence.queries], MONTHS),
    }
    return {name: rows for name, rows in grouped.items() if len(rows) > 1}


def capped(count: int, most: int) -> str:
    """`3`, or `4 or more`."""
    return str(count) if count < most else f"{most} or more"


def month_of(query: Observation) -> str | None:
    """The name of the month, if the table has it."""
    with suppress(KeyError, ValueError, IndexError):
        return MONTHS[int(float(query.metadata["month"])) - 1]
    return None


def recalls_by(evidence: Evidence, groups: Sequence[str | None], order: Sequence[str]) -> list[GroupRecalls]:
    """The recalls of each group of observations, in order; groups without observations are left out."""
    rows, groups = [], np.array(groups, dtype=object)
    for name in order:
        positions = evidence.outcome.ranks[groups == name]
        if len(positions):
            rows.append(GroupRecalls(name, len(positions), *(mean(positions < count) for count in RECALLS.values())))
    return rows


def score_classes(evidence: Evidence, closeup: Closeup) -> list[ClassScores]:
    """A row for every class, in the order of the taxonomy."""
    photos, size, truth = closeup.first_photos(), len(evidence.classes), evidence.truth
    queries, guessed = (np.bincount(one, minlength=size) for one in (truth, evidence.guesses))
    own = evidence.probabilities[np.arange(len(truth)), truth]
    first, five, probability = (
        np.bincount(truth, values, minlength=size) / np.maximum(queries, 1)
        for values in (evidence.outcome.ranks < 1, evidence.outcome.ranks < 5, own)
    )
    f1 = f1_score(truth, evidence.guesses, labels=range(size), average=None, zero_division=0)
    return [
        ClassScores(
            label=label,
            id=evidence.classes[label],
            name=evidence.names[label],
            lineage=[
                rank.names[group] if rank.is_named[group := rank.groups[label]] else None
                for rank in evidence.ranks[:-1]
            ],
            poisonous=None if np.isnan(evidence.poisonous[label]) else bool(evidence.poisonous[label]),
            shots=int(evidence.reference[label]),
            queries=int(queries[label]),
            guessed=int(guessed[label]),
            recall_at_1=float(first[label]) if queries[label] else None,
            recall_at_5=float(five[label]) if queries[label] else None,
            f1=float(f1[label]) if queries[label] or guessed[label] else None,
            probability=float(probability[label]) if queries[label] else None,
            photo=photos.get(label),
        )
        for label in np.argsort(evidence.ranks[-1].groups).tolist()
    ]


def count_confusions(truth: np.ndarray, guesses: np.ndarray) -> list[tuple[int, int, int]]:
    """(true, guessed, observations), ordered by label."""
    cells, counts = np.unique(np.stack([truth, guesses], axis=1), axis=0, return_counts=True)
    return [(true, guessed, count) for (true, guessed), count in zip(cells.tolist(), counts.tolist(), strict=True)]


def confuse_groups(evidence: Evidence, rank: Rank) -> Confusion:
    """The confusion matrix of one rank."""
    answers = evidence.rank_answers[rank.name]
    guesses = answers.outcome.top[:, 0]
    met, encoded = np.unique(np.concatenate([answers.truth, guesses]), return_inverse=True)
    cells = count_confusions(encoded[: len(guesses)], encoded[len(guesses) :])
    return Confusion(rank.name, [rank.names[group] for group in met], find_relatives(evidence.ranks, rank, met), cells)


def find_relatives(ranks: Sequence[Rank], rank: Rank, met: np.ndarray) -> list[Span]:
    """The visible groups of a wider rank among the rows of a matrix: of the rank that has most of them.

    Args:
        met: (rows,) the group of `rank` in each row.
    """
    best: list[Span] = []
    species = np.unique(rank.groups, return_index=True)[1][met]  # one of each group
    for wider in ranks[: ranks.index(rank)]:
        above = wider.groups[species]
        starts = np.flatnonzero(np.r_[True, above[1:] != above[:-1]])
        ends = np.r_[starts[1:], len(above)]
        spans = [
            Span(wider.names[above[start]], start, end)
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            if end - start >= VISIBLE * len(above)
        ]
        best = max(best, spans, key=len)
    return best


def list_confusions(evidence: Evidence) -> list[tuple[int, int, int]]:
    """Every confusion of species, the commonest first: (true label, guessed label, observations)."""
    missed = evidence.guesses != evidence.truth
    if not missed.any():
        return []
    return sorted(count_confusions(evidence.truth[missed], evidence.guesses[missed]), key=lambda cell: -cell[2])


def commonest_mistakes(evidence: Evidence, closeup: Closeup) -> list[Mistake]:
    """The commonest confusions of species, each with its first observation."""
    queries = np.bincount(evidence.truth, minlength=len(evidence.classes))
    rows = [(*cell, float(cell[2] / queries[cell[0]])) for cell in list_confusions(evidence)]
    rows.sort(key=lambda row: (-row[2], -row[3]))
    mistakes = []
    for true, guessed, count, fraction in rows[:PAIRS]:
        query = np.flatnonzero((evidence.truth == true) & (evidence.guesses == guessed))[0]
        mistakes.append(show_mistake(evidence, closeup, query, count, fraction))
    return mistakes


def show_mistake(
    evidence: Evidence, closeup: Closeup, query: int, count: int | None = None, fraction: float | None = None
) -> Mistake:
    """The mistake in one observation."""
    true, guessed = int(evidence.truth[query]), int(evidence.guesses[query])
    shared = [rank.name for rank in evidence.ranks if rank.groups[true] == rank.groups[guessed]]
    return Mistake(
        true=true,
        guessed=guessed,
        shared_rank=shared[-1] if shared else None,
        observation=evidence.queries[query].id,
        probability=float(evidence.probabilities[query, guessed]),
        photo=closeup.photo_of(query),
        nearest=closeup.nearest(query, guessed),
        count=count,
        fraction=fraction,
    )


def find_deadly(evidence: Evidence, closeup: Closeup) -> Deadly | None:
    """Poisonous species taken for edible ones and the reverse; None if no class is known as poisonous."""
    poisonous, edible = evidence.poisonous == 1, evidence.poisonous == 0
    if not poisonous.any():
        return None
    true, true_edible = poisonous[evidence.truth], edible[evidence.truth]
    found = {MISSED: true & edible[evidence.guesses], FALSE_ALARM: true_edible & poisonous[evidence.guesses]}
    # By expected cost it pays to warn when a poisonous species is more probable than 1 in 101.
    threshold = COSTS[FALSE_ALARM] / (COSTS[MISSED] + COSTS[FALSE_ALARM])
    warned = evidence.probabilities[:, poisonous].sum(axis=1) > threshold
    missed, false_alarms = true & ~warned, true_edible & warned
    careful_cost = mean(COSTS[MISSED] * missed + COSTS[FALSE_ALARM] * false_alarms)
    return Deadly(
        costs=COSTS,
        poisonous_classes=int(poisonous.sum()),
        poisonous_queries=int(true.sum()),
        counts={kind: int(where.sum()) for kind, where in found.items()},
        cost=mean(COSTS[MISSED] * found[MISSED] + COSTS[FALSE_ALARM] * found[FALSE_ALARM]),
        careful=Careful(threshold, careful_cost, int(missed.sum()), int(false_alarms.sum())),
        mistakes={
            kind: [show_mistake(evidence, closeup, query) for query in np.flatnonzero(where)[:PAIRS]]
            for kind, where in found.items()
        },
    )


def find_classes(evidence: Evidence, name: str) -> list[int]:
    """The labels of a species or a class id; two classes may have one name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    names, name = [full.split(" #")[0].casefold() for full in evidence.names], name.casefold()
    found = [label for label, id in enumerate(evidence.classes) if name in (names[label], id.casefold())]
    if not found:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        near = ", ".join(evidence.names[names.index(one)] for one in near)
        raise InputError(f"--focus: no species {name!r} in {evidence.labelled.folder}; the nearest names are {near}")
    return found


def focus_on(evidence: Evidence, closeup: Closeup, label: int) -> Focus:
    """One class: how well it is recognised at every rank, and what it is confused with."""
    own, taken = evidence.truth == label, evidence.guesses == label
    ranks = []
    for rank in evidence.ranks:
        positions = evidence.rank_answers[rank.name].outcome.ranks[own]
        recalls = [mean(positions < count) if len(positions) else None for count in (1, 5)]
        ranks.append(FocusRank(rank.name, rank.names[rank.groups[label]], *recalls))
    return Focus(
        label=label,
        shots=int(evidence.reference[label]),
        queries=int(own.sum()),
        ranks=ranks,
        taken_for=count_classes(evidence.guesses[own & ~taken]),
        taken_for_it=count_classes(evidence.truth[taken & ~own]),
        probability=float(evidence.probabilities[own, label].mean()) if own.any() else None,
        bank_photos=closeup.photos_of(label),
        query_photos=[closeup.photo_of(query) for query in np.flatnonzero(own)[:SHOWN]],
        resembles=closeup.resembling(label),
    )


def count_classes(labels: np.ndarray) -> list[ClassCount]:
    """Classes with the number of their observations, the commonest first."""
    return [ClassCount(label, count) for label, count in Counter(labels.tolist()).most_common()]

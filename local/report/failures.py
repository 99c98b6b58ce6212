"""Where a run fails: by rank, by kind of observation, by class, and which classes are confused."""

import calendar
import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.metrics import f1_score

from kernel.inputs import InputError
from local.base.metrics import held_out_scores, interval_of
from local.report.closeup import Closeup, Neighbour
from local.report.evidence import Evidence, Rank
from local.report.scores import Estimate, GroupRecalls, Scores, mean, recalls_by

LARGE = 4  # shots or photos; observations with so many or more are one group
HABITATS = 12  # groups of their own; the others are one group
BINS = 20  # of a histogram of confidences
VISIBLE = 0.04  # of the side of a matrix, for a frame with a name
SHOWN = 16  # observations of a class in focus
RECOGNISED, MISTAKEN, REFERENCE = "recognised", "mistaken", "in the bank only"  # outcomes of an observation
MISSED, FALSE_ALARM = "poisonous taken for edible", "edible taken for poisonous"
COSTS = {MISSED: 100, FALSE_ALARM: 1}  # of FungiCLEF 2024


@dataclass(frozen=True)
class RankScores:
    """The scores at one rank of the taxonomy, weighted as the headline is; a group's probability is its species' sum.

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
class Confusion:
    """The confusion matrix of one rank.

    Attributes:
        groups: that are true or guessed, in the order of the taxonomy.
        relatives: (group of a wider rank, first index in `groups`, last index + 1).
        cells: (true, guessed, observations), indices into `groups`.
    """

    rank: str
    groups: list[str]
    relatives: list[tuple[str, int, int]]
    cells: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Mistake:
    """A held-out observation whose first guess is wrong.

    Attributes:
        true, guessed: labels.
        shared_rank: the finest rank that both classes share.
        position: of the true class among all guesses, from 1.
        shots: other observations of the true class in the bank.
        probability: of the guess.
        nearest: the most similar observation of the class that was guessed.
        count: observations with the same confusion.
    """

    observation: str
    true: int
    guessed: int
    shared_rank: str | None
    position: int
    shots: int
    probability: float
    photo: str
    nearest: Neighbour | None
    count: int


@dataclass(frozen=True)
class Deadly:
    """Confusions of poisonous and edible species; `counts` and `careful_counts` are by the keys of `costs`.

    Attributes:
        cost: of an observation; `careful_cost` and `careful_counts` are what they would be with a warning whenever
            poisonous species together are more probable than the threshold.
    """

    costs: dict[str, int]
    poisonous_classes: int
    poisonous_queries: int
    counts: dict[str, int]
    cost: Estimate
    threshold: float
    careful_counts: dict[str, int]
    careful_cost: Estimate


@dataclass(frozen=True)
class Focus:
    """A class to look at closely.

    Attributes:
        ranks: the recalls at each rank, named after its group; none if none of its observations was held out.
        taken_for, taken_for_it: (label, observations) of the confusions, the commonest first.
        probability: the mean of the right answer.
        resembles: (label, cosine) of the classes with the most similar means.
        photos: (first photo, outcome) of its observations.
    """

    label: int
    shots: int
    queries: int
    ranks: list[GroupRecalls]
    taken_for: list[tuple[int, int]]
    taken_for_it: list[tuple[int, int]]
    probability: float | None
    photos: list[tuple[str, str]]
    resembles: list[tuple[int, float]]


def score_rank(evidence: Evidence, rank: Rank) -> RankScores:
    truth, outcome, weights = rank.groups[evidence.truth], evidence.rank_outcomes[rank.name], evidence.weights
    confidence = rank.sum_probabilities(evidence.probabilities).max(axis=1)
    scores = held_out_scores(truth, outcome.top, weights, evidence.is_macro)
    right, wrong = (np.histogram(confidence[own], BINS, (0, 1))[0] for own in (outcome.ranks == 0, outcome.ranks > 0))
    return RankScores(
        rank=rank.name,
        groups=int(rank.is_named.sum()),
        query_groups=len(np.unique(truth)),
        **{name: Estimate(**interval_of(scores, name)) for name in ("recall_at_1", "recall_at_5", "macro_f1")},
        by_species=mean(rank.groups[evidence.guesses] == truth, weights),
        confidence=float(np.average(confidence, weights=weights)),
        right=right.tolist(),
        wrong=wrong.tolist(),
    )


def score_ranks(evidence: Evidence, headline: Scores) -> list[RankScores]:
    """The scores at every rank; those of the species are the headline's."""
    *wider, species = (score_rank(evidence, rank) for rank in evidence.ranks)
    own = {name: headline[name] for name in ("recall_at_1", "recall_at_5", "macro_f1")}
    return [*wider, replace(species, **own, by_species=headline["recall_at_1"])]


def score_hierarchy(evidence: Evidence) -> dict[str, Estimate]:
    """How often the first guesses of all ranks are right, and how often they are the ranks of the first species."""
    outcomes = [(rank, evidence.rank_outcomes[rank.name]) for rank in evidence.ranks]
    is_right = [outcome.ranks == 0 for _, outcome in outcomes]
    is_consistent = [outcome.top[:, 0] == rank.groups[evidence.guesses] for rank, outcome in outcomes]
    found = {"accuracy": is_right, "consistent": is_consistent}
    return {name: mean(np.all(rows, axis=0), evidence.weights) for name, rows in found.items()}


def score_groups(evidence: Evidence) -> dict[str, list[GroupRecalls]]:
    """Recalls by shots, photos, habitat and month; without what the competition does not say."""
    habitats = [query.metadata.get("habitat") or None for query in evidence.queries]
    common = [name for name, _ in Counter(filter(None, habitats)).most_common(HABITATS)]
    groups = {
        "shots": [_capped(count) for count in evidence.shots],
        "photos": [_capped(len(query.photos)) for query in evidence.queries],
        "habitat": [name if name in common else name and "others" for name in habitats],
        "month": [_month(query.metadata.get("month", "")) for query in evidence.queries],
    }
    counts = [_capped(count) for count in range(LARGE + 1)]
    orders = {"shots": counts, "photos": counts, "habitat": [*common, "others"], "month": calendar.month_name[1:]}
    grouped = {name: recalls_by(evidence.outcome.ranks, own, orders[name]) for name, own in groups.items()}
    return {name: rows for name, rows in grouped.items() if len(rows) > 1}


def _capped(count: int) -> str:
    return str(count) if count < LARGE else f"{LARGE} or more"


def _month(number: str) -> str | None:
    try:
        return calendar.month_name[int(float(number))] or None
    except (ValueError, OverflowError, IndexError):
        return None


def score_classes(evidence: Evidence, closeup: Closeup) -> list[ClassScores]:
    """A row for every class, in the order of the taxonomy."""
    photos, size, truth = closeup.first_photos(), len(evidence.classes), evidence.truth
    queries, guessed = (np.bincount(one, minlength=size).tolist() for one in (truth, evidence.guesses))
    own = evidence.probabilities[np.arange(len(truth)), truth]
    first, five, probability = (
        (np.bincount(truth, values, minlength=size) / np.maximum(queries, 1)).tolist()
        for values in (evidence.outcome.ranks < 1, evidence.outcome.ranks < 5, own)
    )
    f1 = f1_score(truth, evidence.guesses, labels=range(size), average=None, zero_division=0).tolist()
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
            queries=queries[label],
            guessed=guessed[label],
            recall_at_1=first[label] if queries[label] else None,
            recall_at_5=five[label] if queries[label] else None,
            f1=f1[label] if queries[label] or guessed[label] else None,
            probability=probability[label] if queries[label] else None,
            photo=photos.get(label),
        )
        for label in np.argsort(evidence.ranks[-1].groups).tolist()
    ]


def confuse_groups(evidence: Evidence) -> list[Confusion]:
    """A confusion matrix for each rank; a matrix of one cell says nothing and is left out."""
    found = []
    for rank in evidence.ranks:
        truth, guesses = rank.groups[evidence.truth], evidence.rank_outcomes[rank.name].top[:, 0]
        met, encoded = np.unique(np.concatenate([truth, guesses]), return_inverse=True)
        if len(met) > 1:
            counts = Counter(zip(encoded[: len(guesses)].tolist(), encoded[len(guesses) :].tolist(), strict=True))
            cells = [(*cell, counts[cell]) for cell in sorted(counts)]
            names, relatives = [rank.names[group] for group in met], find_relatives(evidence.ranks, rank, met)
            found.append(Confusion(rank.name, names, relatives, cells))
    return found


def find_relatives(ranks: Sequence[Rank], rank: Rank, met: np.ndarray) -> list[tuple[str, int, int]]:
    """The visible groups of the wider rank that has most of them, see `Confusion`; `met` are the groups of the rows."""
    best: list[tuple[str, int, int]] = []
    species = np.unique(rank.groups, return_index=True)[1][met]  # one of each group
    for wider in ranks[: ranks.index(rank)]:
        spans, start = [], 0
        for group, rows in itertools.groupby(wider.groups[species].tolist()):
            end = start + len(list(rows))
            spans += [(wider.names[group], start, end)] if end - start >= VISIBLE * len(met) else []
            start = end
        best = max(best, spans, key=len)
    return best


def list_mistakes(evidence: Evidence, closeup: Closeup) -> list[Mistake]:
    """Every wrong first guess: the commonest confusions first, and of each the most confident guesses first."""
    wrong, first = np.flatnonzero(evidence.guesses != evidence.truth), evidence.probabilities.max(axis=1)
    pairs = list(zip(evidence.truth[wrong].tolist(), evidence.guesses[wrong].tolist(), strict=True))
    counts, mistakes = Counter(pairs), []
    for query, (true, guessed) in zip(wrong.tolist(), pairs, strict=True):
        shared = [rank.name for rank in evidence.ranks if rank.groups[true] == rank.groups[guessed]]
        mistakes.append(
            Mistake(
                observation=evidence.queries[query].id,
                true=true,
                guessed=guessed,
                shared_rank=shared[-1] if shared else None,
                position=int(evidence.outcome.ranks[query]) + 1,
                shots=int(evidence.shots[query]),
                probability=float(first[query]),
                photo=evidence.photo(evidence.queries[query]),
                nearest=closeup.nearest(query, guessed),
                count=counts[true, guessed],
            )
        )
    return sorted(mistakes, key=lambda one: (-one.count, one.true, one.guessed, -one.probability))


def find_deadly(evidence: Evidence) -> Deadly | None:
    """Poisonous species taken for edible ones and the reverse; None if no class is known as poisonous."""
    poisonous, edible = evidence.poisonous == 1, evidence.poisonous == 0
    if not poisonous.any():
        return None
    true, true_edible = poisonous[evidence.truth], edible[evidence.truth]
    # By expected cost it pays to warn when a poisonous species is more probable than 1 in 101.
    threshold = COSTS[FALSE_ALARM] / (COSTS[MISSED] + COSTS[FALSE_ALARM])
    warned = evidence.probabilities[:, poisonous].sum(axis=1) > threshold
    found = {MISSED: true & edible[evidence.guesses], FALSE_ALARM: true_edible & poisonous[evidence.guesses]}
    careful = {MISSED: true & ~warned, FALSE_ALARM: true_edible & warned}
    counts, careful_counts = ({kind: int(own.sum()) for kind, own in kinds.items()} for kinds in (found, careful))
    cost, careful_cost = (mean(sum(COSTS[kind] * own for kind, own in kinds.items())) for kinds in (found, careful))
    return Deadly(
        costs=COSTS,
        poisonous_classes=int(poisonous.sum()),
        poisonous_queries=int(true.sum()),
        counts=counts,
        cost=cost,
        threshold=threshold,
        careful_counts=careful_counts,
        careful_cost=careful_cost,
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
    own, taken = evidence.truth == label, evidence.guesses == label
    held_out = {
        evidence.photo(evidence.queries[query]): MISTAKEN if evidence.guesses[query] != label else RECOGNISED
        for query in np.flatnonzero(own)
    }
    ranks = []
    for rank in evidence.ranks:
        group = f"{rank.name}: {rank.names[rank.groups[label]]}"
        ranks += recalls_by(evidence.rank_outcomes[rank.name].ranks[own], [group] * int(own.sum()), [group])
    return Focus(
        label=label,
        shots=int(evidence.reference[label]),
        queries=int(own.sum()),
        ranks=ranks,
        taken_for=Counter(evidence.guesses[own & ~taken].tolist()).most_common(),
        taken_for_it=Counter(evidence.truth[taken & ~own].tolist()).most_common(),
        probability=float(evidence.probabilities[own, label].mean()) if own.any() else None,
        photos=list((dict.fromkeys(closeup.photos_of(label), REFERENCE) | held_out).items())[:SHOWN],
        resembles=closeup.resembling(label),
    )

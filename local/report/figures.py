"""Compute every figure of a report: what is shown elsewhere of a run is read from what this returns.

Called by local/evaluate.py; draws nothing. A dictionary {value, low, high} is a mean with its 95% interval.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import norm
from sklearn.metrics import f1_score

from kernel.inputs import InputError
from kernel.observations import Observation, find_test_table
from local.banks.search import Outcome, compare
from local.base.metrics import FEWEST, GUESSES, RESAMPLES, bounded, held_out_scores, interval_of, macro_f1_gain, score
from local.data.competition import places_of, sort_ids
from local.report.advice import advise
from local.report.closeup import Closeup
from local.report.evidence import Evidence, Rank, answers_of, asked, judge
from local.report.origin import reproduce, training
from local.report.trust import trust

MOST_SHOTS = MOST_PHOTOS = 4  # what has so many or more is told together
HABITATS = 12  # told apart; the others together
PAIRS = 25  # confusions that are shown
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
RECALLS = {f"recall_at_{count}": count for count in GUESSES}
MAIN = 5  # guesses, of the recall by which what is better is told
CONFIDENCES = 20  # bars of a histogram
VISIBLE = 0.04  # of a matrix's side, for a name beside it
SHOWN = 8  # photos of a species in focus
COSTS = {"poisonous taken for edible": 100, "edible taken for poisonous": 1}  # FungiCLEF 2024's
CELLS = 20_000_000  # of drawn counts in memory at once


def evaluate(evidence: Evidence, others: Sequence[Path], focus: Sequence[str]) -> dict:
    """All figures of a run's report.

    Args:
        others: runs to compare with, judged by the same observations, or by some of them.
        focus: names of species, or class ids, to look at closely.

    Raises:
        InputError: another run has no observation in common; a species is not known.
    """
    wanted = [place for name in focus for place in find_species(evidence, name)]
    closeup = Closeup(evidence)
    is_macro, is_even = evidence.recipe.train.monitor == "macro_f1", np.allclose(evidence.weights, 1)
    figures = {
        "run": evidence.run.name,
        "data": evidence.competition.folder.name,
        "layout": evidence.competition.layout.name,
        "observations": len(evidence.queries),
        "classes": len(evidence.classes),
        "classes_asked": len(np.unique(evidence.truth)),
        "reference_observations": int(evidence.reference.sum()),
        "headline": headline(evidence.truth, evidence.log_probabilities, evidence.weights, is_macro),
        "unweighted": None if is_even else headline(evidence.truth, evidence.log_probabilities),
        "is_macro": is_macro,
        "by_training": evidence.manifest.members[0].validation,
        "chosen": list(evidence.recipe.search.choose),
        "against": [against(evidence, run) for run in others],
    }
    expected = figures["headline"][evidence.competition.layout.metric]["value"]
    figures["leaderboard"] = leaderboard(evidence, figures["against"], expected)
    figures["ranks"] = [by_rank(evidence, rank) for rank in evidence.ranks]
    figures["hierarchical"] = hierarchical(evidence)
    figures["groups"] = groups(evidence)
    figures["species"] = species(evidence, closeup)
    figures["confusions"] = [confusion(evidence, rank) for rank in evidence.ranks]
    figures["mistaken"] = mistaken(evidence)
    figures["pairs"] = pairs(evidence, closeup)
    figures["deadly"] = deadly(evidence, closeup)
    figures["focus"] = [in_focus(evidence, closeup, place) for place in wanted]
    figures["photos"] = closeup.photos()
    figures["trust"] = trust(evidence, closeup)
    figures["map"] = closeup.map()
    figures["training"] = training(evidence)
    figures["advice"] = advise(evidence, figures)
    figures["reproduce"] = reproduce(evidence, others, focus)
    return figures


def find_species(evidence: Evidence, name: str) -> list[int]:
    """The classes of a species, two of which may have one name.

    Raises:
        InputError: there is none.
    """
    plain = [full.split(" #")[0].casefold() for full in evidence.names]
    found = [place for place, one in enumerate(plain) if name.casefold() in (one, evidence.classes[place].casefold())]
    if not found:
        near = difflib.get_close_matches(name.casefold(), plain, n=3, cutoff=0.0)
        near = ", ".join(evidence.names[plain.index(one)] for one in near)
        raise InputError(f'--focus "{name}" is no species of {evidence.competition.folder}: the nearest are {near}')
    return found


def headline(
    truth: np.ndarray, log_probabilities: np.ndarray, weights: np.ndarray | None = None, is_macro: bool = False
) -> dict:
    """Recalls, macro and weighted F1, and log-loss, each with its interval.

    Args:
        weights, is_macro: as in `held_out_scores`; None counts every observation the same.
    """
    outcome = judge(log_probabilities, truth)
    scores = score(truth, outcome.top) if weights is None else held_out_scores(truth, outcome.top, weights, is_macro)
    values = {name: interval_of(scores, name) for name in (*RECALLS, "macro_f1")}
    value, drawn = weighted_f1(truth, outcome.top[:, 0], weights)
    return values | {"weighted_f1": spread(value, drawn), "log_loss": mean_loss(outcome.losses, weights)}


def spread(value: float, drawn: np.ndarray) -> dict:
    """A value with the interval of what resampling made of it."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean_loss(losses: np.ndarray, weights: np.ndarray | None = None) -> dict | None:
    """The mean log-loss, over observations whose class the bank has."""
    weights = np.ones(len(losses)) if weights is None else weights
    known = ~np.isnan(losses) & (weights > 0)
    return bounded(losses[known], weights=weights[known]) if known.any() else None


def draws(count: int, size: int) -> Iterator[np.ndarray]:
    """How often each of `count` observations is among `size` drawn ones, in parts that make RESAMPLES rows together.

    Each part is (resamples, count) float32.
    """
    rng, left = np.random.default_rng(0), RESAMPLES
    while left:
        part = min(left, max(1, CELLS // count))
        yield rng.multinomial(size, np.full(count, 1 / count), part).astype(np.float32)
        left -= part


def weighted_f1(truth: np.ndarray, guesses: np.ndarray, given: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """F1 averaged over classes by their observations; and the same of every resample of the observations.

    Args:
        given: (observations,) weight of each; None gives all the same.
    """
    given = np.ones(len(truth), np.float32) if given is None else given.astype(np.float32)
    truth, guesses, given = (values[given > 0] for values in (truth, guesses, given))
    value = f1_score(truth, guesses, average="weighted", sample_weight=given, zero_division=0)
    return float(value), resampled_f1("weighted", truth, guesses, len(truth), given)


def resampled_f1(
    average: str, truth: np.ndarray, guesses: np.ndarray, size: int, given: np.ndarray | None = None
) -> np.ndarray:
    """(RESAMPLES,) F1 scores, each of `size` observations drawn with replacement.

    Args:
        average: "weighted" or "macro", over the classes among the drawn truths and guesses; as in scikit-learn.
        given: (observations,) weight of each; None gives all the same.
    """
    classes, places = np.unique(np.concatenate([truth, guesses]), return_inverse=True)
    own, said = places[: len(truth)], places[len(truth) :]
    shape, rows = (len(truth), len(classes)), np.arange(len(truth))
    asked_of, guessed_of = (csr_array((np.ones(len(rows), np.float32), (rows, one)), shape) for one in (own, said))
    hits_of = csr_array(((own == said).astype(np.float32), (rows, own)), shape)
    scores = []
    for counts in draws(len(truth), size):
        weights = counts if given is None else counts * given
        true, guessed, hit = (weights @ matrix for matrix in (asked_of, guessed_of, hits_of))
        met = true + guessed
        weight = true if average == "weighted" else (met > 0).astype(np.float32)
        scores.append((2 * hit / np.where(met > 0, met, 1) * weight).sum(axis=1) / weight.sum(axis=1))
    return np.concatenate(scores)


def against(evidence: Evidence, other: Path) -> dict:
    """Another run on the observations that both were judged by: its scores, and the paired differences from them.

    Raises:
        InputError: there are no such observations.
    """
    answers = answers_of(other)
    ids, bank = asked(answers)
    place = {name: number for number, name in enumerate(ids)}
    ours = np.array([number for number, query in enumerate(evidence.queries) if query.id in place], dtype=int)
    if not len(ours):
        raise InputError(
            f"{other} was judged by none of the observations of {evidence.run}: compare runs of one --data"
        )
    theirs = np.array([place[evidence.queries[number].id] for number in ours])
    classes = [*evidence.classes, *sort_ids(set(bank) - set(evidence.classes))]
    found = np.full((len(ours), len(classes)), -np.inf, dtype=np.float32)
    found[:, places_of(bank, classes)] = answers.log_probabilities.numpy()[theirs]
    own = np.full_like(found, -np.inf)
    own[:, : len(evidence.classes)] = evidence.log_probabilities[ours]
    truth = evidence.truth[ours]
    new, old = judge(own, truth), judge(found, truth)
    gains = {name: recall_gain(new, old, count) for name, count in RECALLS.items()}
    gains["macro_f1"] = macro_f1_gain(truth, new.top[:, 0], old.top[:, 0])
    (first, drawn), (second, drawn_too) = (weighted_f1(truth, outcome.top[:, 0]) for outcome in (new, old))
    gains["weighted_f1"] = spread(first - second, drawn - drawn_too)
    gains["log_loss"] = mean_loss(new.losses - old.losses)
    together = compare(torch.tensor(own + found), truth)
    best = max(new, old, key=lambda outcome: (outcome.places < MAIN).mean())
    return {
        "run": other.name,
        "path": str(other),
        "observations": len(ours),
        "is_evidence": len(ours) >= FEWEST,
        "scores": headline(truth, found),
        "gain": gains,
        "together": {name: recall_gain(together, best, count) for name, count in RECALLS.items()},
    }


def recall_gain(new: Outcome, old: Outcome, count: int) -> dict:
    """How much oftener the true class is among so many guesses, paired by observation."""
    return bounded((new.places < count).astype(float) - (old.places < count))


def leaderboard(evidence: Evidence, others: Sequence[dict], expected: float | None = None) -> dict:
    """What the leaderboard can see of the score that it is ordered by.

    `boards` says of each of its parts where this run's score will fall in 95 of 100 cases, the chance of the held-out
    observations included; and how probable it is that a run which is better by what was found looks worse there.

    Args:
        expected: the score that the held-out observations promise; None is that of all of them, unweighted.
    """
    try:
        competition, layout = evidence.competition, evidence.manifest.competition.name
        size = len(find_test_table(competition.folder, layout, competition.resolution).observations)
    except InputError:  # a folder without a test set
        size = 0
    layout, boards = evidence.competition.layout, []
    value = metric_of(evidence, layout.metric) if expected is None else expected
    for part, observations in layout.boards(size).items():
        if not observations:
            continue
        noise = chance(evidence, layout.metric, observations)
        width = float(np.hypot(noise, chance(evidence, layout.metric, len(evidence.queries))))
        wrong = {}
        for other in others:
            gain = other["gain"][layout.metric]
            deviation = (gain["high"] - gain["low"]) / (2 * 1.96) * np.sqrt(other["observations"] / observations)
            if not other["is_evidence"] or not (deviation or gain["value"]):
                wrong[other["run"]] = 0.5  # nothing is known of their order
            else:
                wrong[other["run"]] = float(norm.cdf(-abs(gain["value"]) / deviation)) if deviation else 0.0
        boards.append(
            {
                "part": part,
                "observations": observations,
                "half_width": noise,
                "expected": {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width)},
                "wrong_order": wrong,
            }
        )
    return {"score": layout.metric, "boards": boards}


def metric_of(evidence: Evidence, metric: str) -> float:
    """A recall or macro-F1 of the held-out observations."""
    if metric == "macro_f1":
        return float(f1_score(evidence.truth, evidence.guesses, average="macro", zero_division=0))
    return float((evidence.outcome.places < RECALLS[metric]).mean())


def chance(evidence: Evidence, metric: str, observations: int) -> float:
    """Half of the 95% interval of a metric over so many observations like those that were held out.

    A recall is a fraction of observations, and macro-F1 is not: it is measured on drawn sets of that size.
    """
    if metric == "macro_f1":
        drawn = resampled_f1("macro", evidence.truth, evidence.guesses, observations)
        return float(np.subtract(*np.percentile(drawn, [97.5, 2.5])) / 2)
    recall = metric_of(evidence, metric)
    return float(1.96 * np.sqrt(recall * (1 - recall) / observations))


def by_rank(evidence: Evidence, rank: Rank) -> dict:
    """How good the answers are at one level of the taxonomy, a group's probability being that of its species.

    `by_species` is how often the first species' own group is right: where that is better, large groups collect more
    from many unlikely species than they deserve.
    """
    truth, outcome, confidence = rank_outcome(evidence, rank)
    scores = score(truth, outcome.top)
    edges = np.linspace(0, 1, CONFIDENCES + 1)
    right = outcome.places == 0
    return {
        "rank": rank.name,
        "groups": int(rank.is_named.sum()),
        "asked": len(np.unique(truth)),
        **{name: interval_of(scores, name) for name in ("recall_at_1", "recall_at_5", "macro_f1")},
        "by_species": bounded((rank.groups[evidence.guesses] == truth).astype(float)),
        "confidence": float(confidence.mean()),
        "histogram": {
            "right": np.histogram(confidence[right], edges)[0].tolist(),
            "wrong": np.histogram(confidence[~right], edges)[0].tolist(),
        },
    }


def rank_outcome(evidence: Evidence, rank: Rank) -> tuple[np.ndarray, Outcome, np.ndarray]:
    """At one rank the true groups, (queries,), the answers, and the probabilities of the first of them, (queries,)."""
    if rank.name not in evidence.memory:
        truth, pooled = rank.groups[evidence.truth], rank.pooled(evidence.probabilities)
        evidence.memory[rank.name] = truth, compare(torch.tensor(pooled), truth), pooled.max(axis=1)
    return evidence.memory[rank.name]


def hierarchical(evidence: Evidence) -> dict:
    """How often every rank's own first guess is right; and how often these guesses lie on one line of the tree."""
    firsts = {rank.name: rank_outcome(evidence, rank) for rank in evidence.ranks}
    right = np.all([outcome.places == 0 for _, outcome, _ in firsts.values()], axis=0)
    line = np.all(
        [firsts[rank.name][1].top[:, 0] == rank.groups[evidence.guesses] for rank in evidence.ranks],
        axis=0,
    )
    return {"accuracy": bounded(right.astype(float)), "consistent": bounded(line.astype(float))}


def groups(evidence: Evidence) -> dict[str, list[dict]]:
    """Recalls by shots, photos, habitat and month; what a competition does not say is left out."""
    habitats = Counter(said for query in evidence.queries if (said := query.metadata.get("habitat")))
    common = [name for name, _ in habitats.most_common(HABITATS)]
    photos = [len(query.photos) for query in evidence.queries]
    labels = {
        "shots": ([capped(count, MOST_SHOTS) for count in evidence.shots], up_to(MOST_SHOTS)),
        "photos": ([capped(count, MOST_PHOTOS) for count in photos], up_to(MOST_PHOTOS)),
        "habitat": (
            [
                said if (said := query.metadata.get("habitat")) in common else "others" if said else None
                for query in evidence.queries
            ],
            [*common, "others"],
        ),
        "month": ([month_of(query) for query in evidence.queries], list(MONTHS)),
    }
    told = {name: recalls_by(evidence, *given) for name, given in labels.items()}
    return {name: rows for name, rows in told.items() if len(rows) > 1}


def capped(count: int, most: int) -> str:
    """`3`, or `4 or more`."""
    return str(count) if count < most else f"{most} or more"


def up_to(most: int) -> list[str]:
    """All that `capped` may say."""
    return [capped(count, most) for count in range(most + 1)]


def month_of(query: Observation) -> str | None:
    """The name of the month, where the table has it."""
    with suppress(KeyError, ValueError, IndexError):
        return MONTHS[int(float(query.metadata["month"])) - 1]
    return None


def recalls_by(evidence: Evidence, labels: Sequence[str | None], order: Sequence[str]) -> list[dict]:
    """Recalls of the observations of each label, in order; those without one are left out."""
    rows, labels = [], np.array(labels, dtype=object)
    for label in order:
        places = evidence.outcome.places[labels == label]
        if len(places):
            recalls = {name: bounded((places < count).astype(float)) for name, count in RECALLS.items()}
            rows.append({"label": label, "observations": len(places), **recalls})
    return rows


def species(evidence: Evidence, closeup: Closeup) -> list[dict]:
    """A row for every class, in the order of the taxonomy."""
    photos = closeup.first_photos()
    count, outcome = len(evidence.classes), evidence.outcome
    asked_of, guessed = (np.bincount(one, minlength=count) for one in (evidence.truth, evidence.guesses))
    first, five = (
        np.bincount(evidence.truth, outcome.places < most, minlength=count) / np.maximum(asked_of, 1)
        for most in (1, MAIN)
    )
    own = evidence.probabilities[np.arange(len(evidence.truth)), evidence.truth]
    mean = np.bincount(evidence.truth, own, minlength=count) / np.maximum(asked_of, 1)
    f1 = f1_score(evidence.truth, evidence.guesses, labels=range(count), average=None, zero_division=0)
    return [
        {
            "class": int(place),
            "id": evidence.classes[place],
            "name": evidence.names[place],
            "lineage": [
                rank.names[group] if rank.is_named[group := rank.groups[place]] else None
                for rank in evidence.ranks[:-1]
            ],
            "poisonous": None if np.isnan(evidence.poisonous[place]) else bool(evidence.poisonous[place]),
            "shots": int(evidence.reference[place]),
            "asked": int(asked_of[place]),
            "guessed": int(guessed[place]),
            "recall_at_1": float(first[place]) if asked_of[place] else None,
            "recall_at_5": float(five[place]) if asked_of[place] else None,
            "f1": float(f1[place]) if asked_of[place] or guessed[place] else None,
            "probability": float(mean[place]) if asked_of[place] else None,
            "photo": photos.get(int(place)),
        }
        for place in np.argsort(evidence.ranks[-1].groups)
    ]


def confusion(evidence: Evidence, rank: Rank) -> dict:
    """What is taken for what at one rank: (true, guessed, observations), of groups in the order of the taxonomy."""
    truth, outcome, _ = rank_outcome(evidence, rank)
    cells, counts = np.unique(truth * len(rank.names) + outcome.top[:, 0], return_counts=True)
    true, guessed = np.divmod(cells, len(rank.names))
    met = np.unique(np.concatenate([true, guessed]))
    return {
        "rank": rank.name,
        "groups": [rank.names[group] for group in met],
        "relatives": relatives(evidence.ranks, rank, met),
        "cells": np.stack([np.searchsorted(met, true), np.searchsorted(met, guessed), counts], axis=1).tolist(),
    }


def relatives(ranks: Sequence[Rank], rank: Rank, met: np.ndarray) -> list[dict]:
    """Runs of neighbours in a matrix that belong together: of the wider rank that tells most of them apart visibly."""
    best: list[dict] = []
    first = np.unique(rank.groups, return_index=True)[1][met]  # a species of each group
    for wider in ranks[: ranks.index(rank)]:
        above = wider.groups[first]
        starts = np.flatnonzero(np.r_[True, above[1:] != above[:-1]])
        ends = np.r_[starts[1:], len(above)]
        wide = [
            {"name": wider.names[above[start]], "start": int(start), "end": int(end)}
            for start, end in zip(starts, ends, strict=True)
            if end - start >= VISIBLE * len(above)
        ]
        best = max(best, wide, key=len)
    return best


def mistaken(evidence: Evidence) -> list[list[int]]:
    """Every confusion of species: (true class, guessed class, observations)."""
    count = len(evidence.classes)
    missed = evidence.guesses != evidence.truth
    cells, counts = np.unique(evidence.truth[missed] * count + evidence.guesses[missed], return_counts=True)
    return np.stack([*np.divmod(cells, count), counts], axis=1)[np.argsort(-counts, kind="stable")].tolist()


def pairs(evidence: Evidence, closeup: Closeup) -> list[dict]:
    """The commonest confusions of species, each with an observation and what it was taken for."""
    missed = np.flatnonzero(evidence.guesses != evidence.truth)
    cells, firsts, counts = np.unique(
        evidence.truth[missed] * len(evidence.classes) + evidence.guesses[missed],
        return_index=True,
        return_counts=True,
    )
    sizes = np.bincount(evidence.truth, minlength=len(evidence.classes))
    shares = counts / sizes[cells // len(evidence.classes)]
    return [
        mistake(evidence, closeup, missed[firsts[place]])
        | {"observations": int(counts[place]), "share": float(shares[place])}
        for place in np.lexsort((-shares, -counts))[:PAIRS]
    ]


def mistake(evidence: Evidence, closeup: Closeup, query: int) -> dict:
    """One misread observation: the classes, by place, the rank that they share, and a photo of each."""
    true, guessed = int(evidence.truth[query]), int(evidence.guesses[query])
    shared = [rank.name for rank in evidence.ranks if rank.groups[true] == rank.groups[guessed]]
    return {
        "true": true,
        "guessed": guessed,
        "shared_rank": shared[-1] if shared else None,
        "observation": evidence.queries[query].id,
        "probability": float(evidence.probabilities[query, guessed]),
        "photo": closeup.photo_of(query),
        "nearest": closeup.nearest(query, guessed),
    }


def deadly(evidence: Evidence, closeup: Closeup) -> dict | None:
    """Poisonous taken for edible and the reverse, and what that costs; None where no class is known as poisonous."""
    poisonous = evidence.poisonous == 1
    if not poisonous.any():
        return None
    edible = evidence.poisonous == 0
    true, guessed = poisonous[evidence.truth], poisonous[evidence.guesses]
    kinds = dict(
        zip(COSTS, (true & edible[evidence.guesses], edible[evidence.truth] & guessed), strict=True),
    )
    cost = sum(COSTS[kind] * kinds[kind] for kind in kinds)
    # Whoever decides by expected cost calls poisonous what is so with more than 1 in 101.
    likely = evidence.probabilities[:, poisonous].sum(axis=1)
    dearer, cheaper = COSTS.values()
    careful = likely > cheaper / (dearer + cheaper)
    careful_cost = dearer * (true & ~careful) + cheaper * (edible[evidence.truth] & careful)
    return {
        "costs": COSTS,
        "poisonous_classes": int(poisonous.sum()),
        "poisonous_asked": int(true.sum()),
        "edible_asked": int(edible[evidence.truth].sum()),
        "kinds": {kind: int(where.sum()) for kind, where in kinds.items()},
        "cost": bounded(cost.astype(float)),
        "careful": {
            "threshold": cheaper / (dearer + cheaper),
            "cost": bounded(careful_cost.astype(float)),
            "missed": int((true & ~careful).sum()),
            "false_alarms": int((edible[evidence.truth] & careful).sum()),
        },
        "mistakes": [
            {"kind": kind} | mistake(evidence, closeup, query)
            for kind, where in kinds.items()
            for query in np.flatnonzero(where)[:PAIRS]
        ],
    }


def in_focus(evidence: Evidence, closeup: Closeup, place: int) -> dict:
    """One species: how well it is known at every rank, what it is taken for, and what is taken for it."""
    own, taken = evidence.truth == place, evidence.guesses == place
    ranks = []
    for rank in evidence.ranks:
        _, outcome, _ = rank_outcome(evidence, rank)
        places = outcome.places[own]
        ranks.append(
            {
                "rank": rank.name,
                "expected": rank.names[rank.groups[place]],
                "recall_at_1": bounded((places == 0).astype(float)) if len(places) else None,
                "recall_at_5": bounded((places < MAIN).astype(float)) if len(places) else None,
            }
        )
    return {
        "class": place,
        "asked": int(own.sum()),
        "shots": int(evidence.reference[place]),
        "ranks": ranks,
        "taken_for": counted(evidence.guesses[own & ~taken]),
        "taken_for_it": counted(evidence.truth[taken & ~own]),
        "expected_share": float(evidence.probabilities[own, place].mean()) if own.any() else None,
        "known": closeup.photos_of(place),
        "asked_photos": [closeup.photo_of(query) for query in np.flatnonzero(own)[:SHOWN]],
        "resembles": closeup.resembling(place),
    }


def counted(places: np.ndarray) -> list[dict]:
    """Classes with how often each occurs, the commonest first."""
    return [{"class": int(place), "observations": count} for place, count in Counter(places.tolist()).most_common()]

"""All figures of a report. The page and metrics.json show these and compute nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from local.base.console import progress
from local.report.advice import Advice, advise
from local.report.closeup import Closeup, Example, Map, UnreadablePhoto
from local.report.comparison import Comparison, Leaderboard, compare_with, predict_leaderboard
from local.report.evidence import Evidence
from local.report.failures import (
    ClassScores,
    Confusion,
    Deadly,
    Focus,
    GroupRecalls,
    Hierarchy,
    Mistake,
    RankScores,
    commonest_mistakes,
    confuse_groups,
    find_classes,
    find_deadly,
    focus_on,
    list_confusions,
    score_classes,
    score_groups,
    score_hierarchy,
    score_rank,
)
from local.report.origin import Origin, Training, read_training, trace_origin
from local.report.scores import Scores, score_answers
from local.report.trust import Trust, measure_trust


@dataclass(frozen=True)
class Figures:
    """The figures of a report, section by section.

    Attributes:
        observations: that were held out; `query_classes` are their classes, `classes` all.
        headline: weighted as the bank was chosen; `unweighted` the same without weights, None if all are 1.
        is_macro: whether the weights give every class the same weight.
        validation: the scores that training found, by settings that the scored observations did not choose.
        chosen: settings that the held-out observations chose.
        species: a row for every class, in the order of the taxonomy.
        mistaken: every confusion of species, (true label, guessed label, observations).
    """

    run: str
    data: str
    competition: str
    observations: int
    classes: int
    query_classes: int
    reference_observations: int
    headline: Scores
    unweighted: Scores | None
    is_macro: bool
    validation: dict[str, float]
    chosen: list[str]
    against: list[Comparison]
    leaderboard: Leaderboard
    ranks: list[RankScores]
    hierarchy: Hierarchy
    groups: dict[str, list[GroupRecalls]]
    species: list[ClassScores]
    confusions: list[Confusion]
    mistaken: list[tuple[int, int, int]]
    pairs: list[Mistake]
    deadly: Deadly | None
    focus: list[Focus]
    best: list[Example]
    worst: list[Example]
    unreadable: list[UnreadablePhoto]
    trust: Trust
    map: Map | None
    training: Training
    origin: Origin
    advice: list[Advice] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The figures as metrics.json keeps them."""
        return asdict(self)


def compute_figures(evidence: Evidence, others: Sequence[Path], focus: Sequence[str]) -> Figures:
    """Compute all figures of a run's report.

    Args:
        others: runs to compare with.
        focus: names of species, or class ids, to look at closely.

    Raises:
        InputError: another run has no held-out observation in common; a species is not known.
    """
    labels = [label for name in focus for label in find_classes(evidence, name)]
    closeup = Closeup(evidence)
    figures = fill_sections(evidence, closeup, others, labels, trace_origin(evidence, others, focus))
    return replace(figures, advice=advise(evidence, figures))


def fill_sections(
    evidence: Evidence, closeup: Closeup, others: Sequence[Path], labels: Sequence[int], origin: Origin
) -> Figures:
    """All figures but the advice, which follows from the others; `labels` are the classes in focus."""
    is_macro, is_even = evidence.recipe.train.monitor == "macro_f1", bool(np.allclose(evidence.weights, 1))
    headline = score_answers(evidence.truth, evidence.log_probabilities, evidence.weights, is_macro)
    against = [compare_with(evidence, run) for run in others]
    expected = getattr(headline, evidence.labelled.competition.metric).value
    sections = {
        "unweighted": lambda: None if is_even else score_answers(evidence.truth, evidence.log_probabilities),
        "leaderboard": lambda: predict_leaderboard(evidence, against, expected),
        "ranks": lambda: [score_rank(evidence, rank) for rank in evidence.ranks],
        "hierarchy": lambda: score_hierarchy(evidence),
        "groups": lambda: score_groups(evidence),
        "species": lambda: score_classes(evidence, closeup),
        "confusions": lambda: [confuse_groups(evidence, rank) for rank in evidence.ranks],
        "mistaken": lambda: list_confusions(evidence),
        "pairs": lambda: commonest_mistakes(evidence, closeup),
        "deadly": lambda: find_deadly(evidence, closeup),
        "focus": lambda: [focus_on(evidence, closeup, label) for label in labels],
        "unreadable": closeup.unreadable,
        "trust": lambda: measure_trust(evidence, closeup),
        "map": closeup.map,
        "training": lambda: read_training(evidence),
    }
    # With thousands of classes a section may take half a minute.
    computed = {
        name: compute() for name, compute in progress(sections.items(), "computing the figures", unit="section")
    }
    best, worst = closeup.best_and_worst()
    return Figures(
        run=evidence.run.name,
        data=evidence.labelled.folder.name,
        competition=evidence.labelled.competition.name,
        observations=len(evidence.queries),
        classes=len(evidence.classes),
        query_classes=len(np.unique(evidence.truth)),
        reference_observations=int(evidence.reference.sum()),
        headline=headline,
        is_macro=is_macro,
        validation=dict(evidence.manifest.members[0].validation),
        chosen=list(evidence.recipe.search.choose),
        against=against,
        best=best,
        worst=worst,
        origin=origin,
        **computed,
    )

"""All figures of a report. The page and metrics.json show these and compute nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from local.base.console import progress
from local.report import closeup, failures, scores
from local.report.advice import Advice, advise
from local.report.evidence import Evidence
from local.report.origin import Origin, Training, read_training, trace_origin
from local.report.trust import Trust, measure_trust


@dataclass(frozen=True)
class Figures:
    """The figures of a report, section by section.

    Attributes:
        observations: that were held out; `query_classes` are their classes, `classes` all.
        headline: weighted as the bank was chosen; `unweighted` the same without weights, None if all are 1.
        is_macro: whether the weights give every class the same weight.
        metric: of the competition.
        validation: the scores that training found, by settings that the scored observations did not choose.
        chosen: settings that the held-out observations chose.
        hierarchy: see `score_hierarchy`.
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
    headline: scores.Scores
    unweighted: scores.Scores | None
    is_macro: bool
    validation: dict[str, float]
    chosen: list[str]
    against: list[scores.Comparison]
    metric: str
    leaderboard: list[scores.Board]
    ranks: list[failures.RankScores]
    hierarchy: scores.Scores
    groups: dict[str, list[scores.GroupRecalls]]
    species: list[failures.ClassScores]
    confusions: list[failures.Confusion]
    mistaken: list[tuple[int, int, int]]
    pairs: list[failures.Mistake]
    deadly: failures.Deadly | None
    focus: list[failures.Focus]
    best: list[closeup.Example]
    worst: list[closeup.Example]
    unreadable: list[closeup.UnreadablePhoto]
    trust: Trust
    map: closeup.Map | None
    training: Training
    origin: Origin
    advice: list[Advice] = field(default_factory=list)


def compute_figures(evidence: Evidence, others: Sequence[Path], focus: Sequence[str]) -> Figures:
    """Compute all figures of a run's report.

    Args:
        others: runs to compare with.
        focus: names of species, or class ids, to look at closely.

    Raises:
        InputError: another run has no held-out observation in common; a species is not known.
    """
    labels = [label for name in focus for label in failures.find_classes(evidence, name)]
    truth, outcome, metric = evidence.truth, evidence.outcome, evidence.labelled.competition.metric
    is_macro = evidence.recipe.train.monitor == "macro_f1"
    headline = scores.score_answers(truth, outcome, evidence.weights, is_macro)
    against = [scores.compare_with(evidence, run) for run in others]
    look = closeup.Closeup(evidence)
    sections = {
        "unweighted": lambda: None if np.allclose(evidence.weights, 1) else scores.score_answers(truth, outcome),
        "leaderboard": lambda: scores.predict_leaderboard(evidence, against, headline[metric].value),
        "ranks": lambda: [failures.score_rank(evidence, rank) for rank in evidence.ranks],
        "hierarchy": lambda: failures.score_hierarchy(evidence),
        "groups": lambda: failures.score_groups(evidence),
        "species": lambda: failures.score_classes(evidence, look),
        "confusions": lambda: [failures.confuse_groups(evidence, rank) for rank in evidence.ranks],
        "mistaken": lambda: failures.list_confusions(evidence),
        "pairs": lambda: failures.commonest_mistakes(evidence, look),
        "deadly": lambda: failures.find_deadly(evidence, look),
        "focus": lambda: [failures.focus_on(evidence, look, label) for label in labels],
        "best": look.best,
        "worst": look.worst,
        "unreadable": look.unreadable,
        "trust": lambda: measure_trust(evidence, look),
        "map": look.map,
        "training": lambda: read_training(evidence),
        "origin": lambda: trace_origin(evidence, others, focus),
    }
    # With thousands of classes a section may take half a minute.
    steps = progress(sections.items(), "computing the figures", unit="section")
    computed = {name: compute() for name, compute in steps}
    figures = Figures(
        run=evidence.run.name,
        data=evidence.labelled.folder.name,
        competition=evidence.labelled.competition.name,
        observations=len(evidence.queries),
        classes=len(evidence.classes),
        query_classes=len(np.unique(truth)),
        reference_observations=int(evidence.reference.sum()),
        headline=headline,
        is_macro=is_macro,
        validation=dict(evidence.manifest.members[0].validation),
        chosen=list(evidence.recipe.search.choose),
        against=against,
        metric=metric,
        **computed,
    )
    return replace(figures, advice=advise(evidence, figures))

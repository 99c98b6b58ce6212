"""All figures of a report. The page and metrics.json show these and compute nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kernel.manifest import EncoderSpec
from local.base.console import progress
from local.base.files import read_json
from local.report import closeup, failures, scores
from local.report.advice import Advice, advise
from local.report.duplicates import DuplicateScores, score_duplicates
from local.report.evidence import Evidence
from local.report.origin import Origin, Training, read_training, trace_origin
from local.report.trust import Trust, measure_trust


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        encoders: in words.
        reference: the competition's splits that the bank is made of.
        folds: whether the held-out observations are in the bank, and were held out in turn.
        scored: observations that the headline is of. If they are more, `observations` were drawn from them.
    """

    encoders: tuple[str, ...]
    views: tuple[str, ...]
    reference: str
    reference_observations: int
    reference_photos: int
    reference_classes: int
    observations: int
    photos: int
    classes: int
    folds: bool
    scored: int


@dataclass(frozen=True)
class Figures:
    """The figures of a report, section by section.

    Attributes:
        run, data: the last two parts of their paths.
        observations: that were held out.
        headline: of predictions by settings that the scored observations did not choose, weighted as the bank was
            chosen; `unweighted` the same without weights, None if all are 1.
        is_macro: whether the weights give every class the same weight.
        optimistic: the weighted scores of the chosen settings on the observations that chose them; empty without any.
        chosen: settings that the held-out observations chose.
        metric: of the competition.
        hierarchy: see `score_hierarchy`.
        species: a row for every class, in the order of the taxonomy.
        mistakes: every wrong first guess.
    """

    run: str
    data: str
    competition: str
    measured: Measured
    observations: int
    is_macro: bool
    optimistic: dict[str, float]
    chosen: list[str]
    metric: str
    headline: scores.Scores
    unweighted: scores.Scores | None
    against: list[scores.Comparison]
    duplicates: DuplicateScores
    leaderboard: list[scores.Board]
    ranks: list[failures.RankScores]
    hierarchy: scores.Scores
    groups: dict[str, list[scores.GroupRecalls]]
    species: list[failures.ClassScores]
    confusions: list[failures.Confusion]
    mistakes: list[failures.Mistake]
    deadly: failures.Deadly | None
    focus: list[failures.Focus]
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
    metric, look, computed = evidence.metric, closeup.Closeup(evidence), {}
    is_weighted = not np.allclose(evidence.weights, 1)
    sections = {
        "headline": lambda: scores.score_headline(evidence),
        "unweighted": lambda: (
            scores.score_answers(evidence.truth, evidence.outcome, evidence.classes) if is_weighted else None
        ),
        "against": lambda: [scores.compare_with(evidence, run) for run in others],
        "duplicates": lambda: score_duplicates(evidence),
        "leaderboard": lambda: scores.predict_leaderboard(
            evidence, computed["against"], computed["headline"][metric].value
        ),
        "ranks": lambda: failures.score_ranks(evidence, computed["headline"]),
        "hierarchy": lambda: failures.score_hierarchy(evidence),
        "groups": lambda: failures.score_groups(evidence),
        "species": lambda: failures.score_classes(evidence, look),
        "confusions": lambda: failures.confuse_groups(evidence),
        "mistakes": lambda: failures.list_mistakes(evidence, look),
        "deadly": lambda: failures.find_deadly(evidence),
        "focus": lambda: [failures.focus_on(evidence, look, label) for label in labels],
        "worst": look.worst,
        "unreadable": look.unreadable,
        "trust": lambda: measure_trust(evidence),
        "map": look.map,
        "training": lambda: read_training(evidence),
        "origin": lambda: trace_origin(evidence, others, focus),
    }
    # With thousands of classes a section may take half a minute.
    for name, compute in progress(sections.items(), "computing the figures", unit="section"):
        computed[name] = compute()
    figures = Figures(
        run="/".join(evidence.run.resolve().parts[-2:]),
        data="/".join(evidence.labelled.folder.resolve().parts[-2:]),
        competition=evidence.labelled.competition.name,
        measured=describe_measured(evidence),
        observations=len(evidence.queries),
        is_macro=evidence.is_macro,
        optimistic=read_json(evidence.run / "metrics.json")["validation_of_the_chosen_settings"],
        chosen=list(evidence.recipe.search.choose),
        metric=metric,
        **computed,
    )
    return replace(figures, advice=advise(evidence, figures))


def describe_encoder(spec: EncoderSpec) -> str:
    """An encoder in words: `vit_base_patch16_224 (timm), 224 × 224 pixels (crop)`."""
    size = spec.preprocessing.size
    return f"{spec.architecture} ({spec.library}), {size} × {size} pixels ({spec.preprocessing.resize_mode})"


def describe_measured(evidence: Evidence) -> Measured:
    encoders, bank = evidence.manifest.members[0].encoders, evidence.recipe.bank
    reference = evidence.labelled.in_splits(*bank.reference.split("+"))
    return Measured(
        encoders=tuple(map(describe_encoder, encoders)),
        views=tuple(bank.views),
        reference=bank.reference,
        reference_observations=len(reference),
        reference_photos=len(reference.photos),
        reference_classes=len(reference.classes),
        observations=len(evidence.queries),
        photos=sum(len(query.photos) for query in evidence.queries),
        classes=len(np.unique(evidence.truth)),
        folds=bool(evidence.is_in_bank.any()),
        scored=int(evidence.manifest.members[0].validation.get("observations", len(evidence.queries))),
    )

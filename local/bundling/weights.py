"""Collect the weights of one or several runs in the folder that becomes a Kaggle dataset."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.competitions import competition_of
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, Manifest, Member, Weights, write_manifest
from kernel.tables import RESOLUTIONS
from local.base.console import say
from local.base.metrics import LOG_LOSS, describe
from local.base.runs import open_run
from local.bundling.wheels import make_wheel, needed_wheels

if TYPE_CHECKING:
    from local.banks.ensemble import Ensemble

RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10")


def gather_weights(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy the files of every run and the wheels that they need, and write one manifest for all of them.

    Args:
        runs: run folders; several make an ensemble, weighted by cross-validation.
        folder: an empty folder to fill.

    Returns:
        The folders of the runs that the ensemble keeps, the best first.

    Raises:
        InputError: a folder is not a run, is damaged, or predicts other classes than the first; two runs need different
            versions of a library, or one needs a version that is not installed.
    """
    opened = [open_run(run) for run in runs]
    first = opened[0].manifest
    check_same_task(opened)
    needed_wheels(opened)  # fails, if it does, before the slow weighting of the runs
    if warning := warn_of_few_classes(first):
        say(warning)
    ensemble = weigh_runs(opened) if len(opened) > 1 else None
    members = in_order(opened, ensemble.weights if ensemble else [1.0])
    validation = score_ensemble(ensemble, members[0][0].manifest.members[0]) if len(members) > 1 else None
    opened = [run for run, _ in members]
    wheels = needed_wheels(opened)
    if wheels:
        say(f"with wheels of {', '.join(map(' '.join, wheels.items()))}, which Kaggle's image does not have")
    for name, version in wheels.items():
        make_wheel(name, version, folder / "wheels")
    resolution = max((run.manifest.competition.resolution for run in opened), key=RESOLUTIONS.index)
    known: dict[str, str] = {}
    copied = [
        replace(member, weight=weight * member.weight)
        for number, (run, weight) in enumerate(members, 1)
        for member in _copy(run, folder, number, known)
    ]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        competition=replace(first.competition, resolution=resolution),
        class_ids=first.class_ids,
        fallback_classes=first.fallback_classes,
        class_counts=first.class_counts,
        threshold=mean_threshold(members),
        members=tuple(copied),
        validation=validation,
        files={path.relative_to(folder).as_posix(): sha256(path) for path in files},
    )
    write_manifest(manifest, folder / MANIFEST)
    return [run.folder for run in opened]


def mean_threshold(members: Sequence[tuple[Weights, float]]) -> float | None:
    """The mean of the thresholds of runs, weighted as their log-probabilities are; None where they have none."""
    values = [(run.manifest.threshold, weight) for run, weight in members if run.manifest.threshold is not None]
    total = sum(weight for _, weight in values)
    return sum(threshold * weight for threshold, weight in values) / total if values else None


def choose_members(runs: Sequence[Weights]) -> list[tuple[Weights, float]]:
    """The runs of an ensemble and their weights, the best run first; without those that do not help."""
    return in_order(runs, weigh_runs(runs).weights)


def in_order(runs: Sequence[Weights], weights: Sequence[float]) -> list[tuple[Weights, float]]:
    """Runs that have a weight, with it, the best run first: a kernel that is short of time drops the last ones."""
    order = sorted(range(len(runs)), key=lambda index: -quality_of(runs[index]))
    return [(runs[index], weights[index]) for index in order if weights[index]]


def weigh_runs(runs: Sequence[Weights]) -> "Ensemble":
    """The weights of several runs."""
    from local.banks import ensemble  # imports torch, which a bundle of one run does not need

    competition = competition_of(runs[0].manifest.competition)
    return ensemble.weigh_runs([run.folder for run in runs], competition.guesses, competition.metric)


def score_ensemble(ensemble: "Ensemble", best: Member) -> dict[str, float] | None:
    """The scores of an ensemble on held-out observations; None if they are not known.

    Args:
        best: its best member, for the settings of the evaluation.
    """
    scores = ensemble.scores(best.recipe.get("monitor") == "macro_f1", int(best.recipe.get("seed", 0)))
    if scores:
        say(f"held-out observations, predicted with the weights that the others choose: {describe(scores)}")
    else:
        say("the score of the ensemble is not known before the leaderboard")
    return scores or None


def check_same_task(runs: Sequence[Weights]) -> None:
    """Check that all runs predict the same classes of the same competition.

    Raises:
        InputError: one does not.
    """
    first = runs[0].manifest
    for run in runs[1:]:
        difference = None
        if run.manifest.class_ids != first.class_ids:
            difference = "other classes"
        elif replace(run.manifest.competition, resolution=first.competition.resolution) != first.competition:
            difference = "another competition"
        if difference:
            raise InputError(f"{run.folder} has {difference} than {runs[0].folder}: train both with the same --data")


def warn_of_few_classes(manifest: Manifest) -> str:
    """A warning if there are fewer classes than a row of the submission has room for; otherwise an empty string."""
    form, classes = competition_of(manifest.competition).form, len(manifest.class_ids)
    guesses = form.guesses
    if classes >= guesses or form.classes or form.is_set:
        return ""
    return (
        f"warning: a row of the submission has room for {guesses} classes, and the run was trained on {classes}: "
        "every row lists all of them"
    )


def quality_of(run: Weights) -> float:
    """How good a run is on held-out observations: the sum of its recalls, or minus the log-loss if that is the metric.

    Runs where nothing was held out come last.
    """
    validation = run.manifest.members[0].validation
    if competition_of(run.manifest.competition).metric == LOG_LOSS:
        return -validation.get(LOG_LOSS, math.inf)
    return sum(validation.get(name, 0.0) for name in RECALLS)


def _copy(run: Weights, folder: Path, number: int, known: dict[str, str]) -> list[Member]:
    """Copy a run's files under names with its number; returns its members with the new names.

    Args:
        known: names of the files that are copied already, by their digests. Runs that did not train their encoder
            share its file.
    """

    def copy(name: str) -> str:
        source, digest = run.file(name), run.manifest.files[name]
        if digest not in known:
            known[digest] = f"{number}-{name}"
            shutil.copyfile(source, folder / known[digest])
        return known[digest]

    return [
        replace(
            member,
            encoders=tuple(replace(encoder, file=copy(encoder.file)) for encoder in member.encoders),
            banks=tuple(map(copy, member.banks)),
            metadata_prior=member.metadata_prior and copy(member.metadata_prior),
            run=run.folder.resolve().name,
        )
        for member in run.manifest.members
    ]

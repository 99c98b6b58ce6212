"""Gather the weights of one or several runs into the folder that becomes a Kaggle dataset."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kernel.competitions import competition_named
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, Manifest, Member, Weights, write_manifest
from kernel.tables import RESOLUTIONS
from local.base.console import say
from local.base.metrics import GUESSES
from local.bundling.wheels import make_wheel, needed_wheels
from local.runs import open_run


def gather_weights(runs: Sequence[Path], folder: Path) -> Path:
    """Copy the files of every run, the wheels that they need, and one manifest over all of them.

    Args:
        runs: run folders; several make an ensemble, weighted by cross-validation.
        folder: an empty folder to fill.

    Returns:
        The manifest's path.

    Raises:
        InputError: a folder is no run, is damaged, or predicts other classes than the first; two runs need different
            versions of a library, or one needs a version that is not installed.
    """
    opened = [open_run(run) for run in runs]
    first = opened[0].manifest
    for weights in opened[1:]:
        different = None
        if weights.manifest.class_ids != first.class_ids:
            different = "other classes"
        elif replace(weights.manifest.competition, resolution=first.competition.resolution) != first.competition:
            different = "another competition"
        if different:
            raise InputError(f"{weights.folder} has {different} than {runs[0]}: train both with the same --data")
    needed_wheels(opened)  # what cannot be bundled is refused before the runs are weighed
    guesses = competition_named(first.competition.name).guesses
    if len(first.class_ids) < guesses:
        say(
            f"a row of the submission has room for {guesses} classes, and {runs[0]} was trained on "
            f"{len(first.class_ids)}: every row lists all of them"
        )
    shares = weigh_runs(runs, guesses)
    # The best alone comes first, since a kernel short of time drops the last.
    order = sorted(range(len(runs)), key=lambda place: -worth_alone(opened[place]))
    opened, shares = ([values[place] for place in order if shares[place]] for values in (opened, shares))
    wheels = needed_wheels(opened)
    if wheels:
        say(f"with wheels of {', '.join(map(' '.join, wheels.items()))}, which Kaggle's image does not have")
    for name, version in wheels.items():
        make_wheel(name, version, folder / "wheels")
    resolution = max((weights.manifest.competition.resolution for weights in opened), key=RESOLUTIONS.index)
    members = [
        replace(member, weight=share * member.weight)
        for place, (weights, share) in enumerate(zip(opened, shares, strict=True), 1)
        for member in _copy(weights, folder, place)
    ]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        competition=replace(first.competition, resolution=resolution),
        class_ids=first.class_ids,
        fallback_classes=first.fallback_classes,
        members=tuple(members),
        files={path.relative_to(folder).as_posix(): sha256(path) for path in files},
    )
    write_manifest(manifest, folder / MANIFEST)
    return folder / MANIFEST


def weigh_runs(runs: Sequence[Path], guesses: int) -> list[float]:
    """The weight of each run in the ensemble; see `local.banks.ensemble.ensemble_weights`."""
    if len(runs) == 1:
        return [1.0]
    from local.banks.ensemble import ensemble_weights  # imports torch, which a bundle of one run does not need

    return ensemble_weights(runs, guesses)


def worth_alone(weights: Weights) -> float:
    """A run's recalls on its validation together; 0 where it has none."""
    validation = weights.manifest.members[0].validation
    return sum(validation.get(f"recall_at_{count}", 0.0) for count in GUESSES)


def _copy(weights: Weights, folder: Path, number: int) -> list[Member]:
    """Copy a run's files under names of their own; its members with the new names."""

    def copy(name: str) -> str:
        shutil.copyfile(weights.file(name), folder / f"{number}-{name}")
        return f"{number}-{name}"

    return [
        replace(
            member,
            encoder=replace(member.encoder, file=copy(member.encoder.file)),
            bank=copy(member.bank),
            metadata_prior=member.metadata_prior and copy(member.metadata_prior),
            run=weights.folder.resolve().name,
        )
        for member in weights.manifest.members
    ]

"""How a run was trained, and how to do it again."""

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernel.inputs import sha256
from kernel.manifest import MANIFEST
from local.base.files import read_json
from local.base.repository import commit, versions
from local.data.observations import encode_labels
from local.report.evidence import Evidence


@dataclass(frozen=True)
class Training:
    """What training left.

    Attributes:
        log: rows of log.csv; a cell is None where an epoch has no value.
        epoch: whose weights are kept; 0 for those before training.
        kept: why these weights are kept; empty without fine-tuning.
        distribution: by what is counted, the number of each class in the reference set, the largest first.
    """

    log: list[dict[str, float | None]]
    epoch: int
    kept: str
    seconds: float
    memory_gb: float
    distribution: dict[str, list[int]]


@dataclass(frozen=True)
class Origin:
    """What reproduces a run and its report; `training` and `report` say what each was made with."""

    commands: list[str]
    recipe: str
    training_versions: dict[str, str]
    report_versions: dict[str, str]
    training_commit: str
    report_commit: str
    digests: dict[str, str]
    data_sha256: str
    is_data_of_training: bool


def read_training(evidence: Evidence) -> Training:
    path, rows = evidence.run / "log.csv", []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
    metrics = read_json(evidence.run / "metrics.json")
    known = evidence.labelled.in_splits(*evidence.recipe.bank.reference.split("+"))
    labels, size = encode_labels(known.class_ids, evidence.classes), len(evidence.classes)
    photos = np.array([len(observation.photos) for observation in known.observations])
    counts = {"photos": photos}
    if evidence.recipe.train.epochs:
        counts["photos in an epoch"] = np.minimum(photos, evidence.recipe.train.photos_per_observation)
    counts["observations"] = np.ones_like(photos)
    return Training(
        log=rows,
        epoch=metrics["chosen_epoch"],
        kept=metrics["kept"],
        seconds=metrics["seconds"],
        memory_gb=metrics["memory_gb"],
        distribution={
            name: np.sort(np.bincount(labels, each, size))[::-1].astype(int).tolist() for name, each in counts.items()
        },
    )


def trace_origin(evidence: Evidence, others: Sequence[Path], focus: Sequence[str]) -> Origin:
    member, data = evidence.manifest.members[0], shlex.quote(str(evidence.labelled.folder))
    run = shlex.quote(str(evidence.run))
    options = f" --against {shlex.join(map(str, others))}" if others else ""
    options += f" --focus {shlex.join(focus)}" if focus else ""
    return Origin(
        commands=[
            f"python local/train.py --recipe {run}/recipe.toml --data {data} --out {run}-again",
            f"python local/evaluate.py {run} --data {data}{options}",
            f"python bundle.py {run} && python local/rehearse.py --data {data}",
        ],
        recipe=(evidence.run / "recipe.toml").read_text(encoding="utf-8"),
        training_versions=dict(member.versions),
        report_versions=versions(),
        training_commit=evidence.manifest.commit,
        report_commit=commit(),
        digests={MANIFEST: sha256(evidence.run / MANIFEST), **evidence.manifest.files},
        data_sha256=evidence.data_sha256,
        is_data_of_training=evidence.data_sha256 == member.data_sha256,
    )

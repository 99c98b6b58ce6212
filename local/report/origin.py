"""How a run was trained, and how to do it again."""

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernel.inputs import sha256
from kernel.manifest import MANIFEST
from local.base.repository import commit, versions
from local.data.competition import labelled, places_of
from local.report.evidence import Evidence


def training(evidence: Evidence) -> dict:
    """The log, what training left in metrics.json, and how observations spread over classes."""
    path = evidence.run / "log.csv"
    rows = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    metrics = json.loads((evidence.run / "metrics.json").read_text(encoding="utf-8"))
    notes = {key: value for key, value in metrics.items() if isinstance(value, (int, float, str))}
    return {"log": rows, "notes": notes, "distribution": distribution(evidence)}


def number(text: str) -> float | None:
    """A cell of log.csv; None for an empty one."""
    return float(text) if text else None


def distribution(evidence: Evidence) -> dict:
    """Photos of each class in the table, and what the run saw of it: each sorted, the largest first.

    An epoch shows at most `photos_per_observation` of each observation; a bank takes each observation once.
    """
    known = labelled(evidence.competition, *evidence.recipe.bank.reference.split("+"))
    places = places_of(known.class_ids, evidence.classes)
    photos = np.array([len(observation.photos) for observation in known.observations])
    seen = np.minimum(photos, evidence.recipe.train.photos_per_observation)
    counts = {"photos": photos, "seen in an epoch": seen, "observations": np.ones_like(photos)}
    if not evidence.recipe.train.epochs:
        del counts["seen in an epoch"]
    return {
        name: sorted(np.bincount(places, each, minlength=len(evidence.classes)).astype(int).tolist(), reverse=True)
        for name, each in counts.items()
    }


def reproduce(evidence: Evidence, others: Sequence[Path], focus: Sequence[str]) -> dict:
    """Recipe, versions, commits, digests, and the commands."""
    member, data = evidence.manifest.members[0], shlex.quote(str(evidence.competition.folder))
    run = shlex.quote(str(evidence.run))
    more = [f"--against {shlex.join(map(str, others))}"] if others else []
    more += [f"--focus {shlex.join(focus)}"] if focus else []
    digest = evidence.competition.digest()
    return {
        "commands": [
            f"python local/train.py --recipe {run}/recipe.toml --data {data} --out {run}-again",
            " ".join([f"python local/evaluate.py {run} --data {data}", *more]),
            f"python bundle.py {run} && python local/rehearse.py --data {data}",
        ],
        "recipe": (evidence.run / "recipe.toml").read_text(encoding="utf-8"),
        "versions": {"training": member.versions, "report": versions()},
        "commit": {"training": evidence.manifest.commit, "report": commit()},
        "digests": {MANIFEST: sha256(evidence.run / MANIFEST), **evidence.manifest.files},
        "data": {"sha256": digest, "is_of_training": digest == member.data_sha256},
    }

"""Find the runs in a folder, and describe them."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Manifest, Member, Weights, read_manifest, read_weights
from local.base.files import write_text
from local.base.run_folder import NOTE_FILE

MAX_LISTED = 8  # runs in a message


class Score(NamedTuple):
    """A score and the bounds of its 95% interval, if they are known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class Found:
    """A run in a folder.

    Attributes:
        changed: when its manifest was written, in seconds since 1970.
        manifest: None if it cannot be read.
        problem: why not.
    """

    folder: Path
    changed: float
    manifest: Manifest | None
    problem: str = ""


def open_run(folder: Path) -> Weights:
    """The weights of a run.

    Raises:
        InputError: there is no run in `folder`; the message lists those beside it.
    """
    if (folder / MANIFEST).is_file():
        return read_weights(folder)
    problem = f"{folder} is not a run: it has no {MANIFEST}" if folder.exists() else f"no such run: {folder}"
    runs = sorted(str(path.parent) for path in folder.parent.glob(f"[!.]*/{MANIFEST}"))
    if not runs:
        raise InputError(f"{problem}; train one with local/train.py")
    more = f" and {len(runs) - MAX_LISTED} more" if len(runs) > MAX_LISTED else ""
    raise InputError(f"{problem}; there are {', '.join(runs[:MAX_LISTED])}{more}")


def find_runs(folder: Path) -> Iterator[Found]:
    """The finished runs of a folder, in any order; also those of other versions, and damaged ones."""
    for path in folder.glob(f"[!.]*/{MANIFEST}"):
        try:
            manifest, problem = read_manifest(path), ""
        except InputError as error:
            manifest, problem = None, str(error)
        yield Found(path.parent, path.stat().st_mtime, manifest, problem)


def scores_of(manifest: Manifest) -> Mapping[str, float]:
    """The scores of a run or a bundle on held-out observations; empty if they are not known.

    The score of an ensemble is its own, never that of one of its runs.
    """
    return (manifest.validation or {}) if len(manifest.members) > 1 else manifest.members[0].validation


def score_in(scores: Mapping[str, float], name: str) -> Score | None:
    """One of the scores of `local.base.metrics.held_out_scores`; None if it is not there."""
    return Score(scores[name], scores.get(f"{name}_low"), scores.get(f"{name}_high")) if name in scores else None


def files_digest(manifest: Manifest, member: Member) -> str:
    """A digest of a member's files, the same in its run and in a bundle, where they have other names."""
    names = [*(encoder.file for encoder in member.encoders), *member.banks]
    names += [member.metadata_prior] if member.metadata_prior else []
    return hashlib.sha256(" ".join(manifest.files.get(name, "") for name in names).encode()).hexdigest()[:16]


def read_note(run: Path) -> str:
    """What the user has noted about a run; an empty string if there is nothing."""
    try:
        return (run / NOTE_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def write_note(run: Path, text: str) -> None:
    """Write a note about a run, which replaces the one before; an empty text removes it."""
    text = text.encode("utf-8", "replace").decode("utf-8").strip()  # an argument may have bytes that are not UTF-8
    if text:
        write_text(f"{text}\n", run / NOTE_FILE)
    else:
        (run / NOTE_FILE).unlink(missing_ok=True)

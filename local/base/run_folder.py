"""Names of files that training leaves in a run's folder, or beside it, for other commands to read."""

import shutil
from pathlib import Path

from kernel.inputs import InputError

VALIDATION_FILE = "validation.safetensors"  # the run's answers to the held-out observations
REFERENCE_FILE = "reference.safetensors"  # the bank's observations: embeddings, labels, photos, and names of classes
NOTE_FILE = "note.txt"  # what the user has noted about the run
CACHE = ".embeddings"  # beside the runs, which share it


def require_answers(run: Path) -> None:
    """Check that a run kept its answers to held-out observations, without reading them.

    Raises:
        InputError: it kept none.
    """
    if not (run / VALIDATION_FILE).is_file():
        raise InputError(
            f"{run} has no {VALIDATION_FILE}: its data left nothing to hold out, or the file was removed; "
            "train the run again, or choose another run"
        )


def keep_note(old: Path, new: Path) -> None:
    """Copy the user's note from a run's folder to the one that will replace it, unless that has its own."""
    if (old / NOTE_FILE).is_file() and not (new / NOTE_FILE).exists():
        shutil.copyfile(old / NOTE_FILE, new / NOTE_FILE)

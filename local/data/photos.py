"""Refuse a competition that lacks many of its photos; name the photos that are left out."""

from collections.abc import Sequence
from pathlib import Path

from kernel.inputs import InputError
from kernel.photos import UNREADABLE_FILE, UNREADABLE_LIMIT, describe_unreadable
from local.base.console import counted, say_once
from local.data.observations import LabelledObservations


def refuse_missing(labelled: LabelledObservations) -> None:
    """Check that all photos but a few are there.

    Raises:
        InputError: of a split, more than UNREADABLE_LIMIT of the photos are missing.
    """
    for split in ("train", "val"):
        photos = labelled.in_splits(split).photos
        missing = [photo for photo in photos if labelled.photo_sizes[photo] is None]
        if len(missing) > UNREADABLE_LIMIT * len(photos):
            raise InputError(
                f"{len(missing)} of {len(photos)} photos of {split} are missing, such as {missing[0]}: check where the "
                "photos are, or download them again"
            )


def check_readable(unreadable: Sequence[tuple[Path, str]], photos: int) -> None:
    """Print which photos could not be read, and why.

    Raises:
        InputError: they are more than UNREADABLE_LIMIT of `photos`.
    """
    if not unreadable:
        return
    found = f"{len(unreadable)} of {counted(photos, 'photo')} could not be read: {describe_unreadable(unreadable)}"
    if len(unreadable) > UNREADABLE_LIMIT * photos:
        raise InputError(f"{found}; download them again, or check what they are")
    say_once(f"{found}; left out, and listed in {UNREADABLE_FILE}")

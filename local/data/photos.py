"""Refuse a competition of which many photos are missing or damaged; name those that are left out."""

from collections.abc import Sequence
from pathlib import Path

from kernel.inputs import InputError
from kernel.photos import UNREADABLE_FILE, UNREADABLE_LIMIT, name_unreadable
from local.base.console import counted, say_once
from local.data.competition import Competition


def refuse_missing(competition: Competition) -> None:
    """What is learnt from is there, but for a few photos.

    Raises:
        InputError: of a split, more than UNREADABLE_LIMIT of the photos are missing.
    """
    for split, photos in competition.photos.groupby("split")["photo"]:
        missing = [path for path in photos if not path.is_file()]
        if len(missing) > UNREADABLE_LIMIT * len(photos):
            raise InputError(
                f"{len(missing)} of {len(photos)} photos of {split} are missing, such as {missing[0]}: look where the "
                "photos lie, or download them again"
            )


def check_readable(unreadable: Sequence[tuple[Path, str]], photos: int) -> None:
    """Name the photos that could not be read, with their causes.

    Raises:
        InputError: they are more than UNREADABLE_LIMIT of all.
    """
    if not unreadable:
        return
    found = f"{len(unreadable)} of {counted(photos, 'photo')} could not be read: {name_unreadable(unreadable)}"
    if len(unreadable) > UNREADABLE_LIMIT * photos:
        raise InputError(f"{found}; download them again, or look at what they are")
    say_once(f"{found}; left out, and listed in {UNREADABLE_FILE}")

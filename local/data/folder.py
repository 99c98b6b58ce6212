"""Recognise a competition's folder. Reads only its sample submission, and tables in which columns must be found."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from kernel import competitions
from kernel.competitions.competition import CompetitionFolder
from kernel.competitions.table import TABLE
from kernel.inputs import InputError, find_folders
from kernel.observations import read_rows, recognise
from kernel.tables import compose, iterate_table, visible
from local.base.console import say_once
from local.data.table_search import find_tables

# Of a table competition, the kernel finds only its sample submission.
COMPETITIONS = tuple(
    replace(one, find_settings=find_tables) if one is TABLE else one for one in competitions.COMPETITIONS
)


def find_competition(folder: Path) -> CompetitionFolder:
    """Recognise a competition's folder, as downloaded.

    Raises:
        InputError: the folder does not exist, or is not that of a supported competition, or its tables are not such as
            can be trained on, or its sample submission cannot be read or is of other test photos.
    """
    if not folder.is_dir():
        problem = "is a file: unpack it, and" if folder.exists() else "does not exist:"
        raise InputError(f"{folder} {problem} give the competition's folder as downloaded")
    found = recognise(folder, COMPETITIONS)
    if found:
        if found.competition.problem:
            raise InputError(found.competition.problem)
        _check_sample(found)
        for note in found.competition.notes:
            say_once(note)
        return found
    meant = next((other for other in _nearby(folder) if _looks_meant(other)), None)
    if meant:
        raise InputError(f"no supported competition found in {folder}: did you mean {meant}?")
    looked_for = ", ".join(f"{one.arrangement or one.table} ({one.name})" for one in COMPETITIONS)
    raise InputError(
        f"no supported competition found in {folder}: looked for {looked_for}; give the folder as downloaded"
    )


def _check_sample(found: CompetitionFolder) -> None:
    """Check that the sample submission can be read, and, where no table lists the test photos, that it has their ids.

    A kernel does neither: it must end with a submission, and the scored rerun may have another test set. If only some
    of the ids have no photo, a line is printed.

    Raises:
        InputError: it is not CSV text, or has none of the ids of the test photos. Without photos, ids are not checked.
    """
    samples = visible(found.path.glob(found.competition.sample))
    for path in samples:
        for _ in iterate_table(path, ()):
            pass
    if found.competition.has_table or not samples:
        return
    ids = {compose(row.observation) for row in read_rows(found, Counter())}
    named = found.competition.sample_ids(found.path)
    lost = [name for name in named if compose(name) not in ids] if ids else []
    if not lost:
        return
    problem = (
        f"{samples[0]}: {len(lost)} of {len(named)} ids have no photo in {found.table}, such as "
        f"{', '.join(map(repr, lost[:3]))}: download the test photos again, or correct the ids"
    )
    if len(lost) == len(named):
        raise InputError(problem)
    say_once(problem)


def _nearby(folder: Path) -> Iterable[Path]:
    """The folders above and below one."""
    yield from folder.resolve().parents[:4]
    yield from find_folders(folder, lambda below: below != folder and _looks_meant(below), depth=2)


def _looks_meant(folder: Path) -> bool:
    """Whether a folder is a competition's; folders of photos without a table or a train folder may be anything."""
    found = recognise(folder, COMPETITIONS)
    return found is not None and (found.competition.has_table or found.split_folder("train").is_dir())

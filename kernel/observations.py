"""Find the competition among what is mounted, and read its test set: the observations to predict, and their photos."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernel.competitions import COMPETITIONS
from kernel.competitions.competition import Competition, CompetitionFolder, PhotoRow
from kernel.inputs import InputError, find_folders
from kernel.tables import RESOLUTIONS, describe_left_out, escape_undecodable, respell


@dataclass(frozen=True)
class Observation:
    """One or more photos of one specimen: the unit that is predicted.

    Attributes:
        metadata: text of the competition's metadata columns, without blanks.
    """

    id: str
    photos: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TestTable:
    """The test set: the observations to predict, in the order of the submission.

    Attributes:
        folder: of the competition.
        left_out: number of rows and files that do not belong to it, by what they are.
    """

    folder: Path
    competition: Competition
    observations: list[Observation]
    left_out: Counter = field(default_factory=Counter)


def group_photos(rows: Iterable[tuple[str, Path | None, Mapping[str, str | None]]]) -> list[Observation]:
    """Observations in order of first appearance, each with its photos in order and without repeats.

    Args:
        rows: for each photo the id of its observation, its path or None, and its metadata, of which an observation
            gets the first value in each column that is not blank.
    """
    photos: dict[str, dict[Path, None]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for observation, photo, cells in rows:
        own = photos.setdefault(observation, {})
        if photo is not None:
            own[photo] = None
        known = metadata.setdefault(observation, {})
        for column, text in cells.items():
            if text and column not in known and text.strip():
                known[column] = text
    return [Observation(observation, tuple(paths), metadata[observation]) for observation, paths in photos.items()]


def recognise(folder: Path, among: Sequence[Competition] = COMPETITIONS) -> CompetitionFolder | None:
    """Recognise a folder as one of some competitions; None if it is another's or none.

    Of all competitions that recognise it, those of the lowest `generality` count: with files of its own before any
    tables, and these before photos alone. Of several, one without a problem is preferred, then one whose test photos
    are there.

    Args:
        among: if one of them has settings, these are used for its name.
    """
    by_name = {competition.name: competition for competition in among}
    found: list[CompetitionFolder] = []
    lowest = math.inf
    for own in sorted(COMPETITIONS, key=lambda one: one.generality):
        if own.generality > lowest:
            break  # to find the columns of a large table would take seconds
        if one := by_name.get(own.name, own).recognise(folder):
            found.append(one)
            lowest = min(lowest, one.competition.generality)
    candidates = [one for one in found if one.competition.generality == lowest and one.competition.name in by_name]
    return max(
        candidates, key=lambda one: (not one.competition.problem, one.split_folder("test").is_dir()), default=None
    )


def read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    """The photos of a competition's test set, in its order, with ids as the sample submission spells them.

    Args:
        left_out: counts the rows and files that do not belong to it.

    Raises:
        InputError: the table cannot be read.
    """
    rows = found.competition.read_rows(found, left_out)
    rows = [
        row if row.observation.isascii() else replace(row, observation=escape_undecodable(row.observation))
        for row in rows
    ]
    if not found.competition.has_table:
        return rows  # their ids are names of files
    spelt = respell(dict.fromkeys(row.observation for row in rows), found.competition.sample_ids(found.path))
    return [replace(row, observation=spelt[row.observation]) for row in rows]


def read_test(found: CompetitionFolder, resolution: str = RESOLUTIONS[0]) -> TestTable:
    """The test set of a competition's folder.

    Args:
        resolution: of the photos, where the competition ships several.

    Raises:
        InputError: the table cannot be read, or there is no observation.
    """
    left_out: Counter = Counter()
    rows = read_rows(found, left_out)
    if not rows:
        what = "test observation" if found.competition.has_table else "test photo"
        lack = f"has no {what}{describe_left_out(left_out)}" if found.table.exists() else "does not exist"
        raise InputError(f"{found.table} {lack}: put the test set there as downloaded")
    folder, columns = found.photo_folder("test", resolution), found.competition.metadata
    observations = group_photos(
        (
            row.observation,
            folder / row.photo if row.photo else None,
            {column: row.cells.get(column) for column in columns},
        )
        for row in rows
    )
    return TestTable(found.path, found.competition, observations, left_out)


def find_test_table(
    root: Path,
    name: str | None = None,
    resolution: str = RESOLUTIONS[0],
    settings: Any = None,
) -> TestTable:
    """The test set of the competition mounted under `root`.

    Args:
        name: of the competition that the weights were trained on; None accepts any.
        resolution: of the photos that they were trained on.
        settings: of the competition, as it or the manifest has them; None where there are none.

    Raises:
        InputError: the competition is not under `root`, or has no test observation.
    """

    accepted = [own.with_settings(settings) for own in COMPETITIONS if name in (None, own.name)]

    def has_test(folder: Path) -> bool:
        found = recognise(folder, accepted) or recognise(folder)
        return found is not None and found.table.exists()  # folders with nothing but photos may be any other dataset

    others = []
    for folder in find_folders(root, has_test):
        found = recognise(folder, accepted)
        if found:
            return read_test(found, resolution)
        others.append(f"{folder} ({recognise(folder).competition.name})")
    looked_for = " or ".join(competition.table or competition.arrangement for competition in accepted)
    if others:
        raise InputError(
            f"the weights are for the competition {name} with {looked_for}, but {', '.join(others)} is attached: "
            "attach the competition that the run was trained on"
        )
    raise InputError(f"no competition under {root}: looked for {looked_for}; attach the competition to the kernel")

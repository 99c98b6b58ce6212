"""Write the submission, and check it as the grader would.

First the fallback is written, before anything heavy is imported, so that a valid file is on disk whatever fails later.
At the end the predictions replace it.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from kernel.inputs import InputError
from kernel.observations import TestTable


def fallback_guesses(table: TestTable, fallback_classes: Sequence[str] = ()) -> list[str]:
    """What to predict for an observation of which no photo can be read.

    Args:
        fallback_classes: the commonest classes of training; without them, the first row of the sample submission
            counts.

    Raises:
        InputError: there is neither.
    """
    if fallback_classes:
        return list(fallback_classes[: table.competition.guesses])
    sample = table.competition.read_sample(table.folder)
    if sample:
        return sample[0][1]
    raise InputError(f"{table.folder} has no sample submission and no weights are attached: attach the weights")


def write_submission(
    path: Path, table: TestTable, guesses: Sequence[Sequence[str]], class_ids: Sequence[str] = ()
) -> None:
    """Write a submission in one step: a reader finds the old file or the new one, never a part.

    Args:
        guesses: class ids of each observation, best first.
        class_ids: of all classes; if given, the new file is checked before it replaces the old one.

    Raises:
        InputError: the new file does not pass; the old one stays.
    """
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.competition.header)
        for observation, row in zip(table.observations, guesses, strict=True):
            writer.writerow((observation.id, table.competition.format_answer(row)))
        file.flush()
        os.fsync(file.fileno())
    if class_ids:
        check_submission(partial, table, class_ids)
    os.replace(partial, path)


def check_submission(path: Path, table: TestTable, class_ids: Sequence[str]) -> None:
    """Check that a submission has the right header, the observations in order, and distinct known class ids.

    Raises:
        InputError: the grader would refuse the file, or score it wrongly.
    """
    competition = table.competition
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if not rows or any(len(row) != 2 for row in rows):
        raise InputError(f"{path} is not a CSV of two columns")
    if tuple(rows[0]) != competition.header:
        raise InputError(f"{path} has the header {rows[0]}: expected {list(competition.header)}")
    ids = [row[0] for row in rows[1:]]
    if ids != [observation.id for observation in table.observations]:
        raise InputError(f"{path} has {len(ids)} rows that are not the {len(table.observations)} observations in order")
    known, guesses = set(class_ids), min(competition.guesses, len(class_ids))
    for observation, cell in rows[1:]:
        answer = competition.read_answer(cell)
        is_distinct = len(answer) == len(set(answer)) == guesses and known.issuperset(answer)
        if not is_distinct or competition.format_answer(answer) != cell:
            raise InputError(f"{path}, observation {observation}: {cell!r} is not {guesses} distinct class ids")

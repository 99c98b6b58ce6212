"""Write the submission and check it as the grader would.

Called twice: before any heavy import with the fallback, so that whatever fails later finds a valid file on disk, and
at the end with the predictions.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from kernel.inputs import InputError
from kernel.observations import TestTable, read_table, visible


def fallback_guesses(table: TestTable, fallback_classes: Sequence[str] = ()) -> list[str]:
    """What to predict where no photo can be read.

    Args:
        fallback_classes: the commonest classes of training; without them it is the sample submission's first row.

    Raises:
        InputError: neither is there.
    """
    if fallback_classes:
        return list(fallback_classes[: table.layout.guesses])
    for sample in visible(table.folder.glob(table.layout.sample)):
        rows = read_table(sample, table.layout.header, filled=table.layout.header)
        if rows:
            answer = rows[0][table.layout.header[1]]
            return answer.split() if table.layout.guesses > 1 else [answer]  # a folder's name may have spaces
    raise InputError(f"{table.folder} has no sample submission and no weights are attached: attach the weights")


def write_submission(
    path: Path, table: TestTable, guesses: Sequence[Sequence[str]], class_ids: Sequence[str] = ()
) -> None:
    """Write a submission in one step: a reader finds the old file or the new one, never a part.

    Args:
        guesses: class ids, best first, for each observation of the table, in its order.
        class_ids: where given, the new file is checked by them before it takes the place of the old one.

    Raises:
        InputError: the new file does not pass; the old one stays.
    """
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.layout.header)
        for observation, row in zip(table.observations, guesses, strict=True):
            writer.writerow((observation.id, " ".join(row)))
        file.flush()
        os.fsync(file.fileno())
    if class_ids:
        check_submission(partial, table, class_ids)
    os.replace(partial, path)


def check_submission(path: Path, table: TestTable, class_ids: Sequence[str]) -> None:
    """Check a written submission against the test table: header, ids, order, count, and distinct known class ids.

    Raises:
        InputError: the grader would refuse the file, or score it wrongly.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if not rows or any(len(row) != 2 for row in rows):
        raise InputError(f"{path} is no CSV of two columns")
    if tuple(rows[0]) != table.layout.header:
        raise InputError(f"{path} has the header {rows[0]}, the grader wants {list(table.layout.header)}")
    ids = [row[0] for row in rows[1:]]
    if ids != [observation.id for observation in table.observations]:
        raise InputError(f"{path} has {len(ids)} rows that are not the {len(table.observations)} observations in order")
    known, guesses = set(class_ids), min(table.layout.guesses, len(class_ids))
    for observation, predictions in rows[1:]:
        row = predictions.split(" ") if table.layout.guesses > 1 else [predictions]  # a folder's name may have spaces
        if len(row) != guesses or len(set(row)) != guesses or not known.issuperset(row):
            raise InputError(f"{path}, observation {observation}: {predictions!r} is not {guesses} distinct class ids")

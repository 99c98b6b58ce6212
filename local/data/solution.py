"""Read the true classes of a test set."""

import csv
from collections.abc import Iterable
from pathlib import Path

from kernel.competitions import COMPETITIONS
from kernel.inputs import InputError
from kernel.tables import clean_id


def read_solution(solution: Path, observations: Iterable[str] = (), classes: Iterable[str] = ()) -> dict[str, str]:
    """The class id of each observation.

    Args:
        solution: a CSV with observation and class id in its first two columns, or a test table with labels.
        observations, classes: the ids as the submission writes them; other ids are normalised by `clean_id`.

    Raises:
        InputError: there is no such file, or it is not such a CSV.
    """
    known = [set(observations), set(classes)]
    try:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        labels = [columns for one in COMPETITIONS if (columns := one.solution_columns) and set(columns) <= set(header)]
        columns = [header.index(name) for name in labels[0]] if labels else [0, 1]
        pairs = [[row[column] for column in columns] for row in rows if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error, IndexError) as error:
        raise InputError(f"no solution in {solution} ({error}): give a CSV of observation and class id") from error
    return dict(
        [text if text in ids else clean_id(text) for text, ids in zip(pair, known, strict=True)] for pair in pairs
    )

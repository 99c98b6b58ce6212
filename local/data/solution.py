"""Read the true classes of a test set."""

import csv
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from kernel.competitions import COMPETITIONS
from kernel.inputs import InputError
from kernel.tables import clean_id, compose


def read_solution(solution: Path, observations: Iterable[str] = (), classes: Iterable[str] = ()) -> dict[str, str]:
    """The class id of each observation.

    Args:
        solution: a CSV with columns of observations and their class ids, or a test table with labels. Of more than two
            columns, or in another order, those count that have most of the ids.
        observations, classes: the ids as the submission writes them; other ids are normalised by `clean_id`.

    Raises:
        InputError: there is no such file, or it is not such a CSV.
    """
    known = [{compose(text): text for text in ids} for ids in (observations, classes)]
    try:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        rows = [row for row in rows if any(cell.strip() for cell in row)]
        labels = [columns for one in COMPETITIONS if (columns := one.solution_columns) and set(columns) <= set(header)]
        columns = [header.index(name) for name in labels[0]] if labels else _find_columns(len(header), rows, known)
        pairs = [[row[column] for column in columns] for row in rows]
    except (OSError, ValueError, csv.Error, IndexError) as error:
        raise InputError(f"no solution in {solution} ({error}): give a CSV of observation and class id") from error
    return dict(
        [ids.get(compose(text), clean_id(text)) for text, ids in zip(pair, known, strict=True)] for pair in pairs
    )


def _find_columns(width: int, rows: Sequence[Sequence[str]], known: Sequence[Collection[str]]) -> list[int]:
    """The indices of the columns with most of the known observations and classes; of equals the first."""
    columns: list[int] = []
    for ids in known:
        left = [column for column in range(width) if column not in columns]
        cells = {column: [compose(row[column]) for row in rows] for column in left}
        hits = {column: sum(cell in ids or clean_id(cell) in ids for cell in own) for column, own in cells.items()}
        columns.append(max(left, key=hits.__getitem__))
    return columns

"""Read the true classes of a test set."""

import csv
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from kernel.competitions import COMPETITIONS
from kernel.competitions.competition import AnswerForm
from kernel.inputs import InputError
from kernel.tables import clean_id, compose, delimiter_of


def read_solution(
    solution: Path, observations: Iterable[str] = (), classes: Iterable[str] = (), form: AnswerForm | None = None
) -> dict[str, str]:
    """The class id of each observation.

    Args:
        solution: a CSV with columns of observations and their class ids, or a test table with labels. Of more than two
            columns, or in another order, those count that have most of the ids.
        observations, classes: the ids as the submission writes them; other ids are normalised by `clean_id`.
        form: of a submission. If its answers are sets, an observation has all classes of its cell, or of its cells,
            separated by spaces.

    Raises:
        InputError: there is no such file, or it is not such a CSV.
    """
    known = [{compose(text): text for text in ids} for ids in (observations, classes)]
    split = (lambda cell: list(form.read([cell]))) if form and form.is_set else lambda cell: [cell]
    try:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, delimiter=delimiter_of(file))
        rows = [row for row in rows if any(cell.strip() for cell in row)]
        labels = [columns for one in COMPETITIONS if (columns := one.solution_columns) and set(columns) <= set(header)]
        found = [header.index(name) for name in labels[0]] if labels else []
        columns = found or _find_columns(len(header), rows, known, split)
        pairs = [(row[columns[0]], class_id) for row in rows for class_id in split(row[columns[1]])]
    except (OSError, ValueError, csv.Error, IndexError) as error:
        raise InputError(f"no solution in {solution} ({error}): give a CSV of observation and class id") from error
    pairs = [[ids.get(compose(text), clean_id(text)) for text, ids in zip(pair, known, strict=True)] for pair in pairs]
    if not (form and form.is_set):
        return dict(pairs)
    sets: dict[str, dict[str, None]] = {}
    for name, class_id in pairs:
        sets.setdefault(name, {})[class_id] = None
    return {name: " ".join(own) for name, own in sets.items()}


def _find_columns(
    width: int, rows: Sequence[Sequence[str]], known: Sequence[Collection[str]], split: Callable[[str], Iterable[str]]
) -> list[int]:
    """The indices of the columns with most of the known observations and classes; of equals the first.

    Args:
        split: gives the classes in a cell.
    """
    columns: list[int] = []
    for ids, parts in zip(known, (lambda cell: [cell], split), strict=True):
        left = [column for column in range(width) if column not in columns]
        cells = {column: [compose(part) for row in rows for part in parts(row[column])] for column in left}
        hits = {column: sum(cell in ids or clean_id(cell) in ids for cell in own) for column, own in cells.items()}
        columns.append(max(left, key=hits.__getitem__))
    return columns

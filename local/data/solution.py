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
        InputError: there is no such file, or it is not such a CSV; one of the `observations` has a blank class, or two
            classes where an answer is one.
    """
    known = [{compose(text): text for text in ids} for ids in (observations, classes)]
    split = (lambda cell: list(form.read([cell]))) if form and form.is_set else lambda cell: [cell]
    try:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [*csv.reader(file, delimiter=delimiter_of(file))] or [[]]
        if len(header) < 2:
            raise ValueError("its header has 1 column" if header else "it is empty")
        rows = [row for row in rows if any(cell.strip() for cell in row)]
        labels = [columns for one in COMPETITIONS if (columns := one.solution_columns) and set(columns) <= set(header)]
        found = [header.index(name) for name in labels[0]] if labels else []
        columns = found or _find_columns(len(header), rows, known, split)
        pairs = [(row[columns[0]], class_id) for row in rows for class_id in split(row[columns[1]])]
    except (OSError, ValueError, csv.Error, IndexError) as error:
        raise InputError(f"no solution in {solution} ({error}): give a CSV of observation and class id") from error
    pairs = [[ids.get(compose(text), clean_id(text)) for text, ids in zip(pair, known, strict=True)] for pair in pairs]
    if not (form and form.is_set):
        _refuse_unclear(solution, pairs, {*known[0].values()})
        return dict(pairs)
    sets: dict[str, dict[str, None]] = {}
    for name, class_id in pairs:
        sets.setdefault(name, {})[class_id] = None
    return {name: " ".join(own) for name, own in sets.items()}


def _refuse_unclear(solution: Path, pairs: Iterable[Sequence[str]], observations: Collection[str]) -> None:
    """Raise an InputError if an observation has a blank class, or two classes; equal rows are accepted.

    Other rows are not checked: without the observations' ids, the columns are only a guess.
    """
    truth: dict[str, str] = {}
    for name, class_id in pairs:
        if name in observations and not class_id:
            raise InputError(f"{solution} has no class for observation {name!r}: fill it in")
        first = truth.setdefault(name, class_id)
        if name in observations and first != class_id:
            raise InputError(
                f"{solution} has two classes for observation {name!r}, {first!r} and {class_id!r}: keep the right row"
            )


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

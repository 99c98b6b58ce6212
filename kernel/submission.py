"""Write the submission, and check it as the grader would.

First the fallback is written, before anything heavy is imported, so that a valid file is on disk whatever fails later.
At the end the predictions replace it.
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import Manifest
from kernel.observations import TestTable


def fallback_answer(table: TestTable, manifest: Manifest | None = None) -> dict[str, float]:
    """What to predict for an observation of which no photo can be read: the commonest classes, or all frequencies.

    Of a set of classes, the commonest alone.

    Args:
        manifest: of the weights; without them, the first row of the sample submission counts.

    Raises:
        InputError: there is neither.
    """
    form = table.competition.form
    if manifest is None:
        sample = table.competition.read_sample(table.folder)
        if sample:
            return sample[0][1]
        raise InputError(f"{table.folder} has no sample submission and no weights are attached: attach the weights")
    if not form.classes:
        classes = manifest.fallback_classes[: 1 if form.is_set else form.guesses]
        return dict.fromkeys(classes, 1 / len(classes))
    counts = manifest.class_counts or (1,) * len(manifest.class_ids)
    frequencies = {name: count / sum(counts) for name, count in zip(manifest.class_ids, counts, strict=True)}
    return dict(sorted(frequencies.items(), key=lambda item: -item[1]))


def write_submission(
    path: Path, table: TestTable, answers: Iterable[Mapping[str, float]], class_ids: Sequence[str] = ()
) -> None:
    """Write a submission in one step: a reader finds the old file or the new one, never a part.

    Args:
        answers: of each observation, its class ids with their probabilities, best first; see `AnswerForm`.
        class_ids: of all classes; if given, the new file is checked before it replaces the old one.

    Raises:
        InputError: the new file does not pass; the old one stays.
    """
    form, partial = table.competition.form, path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(form.header)
        for observation, answer in zip(table.observations, answers, strict=True):
            writer.writerow((observation.id, *form.write(answer)))
        file.flush()
        os.fsync(file.fileno())
    if class_ids:
        check_submission(partial, table, class_ids)
    os.replace(partial, path)


def check_submission(path: Path, table: TestTable, class_ids: Sequence[str]) -> None:
    """Check that a submission has the right header, the observations in order, and an answer for each of them.

    An answer is distinct known class ids, or probabilities that sum to 1.

    Raises:
        InputError: the grader would refuse the file, or score it wrongly.
    """
    form, ids, defect, known = table.competition.form, [], "", dict.fromkeys(class_ids)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if len(header) != len(form.header):
                raise InputError(f"{path} is not a CSV of {len(form.header)} columns")
            if tuple(header) != form.header:
                raise InputError(f"{path} has the header {header}: expected {list(form.header)}")
            for row in rows:
                if len(row) != len(header):
                    raise InputError(f"{path} is not a CSV of {len(header)} columns")
                ids.append(row[0])
                if not defect and (found := form.find_defect(row[1:], known)):
                    defect = f"{path}, observation {row[0]}: {found}"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if ids != [observation.id for observation in table.observations]:
        raise InputError(f"{path} has {len(ids)} rows that are not the {len(table.observations)} observations in order")
    if defect:
        raise InputError(defect)

"""List the runs of a folder and the submissions made of them: recipes, local scores, leaderboard scores, notes.

python local/runs.py                             lists runs/, newest first
python local/runs.py FOLDER --sort R@5 --csv table.csv
python local/runs.py runs/best --note "seed 2, to see the spread"

Every held-out observation is predicted with settings that the others chose. R@1, R@5, R@10 and macro-F1 are weighted as
for the choice of a bank, with 95% intervals; the column `unweighted` has the same four without weights. metrics.json
also has those of the settings that all of them chose. A recipe is described as the nearest one of local/recipes and
what is other than there.

Interrupted runs and those that Kaggle trains are listed too. A submission of one run is in the row of that run, as long
as the run is the one that was submitted; that of an ensemble has a row of its own, with the ensemble's own score.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from safetensors import SafetensorError, safe_open

from kernel.inputs import InputError, escape_control, shorten
from kernel.manifest import MANIFEST
from local.base.console import aligned, command_parser, counted, run, say
from local.base.files import refuse_unwritable_file, write_table
from local.base.runs import Found, Score, files_digest, find_runs, open_run, read_note, score_in, scores_of, write_note
from local.publishing.ledger import LEDGER, Submission, read_ledger
from local.recipes.recipe import describe_settings
from local.remote.order import FOLDER, read_state
from local.training.checks import CHECKPOINTS, named, partial_of

SCORES = {
    **{"recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "macro_f1": "macro-F1"},
    "log_loss": "log-loss",
}
# By their names in a CSV; a score has two more columns there, for its interval.
COLUMNS = {
    **{name: name for name in ("run", "state", "trained")},
    **SCORES,
    **{f"unweighted_{name}": f"unweighted {label}" for name, label in SCORES.items()},
    **{name: name for name in ("public", "private", "submitted", "recipe", "encoder", "reference", "data", "note")},
}
NEWEST_FIRST = ("trained", "submitted")  # times; other text is sorted from a to z, and scores from the best
TIME = "%Y-%m-%d %H:%M:%S"
WIDTH = 60  # of a long cell on the console

Row = dict[str, str | float | Score | None]  # by the keys of COLUMNS; None or absent where it is not known


def list_rows(folder: Path) -> list[Row]:
    """A row for each run of a folder, and for each submission that is not of one run that is there, newest first.

    Raises:
        InputError: there is neither a run nor a submission.
    """
    found, own, others = list(find_runs(folder)), {}, []
    for row in read_submissions(folder / LEDGER.name):
        matches = [one.folder for one in found if is_of(row, one)]
        if matches:  # a copy under another name has the same files
            own[min(matches, key=lambda path: path.name != row.runs)] = row
        else:
            others.append(row)
    rows = [describe_run(one) | (describe_scores(own[one.folder]) if one.folder in own else {}) for one in found]
    names = {one.folder.name for one in found}
    rows += [describe_unfinished(path) for path in folder.glob(".*.partial") if name_of(path) not in names]
    rows += [row for row in describe_remote(folder / FOLDER) if row["run"] not in {known["run"] for known in rows}]
    rows += [describe_submission(row) for row in others]
    if not rows:
        raise InputError(f"{folder} holds no run: train one with local/train.py, or give another folder")
    return sort_rows(rows, "trained")


def read_submissions(ledger: Path) -> list[Submission]:
    """The submissions; prints a line if there is a file that is no ledger, which costs no run its row."""
    try:
        return read_ledger(ledger)
    except InputError as error:
        say(f"warning: {error}")
        return []


def is_of(row: Submission, found: Found) -> bool:
    """Whether a submission is of this run alone, and not of an earlier one of the same name."""
    if row.is_ensemble or not found.manifest:
        return False
    if row.submitted_runs:
        return row.submitted_runs[0].files == files_digest(found.manifest, found.manifest.members[0])
    return row.runs == found.folder.name and sent_at(row) > found.changed


def sent_at(row: Submission) -> float:
    """When a submission was made, in seconds since 1970; 0 if the ledger does not say."""
    try:
        return datetime.strptime(row.when, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


def describe_run(found: Found) -> Row:
    """The row of a finished run. Without held-out data it has no scores."""
    row: Row = {"run": found.folder.name, "trained": at(found.changed), "note": read_note(found.folder)}
    if found.manifest is None:
        say(f"warning: {found.problem}")
        return {**row, "state": "cannot be read"}
    member, scores = found.manifest.members[0], scores_of(found.manifest)
    state = "done, then interrupted" if partial_of(found.folder).is_dir() else "done"
    return {
        **row,
        "state": state,
        **{name: score_in(scores, name) for kind in ("", "unweighted_") for name in (kind + each for each in SCORES)},
        "recipe": describe_settings(member.given.recipe or member.recipe),
        "encoder": describe_encoder(member.recipe),
        "reference": str(member.recipe.get("reference", "")),
        "data": f"{found.manifest.competition.name} {member.data_sha256[:6]}",
    }


def describe_encoder(recipe: dict) -> str:
    """The encoders of a recipe by the last parts of their names."""
    names = recipe.get("encoder", "")
    return " + ".join(Path(str(name)).name for name in ([names] if isinstance(names, str) else names))


def describe_unfinished(partial: Path) -> Row:
    """The row of a run that was interrupted, or is still being trained."""
    paths = [*(partial / CHECKPOINTS).glob("[0-9]*.safetensors")]
    row: Row = {"run": name_of(partial), "state": "interrupted or in training", "note": read_note(partial)}
    row["trained"] = at(max(path.stat().st_mtime for path in (partial, *paths)))
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError), safe_open(max(paths), "numpy") as file:
        notes = json.loads(file.metadata()["notes"])
        row |= {"encoder": describe_encoder(notes["settings"])}
        row |= {"state": f"interrupted or in training, {counted(int(notes['trained']), 'epoch')} done"}
    return row


def name_of(partial: Path) -> str:
    """The name of the run that a hidden folder is to become."""
    return partial.name.removeprefix(".").removesuffix(".partial")


def describe_remote(folder: Path) -> Iterator[Row]:
    """The rows of runs that are being trained on Kaggle, or were and have not been brought back."""
    for path in sorted(folder.glob("*")):
        session = read_state(path).session
        if session:
            state = f"on Kaggle: {session.kernel} version {session.version}"
            yield {"run": path.name, "state": state, "trained": at(path.stat().st_mtime)}


def describe_submission(row: Submission) -> Row:
    """The row of a submission of an ensemble, or of a run that is not there any more."""
    local = {row.metric: row.weighted_score, f"unweighted_{row.metric}": row.unweighted_score}
    return {
        "run": row.runs,
        "state": "ensemble" if row.is_ensemble else "submitted, then removed or trained again",
        "trained": at(sent_at(row)) if sent_at(row) else "",
        **{name: score for name, score in local.items() if name in COLUMNS},
        **describe_scores(row),
    }


def describe_scores(row: Submission) -> Row:
    """The leaderboard's scores of a submission."""
    public, private = (text or None for text in (row.public, row.private))
    return {"public": public or row.status, "private": private, "submitted": f"{row.when} v{row.version}"}


def at(seconds: float) -> str:
    """A time for the table."""
    return datetime.fromtimestamp(seconds).strftime(TIME)


def sort_rows(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows by a column, as it is called in the table or in a CSV; those without a value last.

    Raises:
        InputError: there is no such column.
    """
    names = {text.casefold(): name for name, label in COLUMNS.items() for text in (name, label)}
    name = names.get(column.casefold())
    if name is None:
        raise InputError(f"--sort {column}: no such column; there are {', '.join(COLUMNS.values())}")
    known = [row for row in rows if row.get(name)]
    if name.removeprefix("unweighted_") in SCORES or name in ("public", "private"):
        known.sort(key=lambda row: badness(row, name))
    else:
        known.sort(key=lambda row: str(row[name]), reverse=name in NEWEST_FIRST)
    return known + [row for row in rows if not row.get(name)]


def badness(row: Row, name: str) -> float:
    """What the rows of a column of scores are sorted by, the best first; texts come last.

    A leaderboard shows the log-loss where the run has one. Of that, less is better.
    """
    score = number(row[name])
    is_loss = name.endswith("log_loss") or (name in ("public", "private") and row.get("log_loss"))
    return math.inf if score is None else score if is_loss else -score


def number(value: object) -> float | None:
    """A cell as a number, if it is one."""
    try:
        return value.value if isinstance(value, Score) else float(value)
    except (TypeError, ValueError):
        return None


def format_rows(rows: Sequence[Row]) -> list[str]:
    """The table's lines, without columns that are empty everywhere."""
    table = []
    for row in rows:
        cells = {label: shorten(escape_control(row.get(name) or ""), WIDTH) for name, label in COLUMNS.items()}
        plain = [row.get(f"unweighted_{name}") for name in SCORES]
        text = " / ".join("-" if score is None else f"{score.value:.3f}" for score in plain).rstrip("/- ")
        for label in SCORES.values():
            del cells[f"unweighted {label}"]
        before = list(cells)[: list(cells).index("public")]
        table.append({**{key: cells[key] for key in before}, "unweighted": text, **cells})
    filled = [key for key in table[0] if key == "run" or any(row[key] for row in table)]
    return aligned([{key: row[key] or "-" for key in filled} for row in table])


def export_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows for a CSV: texts in full, and the bounds of each interval in columns of their own."""
    table = []
    for row in rows:
        cells: dict[str, object] = {}
        for name in COLUMNS:
            value = row.get(name)
            cells[name] = value.value if isinstance(value, Score) else value
            if name.removeprefix("unweighted_") in SCORES:
                cells[f"{name}_low"], cells[f"{name}_high"] = value[1:] if isinstance(value, Score) else (None, None)
        table.append(cells)
    return table


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=LEDGER.parent, metavar="FOLDER|RUN", help="default: %(default)s"
    )
    parser.add_argument("--note", metavar="TEXT", help='note something about RUN; "" removes the note')
    parser.add_argument("--sort", default="trained", metavar="COLUMN", help="such as R@5, public or run")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file, with all digits")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.note is not None:
        out = named(options.folder)
        unfinished = not out.exists() and partial_of(out).is_dir()
        write_note(partial_of(out) if unfinished else open_run(out).folder, options.note)
        say(f"{out}: {'noted' if options.note.strip() else 'the note is removed'}")
        return
    if options.csv:
        refuse_unwritable_file(options.csv)
        if options.csv.name == LEDGER.name:
            raise InputError(f"--csv {options.csv} has the name of a ledger of submissions: give another file")
    if (options.folder / MANIFEST).is_file():  # one run
        folder = options.folder.resolve()
        rows = [row for row in list_rows(folder.parent) if row["run"] == folder.name]
    else:
        rows = list_rows(options.folder)
    rows = sort_rows(rows, options.sort)
    for line in format_rows(rows):
        say(line)
    if options.csv:
        table = export_rows(rows)
        write_table(table, options.csv)
        say(f"{options.csv}: {counted(len(rows), 'row')}")


if __name__ == "__main__":
    run(main)

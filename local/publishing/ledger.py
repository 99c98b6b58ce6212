"""The ledger of submissions: what was sent, its local scores, and its scores on the leaderboard.

`local/publish.py` writes it, `local/submissions.py` and `local/runs.py` read it. It is a CSV file with a submission on
each line. What cannot be read in it, and columns that somebody has added, stay in the file as they are.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from kernel.inputs import InputError, escape_control, shorten
from kernel.manifest import Manifest, Member
from local.base.console import counted, say
from local.base.files import make_partial
from local.base.runs import Score, files_digest, score_in, scores_of
from local.bundling.record import now
from local.publishing.preflight import Bundle

LEDGER = Path("runs", "submissions.csv")
PLUS = " + "  # between the runs of an ensemble


@dataclass(frozen=True)
class SubmittedRun:
    """A run of a submission.

    Attributes:
        name: of its folder.
        files: see `local.base.runs.files_digest`.
        recipe: its settings, with those that were chosen.
        given: its settings as they were given.
    """

    name: str
    files: str
    recipe: dict
    given: dict


@dataclass(frozen=True)
class Submission:
    """One row of the ledger, all of it text, as in the file; empty where it is not known.

    Attributes:
        kernel, manifest: SHA-256 of the bundle's files.
        version: of the kernel.
        local, low, high: cross-validated score by `metric`, weighted as for the choice of a bank, and its 95% interval.
            In the rows of an ensemble that earlier versions wrote, that of its best run.
        observations: how many the public score is measured on.
        public, private: leaderboard scores, as Kaggle writes them.
        unweighted, unweighted_low, unweighted_high: the same cross-validated score without weights.
        gpu_seconds: of the kernel's run; Kaggle does not say how long the run for the score takes.
        members: the `SubmittedRun`s, as JSON.
    """

    when: str
    competition: str
    runs: str
    commit: str
    kernel: str
    manifest: str
    version: str
    metric: str
    local: str
    low: str
    high: str
    observations: str
    status: str
    public: str = ""
    private: str = ""
    unweighted: str = ""
    unweighted_low: str = ""
    unweighted_high: str = ""
    gpu_seconds: str = ""
    members: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a submission."""
        return self.competition, self.kernel, self.manifest, self.version

    @property
    def name(self) -> str:
        return f"{self.runs} (v{self.version})"

    @property
    def is_ensemble(self) -> bool:
        return PLUS in self.runs

    @property
    def unweighted_score(self) -> Score | None:
        return make_score(self.unweighted, self.unweighted_low, self.unweighted_high)

    @property
    def weighted_score(self) -> Score | None:
        """None in a row of an earlier version that has the score of an ensemble's best run."""
        if self.is_ensemble and not self.unweighted:
            return None
        return make_score(self.local, self.low, self.high)

    @property
    def public_score(self) -> float | None:
        return to_number(self.public)

    @property
    def submitted_runs(self) -> tuple[SubmittedRun, ...]:
        """Its runs; empty if the ledger does not describe them."""
        return tuple(SubmittedRun(**one) for one in json.loads(self.members or "[]"))


COLUMNS = tuple(column.name for column in fields(Submission))
NEW_COLUMNS = COLUMNS[COLUMNS.index("unweighted") :]  # that ledgers of earlier versions lack
NUMBERS = ("local", "low", "high", "unweighted", "unweighted_low", "unweighted_high", "gpu_seconds")


class Line(NamedTuple):
    """A line of the file.

    Attributes:
        submission: None if the line is damaged.
        others: cells of columns that are none of a ledger's, by column.
        raw: the line as it is in the file; empty for a new one.
    """

    submission: Submission | None
    others: dict[str, str]
    raw: bytes = b""


@dataclass
class Ledger:
    """The lines of the file, and the names of columns that are none of a ledger's."""

    lines: list[Line] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Submission]:
        return [line.submission for line in self.lines if line.submission]


def make_submission(bundle: Bundle, version: int, gpu_seconds: float | None = None) -> Submission:
    """The row of a bundle that was just submitted as a version of its kernel.

    Args:
        gpu_seconds: of the kernel's run, if they are known.
    """
    competition, size = bundle.table.competition, len(bundle.table.observations)
    scores = scores_of(bundle.manifest)
    own = [describe_member(bundle.manifest, member) for member in bundle.manifest.members]
    return Submission(
        when=now(),
        competition=bundle.competition,
        runs=PLUS.join(bundle.runs),
        commit=bundle.commit,
        kernel=bundle.record.bundle.kernel,
        manifest=bundle.record.bundle.manifest,
        version=str(version),
        metric=competition.metric,
        **score_cells(score_in(scores, competition.metric), ("local", "low", "high")),
        **score_cells(
            score_in(scores, f"unweighted_{competition.metric}"), ("unweighted", "unweighted_low", "unweighted_high")
        ),
        # Without a known public part the size of the test set is an upper bound.
        observations=str(competition.boards(size).get("public", size)),
        status="pending",
        gpu_seconds="" if gpu_seconds is None else f"{gpu_seconds:.0f}",
        members=json.dumps([asdict(one) for one in own], ensure_ascii=False),
    )


def score_cells(score: Score | None, columns: Sequence[str]) -> dict[str, str]:
    """A score and its interval as cells of the ledger."""
    values = (None,) * 3 if score is None else score
    return {column: "" if value is None else f"{value:.4f}" for column, value in zip(columns, values, strict=True)}


def describe_member(manifest: Manifest, member: Member) -> SubmittedRun:
    """A member of a bundle, as the ledger keeps it."""
    recipe, given = (
        {key: shorten_list(value) if key == "exclude" else value for key, value in settings.items()}
        for settings in (member.recipe, member.given.recipe)
    )
    return SubmittedRun(member.run or member.name, files_digest(manifest, member), recipe, given)


def shorten_list(value: object) -> object:
    """The ids that a recipe excludes, which may be thousands, as one text by which they can be compared."""
    if not value:
        return value
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return f"{counted(len(value), 'observation')} with SHA-256 {digest[:8]}"


def save_submission(submission: Submission, path: Path) -> None:
    """Add a submission to the ledger, or update its row with what is known now; the file is replaced in one step.

    Raises:
        InputError: the file is not a ledger.
    """
    ledger = load_ledger(path)
    for index, line in enumerate(ledger.lines):
        if line.submission and line.submission.key == submission.key:
            news = {column: value for column, value in asdict(submission).items() if value and column != "when"}
            ledger.lines[index] = Line(replace(line.submission, **news), line.others)
            break
    else:
        ledger.lines.append(Line(submission, {}))
    partial = make_partial(path)
    partial.write_bytes(format_lines(ledger))
    partial.replace(path)


def read_ledger(path: Path) -> list[Submission]:
    """The rows of a ledger, oldest first; an empty list if there is no file. Prints a line for each damaged one.

    Raises:
        InputError: the file is not a ledger.
    """
    return load_ledger(path, warns=True).rows


def load_ledger(path: Path, warns: bool = False) -> Ledger:
    """All that is in the file.

    Args:
        warns: print a line for each line that cannot be read.

    Raises:
        InputError: the file cannot be read, or is not a ledger.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return Ledger()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a ledger, or correct the path") from error
    if not any(line.strip() for line in lines):
        return Ledger()
    header = read_header(path, lines[0])
    ledger = Ledger(others=[name for name in header if name not in COLUMNS])
    for number, raw in enumerate(lines[1:], start=2):
        if not raw.strip():
            continue
        try:
            cells = dict(zip(header, parse_cells(raw, len(header)), strict=True))
            submission = check_row(Submission(**{name: cells.get(name, "") for name in COLUMNS}))
            ledger.lines.append(Line(submission, {name: cells[name] for name in ledger.others}, raw))
        except ValueError as error:
            ledger.lines.append(Line(None, {}, raw))
            if warns:
                say(f"warning: {path}, line {number} is left out ({error}): correct it, or delete it")
    missing = [name for name in NEW_COLUMNS if name not in header]
    if missing and warns:
        say(f"{path} was begun by an earlier version: of its submissions, {', '.join(missing)} are not known")
    return ledger


def read_header(path: Path, line: bytes) -> list[str]:
    """The columns of a ledger; an InputError if it is none."""
    try:
        header = parse_cells(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise InputError(f"{path} is not a ledger ({error}): give another file, or move it away") from error
    missing = [name for name in COLUMNS if name not in (*header, *NEW_COLUMNS)]
    if missing or len(set(header)) < len(header):
        problem = f"it lacks the column {missing[0]!r}" if missing else "a column is there twice"
        found = shorten(escape_control(", ".join(header)), 100)
        raise InputError(f"{path} is not a ledger, {problem}: it has {found}; give another file, or move it away")
    return header


def parse_cells(line: bytes, count: int | None = None) -> list[str]:
    """The cells of a line of CSV; a ValueError if it is none, or has not as many cells as columns."""
    try:
        [cells] = csv.reader([line.decode("utf-8")], strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError("it is not UTF-8" if isinstance(error, UnicodeError) else shorten(error)) from error
    if count is not None and len(cells) != count:
        raise ValueError(f"it has {counted(len(cells), 'cell')}, expected {count}")
    return cells


def check_row(row: Submission) -> Submission:
    """Check the cells that are used as numbers, and the runs; a ValueError names the column."""
    for column in ("version", "observations"):
        value = getattr(row, column)
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ValueError(f"expected a number from 1 for {column}, got {shorten(repr(value), 40)}")
    for column in NUMBERS:
        value = getattr(row, column)
        if value and to_number(value) is None:
            raise ValueError(f"expected a number for {column}, got {shorten(repr(value), 40)}")
    try:
        complete = all(isinstance(one.recipe, dict) and isinstance(one.given, dict) for one in row.submitted_runs)
    except (ValueError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError("members is not the JSON that publishing writes")
    return row


def format_lines(ledger: Ledger) -> bytes:
    """The content of the file. Damaged lines are as they were."""
    lines = [format_cells((*COLUMNS, *ledger.others))]
    for line in ledger.lines:
        others = [line.others.get(name, "") for name in ledger.others]
        lines.append(format_cells((*astuple(line.submission), *others)) if line.submission else line.raw)
    return b"".join(line + b"\n" for line in lines)


def format_cells(cells: Sequence[str]) -> bytes:
    """A line of CSV. A line break in a cell, as in the name of a run, becomes its escape."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([cell.replace("\n", "\\n").replace("\r", "\\r") for cell in cells])
    return text.getvalue().encode("utf-8", "backslashreplace")


def make_score(value: str, low: str, high: str) -> Score | None:
    """A score from cells of the ledger; None if there is none."""
    found = to_number(value)
    return None if found is None else Score(found, to_number(low), to_number(high))


def to_number(text: str) -> float | None:
    """A score, or None if the text is not a finite number."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None

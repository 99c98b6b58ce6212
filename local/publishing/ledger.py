"""The ledger of submissions: what was sent, what it promised, and what the leaderboard said.

Written by `local/publishing/publication.py`, read by `local/submissions.py`.
"""

from collections.abc import Sequence
from math import isfinite, sqrt
from pathlib import Path

from kernel.tables import read_table
from local.base.console import aligned
from local.base.files import write_table
from local.publishing.preflight import Bundle
from local.rehearsal.record import now

LEDGER = Path("runs", "submissions.csv")
COLUMNS = (
    "when", "competition", "runs", "commit", "kernel", "manifest", "version",  # kernel, manifest: their SHA-256
    "metric", "local", "low", "high",  # cross-validated, with the bounds of its 95% interval
    "observations",  # that the public score is of
    "status", "public", "private",
)  # fmt: skip
KEY = ("competition", "kernel", "manifest", "version")  # what makes a submission this one


def row_of(bundle: Bundle, version: int) -> dict[str, str]:
    """The ledger's row of a bundle that was just submitted as a version of its kernel.

    Its local score is that of its best run, which is the first: an ensemble's own is not known before the leaderboard.
    """
    competition, size = bundle.table.competition, len(bundle.table.observations)
    metric = competition.metric
    scores = bundle.manifest.members[0].validation
    local = {
        name: f"{scores[key]:.4f}"
        for name, key in (("local", metric), ("low", f"{metric}_low"), ("high", f"{metric}_high"))
        if key in scores
    }
    observations = competition.boards(size).get("public", size)  # elsewhere the test set is an upper bound
    known = {
        "when": now(),
        "competition": bundle.competition,
        "runs": " + ".join(bundle.runs),
        "commit": bundle.commit,
        **bundle.digests,
        "version": str(version),
        "metric": metric,
        **local,
        "observations": str(observations),
        "status": "pending",
    }
    return {column: known.get(column, "") for column in COLUMNS}


def note(row: dict[str, str], path: Path) -> None:
    """Add a submission to the ledger, or what is now known of it to the row that it has; in one step."""
    rows = read_ledger(path)
    known = next((old for old in rows if all(old[column] == row[column] for column in KEY)), None)
    if known:
        known.update({column: value for column, value in row.items() if value and column != "when"})
    else:
        rows.append(row)
    write_table(rows, path, COLUMNS)


def read_ledger(path: Path) -> list[dict[str, str]]:
    """The rows of a ledger, oldest first; none where there is no file.

    Raises:
        InputError: the file is no ledger.
    """
    return read_table(path, COLUMNS) if path.exists() else []


def noise(metric: str, score: float, observations: int) -> float | None:
    """Half of the 95% interval of a score that was measured on so many observations.

    A recall is a fraction of the observations (normal approximation). Of any other metric, such as macro-F1, the score
    and the number of observations do not tell: None.
    """
    if not metric.startswith("recall_at_"):
        return None
    return 1.96 * sqrt(score * (1 - score) / observations)


def compare(rows: Sequence[dict[str, str]]) -> list[str]:
    """A line for each scored submission but the first of a competition: what it gained on the best before it.

    A gain inside the leaderboard's noise is called so: it is no reason to prefer either. Where the noise is not known,
    the line says that.
    """
    lines, best = [], {}
    for row in rows:
        score, before = number(row["public"]), best.get(row["competition"])
        if score is None:
            continue
        if before:
            gain = score - number(before["public"])
            lines.append(
                f"{row['runs']} (v{row['version']}) is {gain:+.3f} on {before['runs']} (v{before['version']}); "
                f"{verdict(gain, before, row)}"
            )
        if not before or score > number(before["public"]):
            best[row["competition"]] = row
    return lines


def verdict(gain: float, before: dict[str, str], row: dict[str, str]) -> str:
    """Whether chance alone explains what a submission gained on one before it."""
    margin = noise(row["metric"], number(before["public"]), int(row["observations"]))
    if margin is None:
        return f"the noise of {row['metric'] or 'its metric'} is not known: compare the intervals of the local scores"
    beyond = "beyond" if abs(gain) > margin else "warning: no reason to prefer either, it is inside"
    return f"{beyond} the noise of ±{margin:.3f} that {row['observations']} observations have"


def number(cell: str) -> float | None:
    """A score, or None where there is none, or no finite one."""
    try:
        return float(cell) if isfinite(float(cell)) else None
    except ValueError:
        return None


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """The ledger as lines of a table that fits a terminal."""
    shown = ("when", "competition", "runs", "commit", "version", "metric", "local", "public", "private", "status")
    told = []
    for row in rows:
        interval = f"{row['local']} [{row['low']}, {row['high']}]" if row["low"] else row["local"]
        told.append({**row, "local": interval, "commit": row["commit"][:8]})
    return aligned([{column: row[column] or "–" for column in shown} for row in told])

"""The ledger of submissions: what was sent, its local scores, and its scores on the leaderboard.

`local/publish.py` writes it, `local/submissions.py` reads it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, sqrt
from pathlib import Path

from kernel.tables import read_table
from local.base.console import aligned
from local.base.files import write_table
from local.bundling.record import now
from local.publishing.preflight import Bundle

LEDGER = Path("runs", "submissions.csv")


@dataclass(frozen=True)
class Submission:
    """One row of the ledger, all of it text, as in the file; empty where it is not known.

    Attributes:
        kernel, manifest: SHA-256 of the bundle's files.
        version: of the kernel.
        local, low, high: cross-validated score of the best run by `metric`, and its 95% interval.
        observations: how many the public score is measured on.
        public, private: leaderboard scores, as Kaggle writes them.
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

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a submission."""
        return self.competition, self.kernel, self.manifest, self.version

    @property
    def name(self) -> str:
        return f"{self.runs} (v{self.version})"

    @property
    def public_score(self) -> float | None:
        return to_number(self.public)

    @property
    def margin(self) -> float | None:
        """Half of the 95% interval of the public score; see `half_interval`."""
        return half_interval(self.metric, self.public_score, int(self.observations))


COLUMNS = tuple(column.name for column in fields(Submission))


def make_submission(bundle: Bundle, version: int) -> Submission:
    """The row of a bundle that was just submitted as a version of its kernel.

    Its local score is that of its best run, the first: the score of an ensemble is not known before the leaderboard.
    """
    competition, size = bundle.table.competition, len(bundle.table.observations)
    scores = bundle.manifest.members[0].validation
    local, low, high = (
        f"{scores[name]:.4f}" if name in scores else ""
        for name in (competition.metric, f"{competition.metric}_low", f"{competition.metric}_high")
    )
    return Submission(
        when=now(),
        competition=bundle.competition,
        runs=" + ".join(bundle.runs),
        commit=bundle.commit,
        kernel=bundle.record.bundle.kernel,
        manifest=bundle.record.bundle.manifest,
        version=str(version),
        metric=competition.metric,
        local=local,
        low=low,
        high=high,
        # Without a known public part the size of the test set is an upper bound.
        observations=str(competition.boards(size).get("public", size)),
        status="pending",
    )


def save_submission(submission: Submission, path: Path) -> None:
    """Add a submission to the ledger, or update its row with what is known now; the file is replaced in one step."""
    rows = {row.key: row for row in read_ledger(path)}
    if known := rows.get(submission.key):
        news = {column: value for column, value in asdict(submission).items() if value and column != "when"}
        submission = replace(known, **news)
    rows[submission.key] = submission
    write_table([asdict(row) for row in rows.values()], path, COLUMNS)


def read_ledger(path: Path) -> list[Submission]:
    """The rows of a ledger, oldest first; an empty list if there is no file.

    Raises:
        InputError: the file is not a ledger.
    """
    rows = read_table(path, COLUMNS) if path.exists() else []
    return [Submission(**{column: row[column] or "" for column in COLUMNS}) for row in rows]


def half_interval(metric: str, score: float, observations: int) -> float | None:
    """Half of the 95% interval of a score, by the normal approximation.

    Only a recall is a fraction of the observations. For other metrics, such as macro-F1, the interval does not follow
    from the score and the number of observations: None.
    """
    if not metric.startswith("recall_at_"):
        return None
    return 1.96 * sqrt(score * (1 - score) / observations)


def compare_submissions(rows: Sequence[Submission]) -> list[str]:
    """A line for each scored submission but the first of a competition: its gain over the best one before it.

    The line says whether the gain is within the noise of the leaderboard, or that the noise is not known.
    """
    lines, best = [], {}
    for row in rows:
        if row.public_score is None:
            continue
        if before := best.get(row.competition):
            gain = row.public_score - before.public_score
            lines.append(f"{row.name} is {gain:+.3f} compared with {before.name}; {judge_gain(gain, before, row)}")
        if not before or row.public_score > before.public_score:
            best[row.competition] = row
    return lines


def judge_gain(gain: float, before: Submission, row: Submission) -> str:
    """Whether a gain is larger than chance explains."""
    margin = half_interval(row.metric, before.public_score, int(row.observations))
    if margin is None:
        return f"the noise of {row.metric or 'its metric'} is not known: compare the intervals of the local scores"
    noise = f"the noise of ±{margin:.3f} of {row.observations} observations"
    return f"beyond {noise}" if abs(gain) > margin else f"warning: within {noise}, no reason to prefer either"


def to_number(text: str) -> float | None:
    """A score, or None if the text is not a finite number."""
    try:
        return float(text) if isfinite(float(text)) else None
    except ValueError:
        return None


def format_ledger(rows: Sequence[Submission]) -> list[str]:
    """The ledger as lines of a table that fits a terminal."""
    return aligned(
        [
            {
                "when": row.when,
                "competition": row.competition,
                "runs": row.runs,
                "commit": row.commit[:8] or "–",
                "version": row.version,
                "metric": row.metric or "–",
                "local": (f"{row.local} [{row.low}, {row.high}]" if row.low else row.local) or "–",
                "public": row.public or "–",
                "private": row.private or "–",
                "status": row.status or "–",
            }
            for row in rows
        ]
    )


def plot_submissions(rows: Sequence[Submission], path: Path) -> int:
    """Plot local against public scores with 95% intervals; returns how many submissions have both.

    If there are none, no file is written.
    """
    scored = [row for row in rows if to_number(row.local) is not None and row.public_score is not None]
    if not scored:
        return 0
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axis = figure.subplots()
    competitions = list(dict.fromkeys(row.competition for row in scored))
    for row in scored:
        local, public, color = float(row.local), row.public_score, f"C{competitions.index(row.competition)}"
        low, high = (to_number(bound) for bound in (row.low, row.high))
        spread = [[local - (local if low is None else low)], [(local if high is None else high) - local]]
        axis.errorbar(local, public, row.margin, spread, "o", color=color)
        label = f"{row.runs} v{row.version}"
        axis.annotate(label, (local, public), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for index, competition in enumerate(competitions):
        axis.plot([], [], "o", color=f"C{index}", label=competition)
    low, high = (pick(*axis.get_xlim(), *axis.get_ylim()) for pick in (min, max))
    axis.plot([low, high], [low, high], ":", color="grey", label="equal")
    axis.set(xlabel="local score, cross-validated", ylabel="public leaderboard score")
    axis.legend(frameon=False)
    axis.set_title("Local against leaderboard, 95% intervals", loc="left")
    figure.savefig(path, dpi=120)
    return len(scored)

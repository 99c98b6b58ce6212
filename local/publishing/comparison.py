"""Compare submissions: what changed from one to the next, which gains are noise, and local against public scores."""

from collections.abc import Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path

from kernel.inputs import InputError, shorten
from kernel.progress import clock_time
from local.base.console import aligned, counted
from local.base.files import make_partial, refuse_unwritable_file
from local.publishing.ledger import Submission
from local.recipes.recipe import describe_settings, differences

UNKNOWN = "not known"
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")  # that matplotlib writes
WIDTH = 120  # of a changed setting, in characters
EXPORTED = (
    *("when", "competition", "runs", "commit", "version", "metric", "unweighted", "unweighted_low", "unweighted_high"),
    *("weighted", "weighted_low", "weighted_high", "public", "public_noise", "observations", "private", "status"),
    *("gpu_seconds", "recipe"),
)


def half_interval(metric: str, score: float, observations: int) -> float | None:
    """Half of the 95% interval of a score, by the normal approximation of the binomial distribution.

    At 0 and 1, where that has no width, it is about the interval of a score that differs by one observation.

    Only a recall is a fraction of the observations. For other metrics, such as macro-F1, the interval does not follow
    from the score and the number of observations: None.
    """
    if not metric.startswith("recall_at_"):
        return None
    score = min(max(score, 1 / (observations + 1)), observations / (observations + 1))
    return 1.96 * sqrt(score * (1 - score) / observations)


def noise_of(row: Submission) -> float | None:
    """Half of the 95% interval of the public score; None if there is no score, or its noise is not known."""
    public = row.public_score
    return None if public is None else half_interval(row.metric, public, int(row.observations))


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
        if not before or (gain < 0 if row.metric == "log_loss" else gain > 0):
            best[row.competition] = row
    return lines


def judge_gain(gain: float, before: Submission, row: Submission) -> str:
    """Whether a gain is larger than chance explains."""
    margin = half_interval(row.metric, before.public_score, int(row.observations))
    if margin is None:
        return f"the noise of {row.metric or 'its metric'} is not known: compare the intervals of the local scores"
    noise = f"the noise of ±{margin:.3f} of {row.observations} observations"
    return f"beyond {noise}" if abs(gain) > margin else f"warning: within {noise}, no reason to prefer either"


def describe_changes(rows: Sequence[Submission]) -> list[str]:
    """For each submission, how its recipe differs from that of the submission before to the same competition."""
    texts, before = [], {}
    for row in rows:
        texts.append(describe_change(before.get(row.competition), row))
        before[row.competition] = row
    return texts


def describe_change(before: Submission | None, row: Submission) -> str:
    """How the recipes of a submission differ from those of the one before.

    Runs are compared by name; a run that replaces another one is compared with that. The recipe of a first submission
    is described by the nearest one of the kit.
    """
    now = {run.name: run for run in row.submitted_runs}
    if not now:
        return f"its recipe is {UNKNOWN}"
    if before is None:
        recipes = [(name, describe_settings(run.given or run.recipe) or UNKNOWN) for name, run in now.items()]
        return "; ".join(f"{name}: {text}" if len(now) > 1 else text for name, text in recipes)
    was = {run.name: run for run in before.submitted_runs}
    if not was:
        return f"the recipe of the one before is {UNKNOWN}"
    new, gone = ([name for name in one if name not in other] for one, other in ((now, was), (was, now)))
    pairs = [(was[name], now[name]) for name in now if name in was]
    if len(new) == len(gone) == 1:
        pairs.append((was[gone.pop()], now[new.pop()]))
    parts = [f"with {name}" for name in new] + [f"without {name}" for name in gone]
    for old, own in pairs:
        changes = [shorten(text, WIDTH) for text in differences(old.recipe, own.recipe).values()]
        if not changes and old.files != own.files:
            changes = ["the same recipe, trained again"]
        parts += [f"{own.name}: {text}" if len(now) > 1 else text for text in changes]
    return "; ".join(parts) or "the same recipe"


def format_ledger(rows: Sequence[Submission]) -> list[str]:
    """The ledger as lines of a table. The local scores are cross-validated, with 95% intervals."""
    return aligned(
        [
            {
                "when": row.when,
                "competition": row.competition,
                "runs": row.runs,
                "commit": row.commit[:8] or "–",
                "version": row.version,
                "metric": row.metric or "–",
                "local, unweighted": str(row.unweighted_score or UNKNOWN),
                "local, weighted": str(row.weighted_score or UNKNOWN),
                "public": row.public or "–",
                "private": row.private or "–",
                "status": row.status or "–",
                "GPU time": clock_time(float(row.gpu_seconds)) if row.gpu_seconds else UNKNOWN,
            }
            for row in rows
        ]
    )


def export_rows(rows: Sequence[Submission]) -> list[dict[str, object]]:
    """The rows of the ledger for a CSV of EXPORTED: local scores of other runs left out, and what is computed."""
    table = []
    for row, change in zip(rows, describe_changes(rows), strict=True):
        noise = noise_of(row)
        scores = columns_of("unweighted", row.unweighted_score) | columns_of("weighted", row.weighted_score)
        computed = {"public_noise": "" if noise is None else round(noise, 4), "recipe": change}
        table.append({**asdict(row), **scores, **computed})
    return table


def columns_of(name: str, score: Sequence[float | None] | None) -> dict[str, float | str]:
    """A score and the bounds of its interval in three columns."""
    values = ["" if value is None else value for value in score or (None,) * 3]
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def refuse_no_picture(path: Path) -> None:
    """Check that a plot can be written to a path.

    Raises:
        InputError: it cannot be written, or is of an unknown kind.
    """
    if path.suffix.lower() not in PICTURES:
        raise InputError(f"{path} has none of the endings {', '.join(PICTURES)}: give another name for the plot")
    refuse_unwritable_file(path)


def plot_submissions(rows: Sequence[Submission], path: Path) -> int:
    """Plot local against public scores with 95% intervals; returns how many submissions have both.

    There is a panel for the unweighted and one for the weighted local scores. The band around equality is the noise of
    the leaderboard: 95% of the public scores would lie in it if the local scores were those of the whole test set.
    If no submission has both scores, no file is written.
    """
    panels = {
        title: [(score, row) for row in rows for score in [score_of(row)] if score and row.public_score is not None]
        for title, score_of in (
            ("unweighted", lambda row: row.unweighted_score),
            ("weighted as for the choice of a bank", lambda row: row.weighted_score),
        )
    }
    panels = {title: points for title, points in panels.items() if points}
    if not panels:
        return 0
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    competitions = list(dict.fromkeys(row.competition for row in rows))
    for axis, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        draw_panel(axis, points, competitions)
        axis.set(xlabel=f"local score, cross-validated, {title}", ylabel="public leaderboard score")
    figure.suptitle("Local against leaderboard, 95% intervals")
    partial = make_partial(path)
    figure.savefig(partial, dpi=120, format=path.suffix[1:].lower())
    partial.replace(path)
    return max(map(len, panels.values()))


def draw_panel(axis, points: Sequence[tuple], competitions: Sequence[str]) -> None:
    """Draw (local score, submission) points, a colour per competition, and the noise of each leaderboard."""
    for score, row in points:
        low, high = (score.value if bound is None else bound for bound in (score.low, score.high))
        spread = [[max(0.0, score.value - low)], [max(0.0, high - score.value)]]
        color = f"C{competitions.index(row.competition)}"
        axis.errorbar(score.value, row.public_score, noise_of(row), spread, "o", color=color)
        label = f"{shorten(row.runs, 30)} v{row.version}"
        axis.annotate(label, (score.value, row.public_score), xytext=(4, 4), textcoords="offset points", fontsize=8)
    low, high = (pick(*axis.get_xlim(), *axis.get_ylim()) for pick in (min, max))
    axis.plot([low, high], [low, high], ":", color="grey", label="equal")
    scores = [low + (high - low) * step / 50 for step in range(51)]
    for competition, row in {row.competition: row for _, row in points}.items():
        color, size = f"C{competitions.index(competition)}", int(row.observations)
        axis.plot([], [], "o", color=color, label=competition)
        margins = [half_interval(row.metric, score, size) for score in scores]
        if None not in margins:
            below, above = (
                [score + sign * one for score, one in zip(scores, margins, strict=True)] for sign in (-1, 1)
            )
            noise = f"noise of its {counted(size, 'observation')}"
            axis.fill_between(scores, below, above, color=color, alpha=0.12, linewidth=0, label=noise)
    axis.legend(frameon=False)
    axis.set(xlim=(low, high), ylim=(low, high))

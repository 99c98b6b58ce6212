"""The plots of a report, as SVG in the colours of the page."""

import io
import re
from collections.abc import Sequence
from dataclasses import astuple

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

from local.report import failures, trust
from local.report.closeup import Map
from local.report.failures import Confusion, RankScores
from local.report.scores import GroupRecalls
from local.report.trust import Calibration, RiskCoverage

# Matplotlib draws in these; `as_svg` replaces them by colours of the page, which are others in dark mode.
INK, ACCENT, MUTED = "#1b3a4b", "#c8553d", "#9aa5ab"
THEMED = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable in the browser, in the font of the page
    "text.parse_math": False,  # a class may be named with "$"
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
    ),
}
BLOCKS, LARGE_BLOCKS = 60, 240  # rows of a matrix at most; of more groups, neighbours share a row
NAMED = 24  # rows of a matrix with a name each
GROUPS = ("#d9603b", "#2a8c82", "#7a5ea8", "#c79a1c", "#4f83c4", "#b5527f", "#6f9a3a", "#8a6a4f", "#3fa7c0", "#a0a0a0")
OTHERS = "#888888"
RIGHT, WRONG = (
    LinearSegmentedColormap.from_list("", [(*rgb, 0.0), (*rgb, 1.0)]) for rgb in ((0.16, 0.55, 0.51), (0.85, 0.36, 0.2))
)
RECALLS = {"recall_at_1": ("Recall@1", INK), "recall_at_5": ("Recall@5", ACCENT)}


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element; `name` makes its ids unique on the page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= id=")|(?<=="#)|(?<=url\(#)', f"{name}-", text)
    for colour, themed in THEMED.items():
        text = text.replace(colour, themed)
    return text


def subplots(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def shorten(name: str, width: int) -> str:
    """A name of at most `width` characters, cut after a whole word; a first word that is longer is kept."""
    if len(name) <= width:
        return name
    kept = ""
    for word in re.findall(r"[\s_/-]*[^\s_/-]+", name):
        if kept and len(kept + word) > width - 2:
            return kept + " …"
        kept += word
    return kept


def draw_groups(rows: Sequence[GroupRecalls], name: str) -> str:
    """The recalls of groups of observations with their intervals, the first group on top."""
    figure, axis = subplots(4.6, 0.9 + 0.34 * len(rows))
    for shift, (key, (label, colour)) in zip((-0.14, 0.14), RECALLS.items(), strict=True):
        values = np.array([astuple(getattr(row, key)) for row in rows])
        y = np.arange(len(rows)) + shift
        axis.hlines(y, values[:, 1], values[:, 2], color=colour, linewidth=2, alpha=0.45)
        axis.plot(values[:, 0], y, "o", color=colour, markersize=4.5, label=label)
    axis.set_yticks(range(len(rows)), [f"{shorten(row.name, 30)} ({row.observations})" for row in rows])
    axis.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5))
    axis.grid(axis="x", color=MUTED, alpha=0.3)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2)
    return as_svg(figure, name)


def draw_matrix(confusion: Confusion, name: str, is_large: bool = False) -> str:
    """A confusion matrix whose rows sum to 1, right answers in one colour and mistakes in another.

    Args:
        is_large: for a whole window, with more rows and names.
    """
    size, cells = len(confusion.groups), np.array(confusion.cells)
    blocks, side = min(size, LARGE_BLOCKS if is_large else BLOCKS), 11 if is_large else 4.6
    block_of = np.arange(size) * blocks // size
    matrix = np.zeros((blocks, blocks))
    np.add.at(matrix, (block_of[cells[:, 0]], block_of[cells[:, 1]]), cells[:, 2])
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    is_right = np.eye(blocks, dtype=bool)
    figure, axis = subplots(side, side)
    edges = np.linspace(-0.5, size - 0.5, blocks + 1)
    for shown, colours in ((is_right, RIGHT), (~is_right & (matrix > 0), WRONG)):
        # The square root makes small fractions visible.
        values = np.where(shown, np.sqrt(matrix), np.nan)
        axis.pcolormesh(edges, edges, values, cmap=colours, vmin=0, vmax=1, rasterized=blocks > NAMED)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true", aspect="equal")
    if size <= (BLOCKS if is_large else NAMED):
        named = [(group, start, start + 1) for start, group in enumerate(confusion.groups)]
    else:
        named = confusion.relatives
    for _, start, end in named:
        if end - start > 1:
            corner, width = start - 0.5, end - start
            axis.add_patch(Rectangle((corner, corner), width, width, fill=False, edgecolor=INK, linewidth=0.8))
    middles, labels = [(start + end - 1) / 2 for _, start, end in named], [shorten(group, 24) for group, *_ in named]
    axis.set_xticks(middles, labels, rotation=90)
    axis.set_yticks(middles, labels)
    axis.tick_params(length=0, labelsize=8)
    return as_svg(figure, name)


def draw_confidence(ranks: Sequence[RankScores], name: str) -> str:
    """Histograms of the probability of the first guess at every rank, right and wrong guesses stacked."""
    figure, axes = subplots(4.6, 0.5 + 0.95 * len(ranks), len(ranks), sharex=True, squeeze=False)
    edges, width = np.linspace(0, 1, failures.BINS, endpoint=False), 1 / failures.BINS
    for axis, rank in zip(axes[:, 0], ranks, strict=True):
        axis.bar(edges, rank.right, width, align="edge", color=INK, alpha=0.85, label="correct")
        axis.bar(edges, rank.wrong, width, rank.right, align="edge", color=ACCENT, alpha=0.85, label="wrong")
        axis.axvline(rank.confidence, color=MUTED, linestyle="--", label="mean")
        axis.set_title(rank.rank, loc="left", fontsize=9)
        axis.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes[-1, 0].set(xlabel="probability of the first guess", xlim=(0, 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return as_svg(figure, name)


def draw_reliability(calibration: Calibration, what: str, name: str) -> str:
    """The accuracy by confidence with intervals, above the number of observations in each bin."""
    figure, (axis, below) = subplots(4.6, 4.4, 2, sharex=True, height_ratios=(4, 1))
    bins = calibration.bins
    confidence = [one.confidence for one in bins]
    low, high = [one.right.low for one in bins], [one.right.high for one in bins]
    axis.plot([0, 1], [0, 1], "--", color=MUTED, label="calibrated")
    axis.vlines(confidence, low, high, color=ACCENT, linewidth=2, alpha=0.45)
    axis.plot(confidence, [one.right.value for one in bins], "o-", color=ACCENT, markersize=4.5, label="this run")
    axis.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    axis.legend(loc="upper left")
    starts, counts = [one.start for one in bins], [one.observations for one in bins]
    below.bar(starts, counts, 1 / trust.BINS, align="edge", color=INK, alpha=0.6)
    below.set(xlabel=what, ylabel="n")
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return as_svg(figure, name)


def draw_risk(curve: RiskCoverage, name: str) -> str:
    """The fraction of wrong answers by the fraction of observations that are answered."""
    figure, axis = subplots(4.6, 3.4)
    x, y, _ = np.transpose(curve.points)
    axis.fill_between(x, y, color=ACCENT, alpha=0.15)
    axis.plot(x, y, color=ACCENT)
    axis.set(xlabel="coverage, the most confident first", ylabel="error rate")
    axis.set(xlim=(0, 1), ylim=(0, None))
    return as_svg(figure, name)


def draw_training(log: Sequence[dict], chosen: int, name: str) -> str:
    curves = {key: [row for row in log if row.get(key)] for key in ("loss", "learning_rate")}
    curves = {key: rows for key, rows in curves.items() if rows}
    parts = 1 + len(curves)
    figure, axes = subplots(4.6, 0.6 + 1.9 * parts, parts, sharex=True, squeeze=False)
    axes = list(axes[:, 0])
    for count, style in ((1, ":"), (5, "-"), (10, "--")):
        epochs, values = [row["epoch"] for row in log], [row[f"recall_at_{count}"] for row in log]
        axes[0].plot(epochs, values, style, marker="o", markersize=4, color=INK, label=f"Recall@{count}")
    axes[0].set(ylim=(0, 1.02), ylabel="validation")
    axes[0].legend(ncols=3, fontsize=8, loc="lower right")
    for axis, (key, rows) in zip(axes[1:], curves.items(), strict=True):
        axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker="o", markersize=4, color=INK)
        axis.set_ylabel({"loss": "training loss", "learning_rate": "learning rate"}[key])
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 2e-05, without a factor above the axis
    for axis in axes:
        axis.axvline(chosen, color=ACCENT, alpha=0.6)
    axes[-1].set_xlabel(f"epoch (0: before training; kept: {chosen})")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return as_svg(figure, name)


def draw_distribution(counts: dict[str, list[int]], name: str) -> str:
    figure, axis = subplots(4.6, 3.2)
    styles = ((MUTED, "-"), (INK, "--"), (ACCENT, "-"))[-len(counts) :]
    for (label, values), (colour, style) in zip(counts.items(), styles, strict=True):
        axis.step(np.arange(1, len(values) + 1), values, style, where="mid", color=colour, label=label)
    axis.set(xlabel="class, the largest first", ylabel="per class", yscale="log", xlim=(1, None))
    axis.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # 20, not 2 x 10^1
    axis.legend()
    return as_svg(figure, name)


def draw_map(points: Map, name: str) -> str:
    """The observations of a map; the legend is text of the page, which is readable on a phone too."""
    figure, axis = subplots(4.6, 4.2)
    x, y, group, is_query = np.array(points.points).T
    colours = np.array([*GROUPS, OTHERS], dtype=object)[group.astype(int)]
    for held_out, outline in ((0, "none"), (1, INK)):
        shown = is_query == held_out
        axis.scatter(x[shown], y[shown], 12, colours[shown], edgecolors=outline, linewidths=0.4, alpha=0.8)
    axis.set_axis_off()
    return as_svg(figure, name)

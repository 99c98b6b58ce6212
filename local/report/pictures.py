"""The plots of a report, as SVG that takes the page's colours. Draws the figures, and decides nothing."""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from local.training.plots import ACCENT, INK, MUTED

# Colours of the page, which the dark one changes.
THEMED = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, found by the browser's search, in the page's own font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
    ),
}
BLOCKS, LARGE_BLOCKS = 60, 240  # rows of a matrix at most; neighbours of more groups share one
NAMED = 24  # rows of a matrix with a name each
LARGEST = 8  # groups with a name where not all have one
GROUPS = ("#d9603b", "#2a8c82", "#7a5ea8", "#c79a1c", "#4f83c4", "#b5527f", "#6f9a3a", "#8a6a4f", "#3fa7c0", "#a0a0a0")
RIGHT, WRONG = (
    LinearSegmentedColormap.from_list("", [(*rgb, 0.0), (*rgb, 1.0)]) for rgb in ((0.16, 0.55, 0.51), (0.85, 0.36, 0.2))
)
RECALLS = {"recall_at_1": ("Recall@1", INK), "recall_at_5": ("Recall@5", ACCENT)}


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element, without ids that another one on the page could have."""
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


def draw(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of some inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def draw_groups(rows: Sequence[dict], name: str) -> str:
    """Recalls of groups of observations with their intervals, a line each, the first on top."""
    figure, axis = draw(4.6, 0.9 + 0.34 * len(rows))
    for shift, (key, (label, colour)) in zip((-0.14, 0.14), RECALLS.items(), strict=True):
        values = np.array([[row[key][part] for part in ("value", "low", "high")] for row in rows])
        y = np.arange(len(rows)) + shift
        axis.hlines(y, values[:, 1], values[:, 2], color=colour, linewidth=2, alpha=0.45)
        axis.plot(values[:, 0], y, "o", color=colour, markersize=4.5, label=label)
    axis.set_yticks(range(len(rows)), [f"{shorten(row['label'])} ({row['observations']})" for row in rows])
    axis.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5))
    axis.grid(axis="x", color=MUTED, alpha=0.3)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2)
    return as_svg(figure, name)


def shorten(text: str, most: int = 30) -> str:
    """A name that fits beside a plot."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def draw_matrix(confusion: dict, name: str, is_large: bool = False) -> str:
    """What is taken for what, each row summing to 1; right answers in one colour, mistakes in the other.

    Args:
        is_large: for a whole window, with more rows and names.
    """
    size, cells = len(confusion["groups"]), np.array(confusion["cells"])
    blocks, side = min(size, LARGE_BLOCKS if is_large else BLOCKS), 11 if is_large else 4.6
    place = np.arange(size) * blocks // size
    matrix = np.zeros((blocks, blocks))
    np.add.at(matrix, (place[cells[:, 0]], place[cells[:, 1]]), cells[:, 2])
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    is_right = np.eye(blocks, dtype=bool)
    figure, axis = draw(side, side)
    edges = np.linspace(-0.5, size - 0.5, blocks + 1)
    for shown, colours in ((is_right, RIGHT), (~is_right & (matrix > 0), WRONG)):
        # Roots, so that few mistakes of many can be seen.
        values = np.where(shown, np.sqrt(matrix), np.nan)
        axis.pcolormesh(edges, edges, values, cmap=colours, vmin=0, vmax=1, rasterized=blocks > NAMED)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="taken for", ylabel="true", aspect="equal")
    if size <= (BLOCKS if is_large else NAMED):
        named = [{"name": group, "start": start, "end": start + 1} for start, group in enumerate(confusion["groups"])]
    else:
        named = confusion["relatives"] or largest_groups(confusion)
    for one in named:
        if one["end"] - one["start"] > 1:
            corner, width = one["start"] - 0.5, one["end"] - one["start"]
            axis.add_patch(Rectangle((corner, corner), width, width, fill=False, edgecolor=INK, linewidth=0.8))
    middles = [(one["start"] + one["end"] - 1) / 2 for one in named]
    axis.set_xticks(middles, [shorten(one["name"], 24) for one in named], rotation=90)
    axis.set_yticks(middles, [shorten(one["name"], 24) for one in named])
    axis.tick_params(length=0, labelsize=8)
    return as_svg(figure, name)


def largest_groups(confusion: dict) -> list[dict]:
    """The groups that were asked most, as `relatives` of one, far enough from each other for a name each."""
    size = len(confusion["groups"])
    asked = np.zeros(size)
    for true, _, observations in confusion["cells"]:
        asked[true] += observations
    named: list[int] = []
    for group in np.argsort(-asked, kind="stable").tolist():
        if asked[group] and all(abs(group - other) > size / NAMED for other in named):
            named.append(group)
    return [{"name": confusion["groups"][group], "start": group, "end": group + 1} for group in named[:LARGEST]]


def draw_confidence(ranks: Sequence[dict], name: str) -> str:
    """How sure the first guesses are at every rank, right and wrong ones stacked."""
    figure, axes = draw(4.6, 0.5 + 0.95 * len(ranks), len(ranks), sharex=True, squeeze=False)
    edges = np.linspace(0, 1, len(ranks[0]["histogram"]["right"]) + 1)
    for axis, rank in zip(axes[:, 0], ranks, strict=True):
        right, wrong = (np.array(rank["histogram"][key]) for key in ("right", "wrong"))
        axis.bar(edges[:-1], right, np.diff(edges), align="edge", color=INK, alpha=0.85, label="right")
        axis.bar(edges[:-1], wrong, np.diff(edges), right, align="edge", color=ACCENT, alpha=0.85, label="wrong")
        axis.axvline(rank["confidence"], color=MUTED, linestyle="--", label="mean")
        axis.set_title(rank["rank"], loc="left", fontsize=9)
        axis.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes[-1, 0].set(xlabel="probability of the first guess", xlim=(0, 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return as_svg(figure, name)


def draw_reliability(calibration: dict, what: str, name: str) -> str:
    """What is said against what is found, bin by bin with intervals, over how often it is said."""
    figure, (axis, below) = draw(4.6, 4.4, 2, sharex=True, height_ratios=(4, 1))
    bins = calibration["bins"]
    said, found = [one["confidence"] for one in bins], [one["right"]["value"] for one in bins]
    axis.plot([0, 1], [0, 1], "--", color=MUTED, label="calibrated")
    axis.vlines(
        said,
        [one["right"]["low"] for one in bins],
        [one["right"]["high"] for one in bins],
        color=ACCENT,
        linewidth=2,
        alpha=0.45,
    )
    axis.plot(said, found, "o-", color=ACCENT, markersize=4.5, label="this run")
    axis.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is right")
    axis.legend(loc="upper left")
    width = 1 / 10
    below.bar(
        [one["from"] for one in bins], [one["observations"] for one in bins], width, align="edge", color=INK, alpha=0.6
    )
    below.set(xlabel=what, ylabel="observations")
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return as_svg(figure, name)


def draw_risk(curve: dict, name: str) -> str:
    """The share of wrong answers by how many are answered, the surest first."""
    figure, axis = draw(4.6, 3.4)
    x, y = ([point[key] for point in curve["points"]] for key in ("coverage", "risk"))
    axis.fill_between(x, y, color=ACCENT, alpha=0.15)
    axis.plot(x, y, color=ACCENT)
    axis.set(xlabel="share that is answered, the surest first", ylabel="share of them that is wrong", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    return as_svg(figure, name)


def draw_training(log: Sequence[dict], chosen: int, name: str) -> str:
    """Recalls, loss and learning rate by epoch; the chosen epoch is marked."""
    losses, rates = ([row for row in log if row.get(key)] for key in ("loss", "learning_rate"))
    parts = 1 + bool(losses) + bool(rates)
    figure, axes = draw(4.6, 0.6 + 1.9 * parts, parts, sharex=True, squeeze=False)
    axes = list(axes[:, 0])
    for count, style in ((1, ":"), (5, "-"), (10, "--")):
        epochs, values = [row["epoch"] for row in log], [row[f"recall_at_{count}"] for row in log]
        axes[0].plot(epochs, values, style, marker="o", markersize=4, color=INK, label=f"Recall@{count}")
    axes[0].set(ylim=(0, 1.02), ylabel="validation")
    axes[0].legend(ncols=3, fontsize=8, loc="lower right")
    for rows, key, label in ((losses, "loss", "training loss"), (rates, "learning_rate", "learning rate")):
        if rows:
            axis = axes[1] if key == "loss" else axes[-1]
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker="o", markersize=4, color=INK)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
    for axis in axes:
        axis.axvline(chosen, color=ACCENT, alpha=0.6)
    axes[-1].set_xlabel(f"epoch (0: the encoder as it came; chosen: {chosen})")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return as_svg(figure, name)


def draw_distribution(counts: dict[str, list[int]], name: str) -> str:
    """How many photos and observations the classes have, the commonest first."""
    figure, axis = draw(4.6, 3.2)
    for (label, values), (colour, style) in zip(
        counts.items(), ((MUTED, "-"), (INK, "--"), (ACCENT, "-"))[-len(counts) :], strict=True
    ):
        axis.step(np.arange(1, len(values) + 1), values, style, where="mid", color=colour, label=label)
    axis.set(xlabel="class, the commonest first", ylabel="of a class", yscale="log", xlim=(1, None))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    return as_svg(figure, name)


def draw_map(points: dict, name: str) -> str:
    """Observations on a plane by the colour of their group; held-out ones have a rim."""
    figure, axis = draw(7.4, 5.6)
    x, y, group, is_query = np.array(points["points"]).T
    colours = np.array([*GROUPS, "#888888"], dtype=object)[group.astype(int)]
    for held_out, rim in ((0, "none"), (1, INK)):
        shown = is_query == held_out
        axis.scatter(x[shown], y[shown], 12, colours[shown], edgecolors=rim, linewidths=0.4, alpha=0.8)
    for number, one in enumerate(points["groups"]):
        axis.scatter([], [], 24, GROUPS[number], label=f"{shorten(one['name'])} ({one['observations']})")
    if points["others"]:
        axis.scatter([], [], 24, "#888888", label=f"others ({points['others']})")
    axis.set_axis_off()
    figure.legend(loc="outside lower center", ncols=3)
    return as_svg(figure, name)

"""The pictures of a run folder. Called at the end of training; draws, and decides nothing."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, ACCENT, MUTED = "#1b3a4b", "#c8553d", "#9aa5ab"


def plot_training_curve(log: Sequence[dict], chosen: int, path: Path) -> None:
    """Loss and validation Recall@5 by epoch; the chosen epoch is marked.

    Args:
        log: rows of log.csv; epoch 0 is the encoder before training, and has no loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    recall = figure.subplots()
    epochs = [row["epoch"] for row in log]
    for count, style in ((1, ":"), (5, "-"), (10, "--")):
        values = [row[f"recall_at_{count}"] for row in log]
        recall.plot(epochs, values, style, color=INK, marker="o", label=f"validation Recall@{count}")
    recall.axvline(chosen, color=ACCENT, alpha=0.5, label=f"chosen: epoch {chosen}")
    recall.set(xlabel="epoch (0: the encoder as it came)", ylabel="recall", ylim=(0, 1))
    recall.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses = [(row["epoch"], row["loss"]) for row in log if row["loss"] != ""]
    if losses:
        loss = recall.twinx()
        loss.plot(*zip(*losses, strict=True), color=MUTED, label="training loss")
        loss.set_ylabel("training loss", color=MUTED)
        loss.set_ylim(bottom=0)
    recall.legend(loc="lower right", frameon=False)
    recall.set_title("Training curve", loc="left")
    figure.savefig(path, dpi=120)


def plot_class_distribution(class_ids: np.ndarray, path: Path) -> None:
    """How many observations the classes have: by rank, and how many classes have 1, 2, 3, ..."""
    counts = np.array(sorted(Counter(class_ids).values(), reverse=True))
    figure = Figure(figsize=(10, 4), layout="constrained")
    tail, shots = figure.subplots(1, 2)
    tail.fill_between(np.arange(1, len(counts) + 1), counts, step="mid", color=INK)
    tail.set(xlabel="class, by number of observations", ylabel="observations", yscale="log", xlim=(1, len(counts)))
    tail.set_title(f"{len(counts)} classes, {counts.sum()} observations", loc="left")
    sizes, classes = np.unique(np.minimum(counts, 10), return_counts=True)
    bars = shots.bar([f"{size}" if size < 10 else "10+" for size in sizes], classes, color=ACCENT)
    shots.bar_label(bars)
    shots.set(xlabel="observations of a class", ylabel="classes")
    shots.set_title("Shots", loc="left")
    figure.savefig(path, dpi=120)

"""The figures of a run and of the demo."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import ImageOps

from kernel.observations import find_test_table
from kernel.photos import read_photo
from local.base.console import counted
from local.data.competition import read_competition

INK, ACCENT, MUTED = "#1b3a4b", "#c8553d", "#9aa5ab"


def plot_training_curve(log: Sequence[dict], kept: int, path: Path) -> None:
    """Loss and validation recalls by epoch; the epoch whose weights are kept is marked.

    Args:
        log: rows of log.csv; epoch 0 is the encoder before training, and has no loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    recall = figure.subplots()
    epochs = [row["epoch"] for row in log]
    for count, style in ((1, ":"), (5, "-"), (10, "--")):
        values = [row[f"recall_at_{count}"] for row in log]
        recall.plot(epochs, values, style, color=INK, marker="o", label=f"validation Recall@{count}")
    recall.axvline(kept, color=ACCENT, alpha=0.5, label=f"kept: epoch {kept}")
    recall.set(xlabel="epoch (0: before training)", ylabel="recall", ylim=(0, 1))
    recall.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses = [(row["epoch"], row["loss"]) for row in log if row["loss"] != ""]
    if losses:
        loss = recall.twinx()
        loss.plot(*zip(*losses, strict=True), color=MUTED, label="training loss")
        loss.set_ylabel("training loss", color=MUTED)
        loss.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    recall.set_title("Training curve", loc="left")
    figure.savefig(path, dpi=120)


def plot_class_distribution(class_ids: np.ndarray, path: Path) -> None:
    """How many observations the classes have: the largest first, and how many classes have 1, 2, 3, ..."""
    counts = np.array(sorted(Counter(class_ids).values(), reverse=True))
    figure = Figure(figsize=(10, 4), layout="constrained")
    tail, shots = figure.subplots(1, 2)
    tail.fill_between(np.arange(1, len(counts) + 1), counts, step="mid", color=INK)
    tail.set(xlabel="class, by number of observations", ylabel="observations", yscale="log", xlim=(1, len(counts)))
    tail.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # 20, not 2 x 10^1
    tail.set_title(f"{counted(len(counts), 'class')}, {counted(int(counts.sum()), 'observation')}", loc="left")
    sizes, classes = np.unique(np.minimum(counts, 10), return_counts=True)
    bars = shots.bar([f"{size}" if size < 10 else "10+" for size in sizes], classes, color=ACCENT)
    shots.bar_label(bars)
    shots.set(xlabel="observations of a class", ylabel="classes")
    shots.set_title("Shots", loc="left")
    figure.savefig(path, dpi=120)


def plot_predictions(data: Path, submission: Path, solution: Path, path: Path, rows: int = 6) -> None:
    """Test observations with their first five guesses, each guess by a photo of its class; the right one is framed.

    Half of the rows are observations whose class is among the five, half are ones whose class is not.
    """
    labelled = read_competition(data)
    table = find_test_table(data, labelled.competition.name, settings=labelled.competition.settings)
    truth = {row[0]: row[1] for row in map(tuple, pd.read_csv(solution, dtype=str).to_numpy())}
    answers = {row[0]: row[1].split()[:5] for row in map(tuple, pd.read_csv(submission, dtype=str).to_numpy())}
    pairs = zip(labelled.class_ids, labelled.observations, strict=True)
    example = {class_id: observation.photos[0] for class_id, observation in reversed(list(pairs))}
    hit = {observation: truth[observation] in guesses for observation, guesses in answers.items()}
    right = [one for one in table.observations if hit[one.id]]
    wrong = [one for one in table.observations if not hit[one.id]]
    chosen = [*right[: rows - min(rows // 2, len(wrong))], *wrong[: rows // 2]]

    figure = Figure(figsize=(13, 2.1 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 6, squeeze=False)
    for line, observation in zip(axes, chosen, strict=True):
        photos = [observation.photos[0], *(example[guess] for guess in answers[observation.id])]
        titles = [f"observation, class {truth[observation.id]}", *answers[observation.id]]
        for axis, photo, title in zip(line, photos, titles, strict=True):
            axis.imshow(ImageOps.fit(read_photo(photo, 200), (320, 240)))
            is_right = title == truth[observation.id]
            axis.set_title(title, parse_math=False, fontsize=9, color=ACCENT if is_right else INK)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=is_right, color=ACCENT, linewidth=4)
    figure.savefig(path, dpi=80)

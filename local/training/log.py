"""What is recorded of every epoch: a row of log.csv, a line on the console, TensorBoard's events."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from local.recipes.settings import MONITORS
from local.training.checks import is_first

NOT_TRAINING = ("waiting", "validation", "writing")  # waiting for photos, writing checkpoints
LABELS = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "recall_at_10": "Recall@10", "macro_f1": "macro-F1"}


def log_row(
    epoch: int,
    loss: float | str,
    learning_rate: float,
    scores: dict[str, float],
    seconds: float = 0.0,
    parts: Mapping[str, float] = MappingProxyType({}),
) -> dict:
    """A row of log.csv: what the epoch gave, and what it cost.

    Args:
        parts: the seconds of each of NOT_TRAINING. All others are forward and backward passes and optimizer steps; a
            GPU may still be at work on these while the process waits for photos.
    """
    own = {name: scores.get(name, "") for name in MONITORS if name != "recalls"}
    cost = {"seconds": seconds} | {f"{part}_seconds": parts.get(part, 0.0) for part in NOT_TRAINING}
    cost = {name: round(value, 1) for name, value in cost.items()} | {"memory_gb": peak_memory_gb()}
    return {"epoch": epoch, "loss": loss, "learning_rate": learning_rate, **own, **cost}


def describe_scores(scores: dict[str, float]) -> str:
    """The validation scores as a line on the console shows them."""
    return "validation " + "  ".join(f"{label} {scores[name]:.3f}" for name, label in LABELS.items())


def peak_memory_gb() -> float:
    """The most memory this process has held, of the GPU where there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


@contextlib.contextmanager
def tensorboard(folder: Path, first_epoch: int) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row of the log to TensorBoard's events.

    Args:
        first_epoch: to be added. Those from it on that are there already, from before an interruption, are dropped.
    """
    if not is_first():
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which only training should pay

    with SummaryWriter(str(folder), purge_step=first_epoch) as writer:

        def write_row(row: dict) -> None:
            for name, value in row.items():
                if name != "epoch" and value != "":
                    writer.add_scalar(name, value, row["epoch"])

        yield write_row

"""Judge an encoder in training as the kernel would use it, and decide by that what to keep."""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import f1_score

from kernel.bank import CHUNK, Bank, classify
from kernel.embeddings import embed_observations
from kernel.encoders import Encoder
from kernel.observations import Observation
from local.banks.estimators import centroids
from local.banks.search import compare
from local.base import distributed
from local.base.console import counted
from local.base.metrics import GUESSES, macro_f1, paired_gain
from local.data.competition import Labelled, places_of, sort_ids
from local.data.photos import check_readable
from local.recipes.settings import MONITORS

MONITORED = {"recalls": "the mean of Recall@1, 5 and 10"}  # what a monitor is called where its own name says too little
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the tuned weights in the encoder; 0 leaves it as it came


class Unusable(ValueError):
    """An encoder gives no embedding that could be matched, as after a training that has diverged."""


@dataclass(frozen=True)
class Judged:
    """An encoder's answers on the validation observations.

    Attributes:
        bank: that gave them.
        hits: (validation observations, 3) whether the true class is among the first 1, 5, 10.
        scores: by the names of log.csv's columns.
        seen: (observations of the reference,) bool, those with a readable photo; None where the bank was given.
    """

    bank: Bank
    hits: np.ndarray
    scores: dict[str, float]
    seen: np.ndarray | None = None

    @property
    def worth(self) -> np.ndarray:
        """(validation observations,) the mean of the recalls: one of them alone would choose by a few hits."""
        return self.hits.mean(axis=1)


def judge(
    encoder: Encoder,
    fit: Labelled,
    validation: Labelled,
    views: Sequence[str],
    pooling: str,
    bank: Bank | None = None,
) -> Judged:
    """Rank the validation by a bank, of the class means of the other part unless one is given, as the kernel would."""
    encoder.module.eval()
    classes, seen = sort_ids(fit.class_ids), None
    if bank is None:
        reference = embed_together(encoder, fit.observations, views, pooling)
        seen = (reference.norm(dim=1) > 0).numpy()
        if not seen.any():
            raise Unusable("no embedding of the reference is a number")
        places = places_of(fit.class_ids[seen], classes)
        bank = centroids(reference.double().numpy()[seen], places, len(classes))
    queries = embed_together(encoder, validation.observations, views, pooling)
    truth = places_of(validation.class_ids, classes)
    # Chunk by chunk, since the scores of all observations over 32,000 classes would fill the memory.
    parts = torch.tensor(truth).split(CHUNK)
    outcomes = [compare(part, own.numpy()) for part, own in zip(classify([bank], queries), parts, strict=True)]
    places, losses = (np.concatenate([getattr(one, name) for one in outcomes]) for name in ("places", "losses"))
    firsts = np.concatenate([one.top[:, 0] for one in outcomes])
    hits = np.stack([places < count for count in GUESSES], axis=1).astype(float)
    recalls = hits.mean(axis=0)
    # By their ids, since -1 would make one class of all that the bank lacks.
    answers = validation.class_ids.tolist(), [classes[first] for first in firsts]
    scores = {f"recall_at_{count}": float(recall) for count, recall in zip(GUESSES, recalls, strict=True)} | {
        "macro_f1": macro_f1(*answers),
        "weighted_f1": float(f1_score(*answers, average="weighted", zero_division=0)),
        "log_loss": float(np.nanmean(losses)),
    }
    return Judged(bank, hits, scores, seen)


def embed_together(
    encoder: Encoder, observations: Sequence[Observation], views: Sequence[str], pooling: str
) -> torch.Tensor:
    """(observations, features): every process of the team embeds its share."""
    rank, world = distributed.rank_and_world_size()
    embeddings = embed_observations(encoder, observations[rank::world], views, pooling)
    check_readable(embeddings.unreadable, sum(len(observation.photos) for observation in observations[rank::world]))
    return distributed.all_gather_rows(embeddings.values, len(observations), encoder.device)


def monitored(scores: dict[str, float], monitor: str) -> float:
    """The score that `monitor` names, one of MONITORS."""
    if monitor == "recalls":
        return float(np.mean([scores[f"recall_at_{count}"] for count in GUESSES]))
    return scores[monitor]


def best_of(rows: Sequence[dict], monitor: str) -> int:
    """The index of the row with the best score, the first of equals."""
    sign = -1 if monitor == "log_loss" else 1
    return int(np.argmax([sign * monitored(row, monitor) for row in rows]))


def choose_share(judged: Sequence[Judged]) -> float:
    """The best of SHARES, if its gain over the encoder as it came is larger than its paired standard error.

    So chance on a small validation cannot pass for learning (the one-standard-error rule of Breiman et al. 1984).
    """
    best, gain, error = best_mixture(judged)
    return SHARES[best] if gain > error else 0.0


def best_mixture(judged: Sequence[Judged]) -> tuple[int, float, float]:
    """Of SHARES, the index of the best but the first, its gain over the encoder as it came, and the standard error.

    One observation has no standard error: NaN.
    """
    best = 1 + int(np.argmax([one.worth.mean() for one in judged[1:]]))
    if len(judged[0].worth) < 2:
        return best, float(judged[best].worth.mean() - judged[0].worth.mean()), math.nan
    return best, *paired_gain(judged[best].worth, judged[0].worth)


def told_choice(judged: Sequence[Judged], share: float, epoch: int) -> str:
    """Why a share of an epoch's weights was chosen, or none of them."""
    best, gain, error = best_mixture(judged)
    by, on = MONITORED["recalls"], counted(len(judged[0].worth), "validation observation")
    of = f"{SHARES[best]:.0%} of epoch {epoch}"
    if share:
        return f"chosen: {of}: it gains {gain:+.3f} ± {error:.3f} on the encoder as it came, in {by} over {on}"
    if gain <= 0:
        why = f"no mixture is better; the best, {of}, gains {gain:+.3f}"
    elif math.isnan(error):
        why = f"{of} gains {gain:+.3f}, with no standard error to compare that with,"
    else:
        why = f"{of} gains {gain:+.3f} ± {error:.3f}, no more than its standard error,"
    return f"chosen: the encoder as it came: {why} in {by} over {on}"


def peak_memory_gb() -> float:
    """The most that this process has held, of the GPU's memory where there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2
    )


def log_row(epoch: int, loss: float | str, rate: float, scores: dict[str, float], seconds: float = 0.0) -> dict:
    """A row of log.csv: what the epoch cost beside what it gave."""
    known = {name: scores.get(name, "") for name in MONITORS if name != "recalls"}
    cost = {"seconds": round(seconds, 1), "memory_gb": peak_memory_gb()}
    return {"epoch": epoch, "loss": loss, "learning_rate": rate, **known, **cost}


def log_line(scores: dict[str, float]) -> str:
    """What a line on the console says of the validation."""
    named = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "recall_at_10": "Recall@10", "macro_f1": "macro-F1"}
    return "validation " + "  ".join(f"{label} {scores[name]:.3f}" for name, label in named.items())

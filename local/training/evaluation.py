"""Evaluate an encoder during training as the kernel would use it: by a bank, on the validation observations."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import f1_score

from kernel.bank import Bank
from kernel.embeddings import embed_observations
from kernel.encoders import fitting_dtype
from kernel.forward import Encoder
from kernel.observations import Observation
from kernel.ranking import classify
from local.banks.estimators import class_means_bank
from local.banks.evaluation import evaluate_predictions
from local.base import distributed
from local.base.metrics import GUESSES, macro_f1
from local.data.observations import LabelledObservations, encode_labels
from local.data.photos import check_readable

MONITOR_NAMES = {"recalls": "the mean of Recall@1, 5 and 10"}  # where the setting's own name says too little


class NoUsableEmbedding(ValueError):
    """Every embedding is NaN or infinite, as after a training that has diverged."""


@dataclass(frozen=True)
class Evaluation:
    """How an encoder classifies the validation observations.

    Attributes:
        bank: that classified them.
        hits: (validation observations, 3) float, whether the true class is among the first 1, 5, 10.
        scores: by the names of log.csv's columns.
        has_embedding: (training observations,) bool, false where no photo could be read; None where no bank was made.
    """

    bank: Bank
    hits: np.ndarray
    scores: dict[str, float]
    has_embedding: np.ndarray | None = None

    @property
    def mean_recall(self) -> np.ndarray:
        """(validation observations,) the mean of the three hits: a single recall would turn on a few observations."""
        return self.hits.mean(axis=1)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates encoders on the same observations.

    Attributes:
        train: whose class means are the bank, unless a bank is given.
        views: of each photo; see `kernel.embeddings.embed_observations`.
        pooling: of an observation's photos, "mean" or "max".
        precision: of the kernel; see `kernel.encoders.pick_dtype`.
    """

    train: LabelledObservations
    validation: LabelledObservations
    views: tuple[str, ...]
    pooling: str
    precision: str

    def evaluate(self, encoder: Encoder, what: str, bank: Bank | None = None) -> Evaluation:
        """Classify the validation observations.

        Args:
            what: is evaluated, for lines of progress, such as `epoch 3`.
            bank: None makes one of the class means of the training observations.

        Raises:
            NoUsableEmbedding: no training observation has a finite embedding.
        """
        given, encoder = encoder, in_kernel_precision(encoder, self.precision)
        classes, has_embedding = self.train.classes, None
        if bank is None:
            embeddings = self.embed(encoder, self.train.observations, f"{what}, training photos")
            has_embedding = (embeddings.norm(dim=1) > 0).numpy()
            if not has_embedding.any():
                raise NoUsableEmbedding("no embedding of the training photos is finite")
            labels = encode_labels(self.train.class_ids[has_embedding], classes)
            bank = class_means_bank(embeddings.double().numpy()[has_embedding], labels, len(classes))
        queries = self.embed(encoder, self.validation.observations, f"{what}, validation photos")
        given.batch_size = encoder.batch_size  # halved where memory ran out, which the next evaluation need not try
        hits, scores = score_bank(bank, queries, self.validation.class_ids, classes)
        return Evaluation(bank, hits, scores, has_embedding)

    def embed(self, encoder: Encoder, observations: Sequence[Observation], what: str) -> torch.Tensor:
        """(observations, features), zeros where no photo could be read; each rank embeds a part."""
        rank, world_size = distributed.rank_and_world_size()
        part = observations[rank::world_size]
        embeddings = embed_observations(encoder, part, self.views, self.pooling, name=what)
        check_readable(embeddings.unreadable, sum(len(observation.photos) for observation in part))
        return distributed.all_gather_rows(embeddings.values, len(observations), encoder.device)


def in_kernel_precision(encoder: Encoder, precision: str) -> Encoder:
    """An encoder as the kernel will use it on this device: a copy in half precision, or the same in full precision.

    The module of the given encoder is in evaluation mode afterwards.
    """
    encoder.module.eval()
    dtype = fitting_dtype(encoder.module, encoder.device, precision)
    if dtype == torch.float32:
        return encoder
    module = copy.deepcopy(encoder.module).to(dtype, memory_format=torch.channels_last)
    half = Encoder(module, encoder.preprocessing, encoder.features, encoder.devices)
    half.batch_size = encoder.batch_size
    return half


def score_bank(
    bank: Bank, queries: torch.Tensor, class_ids: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, dict[str, float]]:
    """The hits and scores of an `Evaluation`.

    Args:
        queries: (observations, features).
        class_ids: (observations,) the true classes, which the bank may lack.
        classes: of the bank.
    """
    outcome = evaluate_predictions(classify([bank], queries), encode_labels(class_ids, classes))
    hits = outcome.hits
    # Compared by id: by index, all classes that the bank lacks would be one class, -1.
    answers = class_ids.tolist(), [classes[label] for label in outcome.top[:, 0]]
    scores = {f"recall_at_{count}": float(recall) for count, recall in zip(GUESSES, hits.mean(axis=0), strict=True)} | {
        "macro_f1": macro_f1(*answers),
        "weighted_f1": float(f1_score(*answers, average="weighted", zero_division=0)),
        "log_loss": float(np.nanmean(outcome.losses)),
    }
    return hits, scores


def monitored_score(scores: dict[str, float], monitor: str) -> float:
    """The score that `monitor`, one of MONITORS, names."""
    if monitor == "recalls":
        return float(np.mean([scores[f"recall_at_{count}"] for count in GUESSES]))
    return scores[monitor]


def best_row(rows: Sequence[dict], monitor: str) -> int:
    """The index of the row with the best monitored score, the first among equals."""
    sign = -1 if monitor == "log_loss" else 1
    return int(np.argmax([sign * monitored_score(row, monitor) for row in rows]))

"""Compare predictions with the true classes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from kernel.bank import collect_rows
from kernel.ranking import largest
from local.base.metrics import GUESSES, hits_of

QUERIES = 256  # whose scores are compared at once: with tens of thousands of classes they stay under 100 MB


@dataclass(frozen=True)
class Evaluation:
    """Predictions beside the true classes.

    Attributes:
        top: (queries, at most 10) classes, best first.
        ranks: (queries,) rank of the true class, 0 for the first; the number of classes if the bank lacks it.
        losses: (queries,) minus the log-probability of the true class; NaN if the bank lacks it.
        smooth_hits: (queries, len(GUESSES)) p / (p + q), where p is the probability of the true class and q the k-th
            largest one of the others, for k = 1, 5, 10: .5 or more if the true class is among the first k guesses.
            1 if there are no more than k classes; 0 for a class that the bank lacks.
        logit_scales: those of the banks, with the lowest log-loss before transduction.
        inverse_temperature: times which the log-probabilities are these; see `fit_inverse_temperature`.
    """

    top: np.ndarray
    ranks: np.ndarray
    losses: np.ndarray
    smooth_hits: np.ndarray
    logit_scales: tuple[float, ...] = ()
    inverse_temperature: float = 1.0

    @property
    def hits(self) -> np.ndarray:
        """(queries, len(GUESSES)), see `hits_of`."""
        return hits_of(self.ranks)

    def of(self, mask: np.ndarray) -> "Evaluation":
        """That of the queries where `mask`, (queries,) bool, is true."""
        return replace(self, **{name: getattr(self, name)[mask] for name in ("top", "ranks", "losses", "smooth_hits")})


def evaluate_predictions(log_probabilities: torch.Tensor | Iterable[torch.Tensor], truth: np.ndarray) -> Evaluation:
    """Compare log-probabilities with the (queries,) true classes, -1 for one that the bank lacks.

    Equal log-probabilities are ranked in the order of the classes, as the kernel ranks them.

    Args:
        log_probabilities: (queries, classes), or chunks of it, of which only one is in memory at a time.
    """
    chunks = [log_probabilities] if isinstance(log_probabilities, torch.Tensor) else log_probabilities
    rest = torch.tensor(truth)

    def compare(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal rest
        target, rest = rest[: len(scores)], rest[len(scores) :]
        own, top = scores.gather(1, target.clamp(min=0)[:, None]), largest(scores, max(GUESSES) + 1)
        is_own = top == target[:, None]
        ranks = torch.where(target < 0, scores.shape[1], is_own.long().argmax(dim=1))
        below = torch.nonzero(~is_own.any(dim=1) & (target >= 0))[:, 0]
        if len(below):  # only they need a comparison with all scores, which is slow
            others, mark = scores[below], own[below]
            is_true = torch.empty_like(others)  # as numbers, of which torch adds up a row in a tenth of the time
            ranks[below] = torch.gt(others, mark, out=is_true).sum(dim=1).long()
            tied = torch.nonzero(torch.eq(others, mark, out=is_true).sum(dim=1) > 1)[:, 0]
            is_before = torch.arange(scores.shape[1]) < target[below][tied, None]
            ranks[below[tied]] += ((others[tied] == mark[tied]) & is_before).sum(dim=1)
        losses = torch.where(target < 0, torch.nan, -own[:, 0].double())
        hits = smooth_hits(own, scores.gather(1, top), ranks).masked_fill(target[:, None] < 0, 0)
        return top[:, : max(GUESSES)], ranks, losses, hits

    parts = map(compare, chain.from_iterable(chunk.split(QUERIES) for chunk in chunks))
    return Evaluation(*(each.numpy() for each in collect_rows(len(truth), parts)))


def smooth_hits(own: torch.Tensor, largest_scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """(queries, len(GUESSES)) float64; see `Evaluation`.

    A step at the k-th place becomes a sigmoid of the difference to it, as in the surrogate of Recall@k of Patel et al.
    2022 (https://arxiv.org/abs/2108.11179).

    Args:
        own: (queries, 1) log-probability of the true class.
        largest_scores: (queries, 11) the largest of all classes, that of the true class may be among them.
        ranks: (queries,) of the true class.
    """
    hits = torch.ones(len(own), len(GUESSES), dtype=torch.float64)
    for column, count in enumerate(GUESSES):
        if count < largest_scores.shape[1]:  # without its own score, the k-th is the next one
            others = torch.where(ranks < count, largest_scores[:, count], largest_scores[:, count - 1])
            hits[:, column] = (own[:, 0] - others).double().sigmoid()
    return hits

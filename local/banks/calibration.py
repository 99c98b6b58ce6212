"""Calibrate probabilities: the logit scale of a classifier, and the temperature of a whole prediction."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from kernel.bank import Bank, log_softmax_
from local.banks.estimators import rescale

# Multiples of the logit scale that a matcher was fitted at; 1 comes first, and stays unless another is better.
LOGIT_SCALE_FACTORS = 2.0 ** np.array(sorted(np.arange(-3, 4.5, 0.5), key=abs))


def sharpen_(log_probabilities: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    """(queries, classes) log-probabilities at another temperature, in the same memory."""
    return log_softmax_(log_probabilities.mul_(inverse_temperature))


def fit_inverse_temperature(log_probabilities: torch.Tensor, truth: np.ndarray, weights: np.ndarray) -> float:
    """The factor of a run's log-probabilities with the lowest log-loss on queries, as of `fit_logit_scale`.

    A logit scale is that of one classifier before transduction, which moves prototypes towards the queries and so makes
    the same logits larger. Mixtures with nearest neighbours and with metadata change the temperature too. This factor
    corrects all of that, and leaves the order of the classes as it is.

    One more query counts, whose true class is the second guess, with the average probability of all second guesses: the
    rule of succession. Without it, no temperature would be low enough where all first guesses are right.

    Args:
        log_probabilities: (queries, classes).
        truth: (queries,); those of classes that the bank lacks, -1, do not count.
        weights: (queries,), not negative.

    Returns:
        1 where no query counts.
    """
    is_counted = (truth >= 0) & (weights > 0)
    if not is_counted.any():
        return 1.0
    logits, target = log_probabilities[torch.from_numpy(is_counted)], torch.tensor(truth[is_counted])
    own = torch.from_numpy(weights[is_counted] / weights[is_counted].mean())
    second = logits.topk(min(2, logits.shape[1]), dim=1).values[:, -1]

    def loss(log_factor: float) -> float:
        factor = float(np.exp(log_factor))
        total = (factor * logits).logsumexp(dim=1)
        losses = total - factor * logits.gather(1, target[:, None])[:, 0]
        return (own @ losses.double() + (own @ (total - factor * second).double()) / len(own)).item()

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 2), method="bounded", options={"xatol": 0.01}).x))


def fit_logit_scale(
    folds: Sequence[Sequence[Bank]],
    log_priors: Sequence[torch.Tensor],
    queries: Sequence[torch.Tensor],
    truth: np.ndarray,
) -> float:
    """The inverse temperature with the lowest log-loss (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        folds: the banks of each fold, whose probabilities are averaged, all at the logit scale of their fit.
        log_priors: (classes,) per fold, added to the logits at any logit scale.
        queries: (queries of the fold, features) per fold.
        truth: (queries,) fold after fold; -1 for a class that no bank has.
    """
    similarities = [
        [bank.similarities(bank.transform(own)) for bank in banks] for banks, own in zip(folds, queries, strict=True)
    ]
    targets = torch.tensor(truth).split([len(own) for own in queries])

    def loss(logit_scale: float) -> float:
        parts = []
        for banks, log_prior, own, target in zip(folds, log_priors, similarities, targets, strict=True):
            scaled = [rescale(bank, logit_scale) for bank in banks]
            scaled = [replace(bank, bias=bank.bias + log_prior) for bank in scaled]
            each = [bank.log_probabilities(one) for bank, one in zip(scaled, own, strict=True)]
            mean = each[0] if len(each) == 1 else torch.stack(each).logsumexp(0)
            parts.append(mean[target >= 0].gather(1, target[target >= 0, None]))
        return -torch.cat(parts).mean().item()

    return min((float(folds[0][0].logit_scale) * LOGIT_SCALE_FACTORS).tolist(), key=loss)

"""Whether a run's probabilities mean what they say."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from local.report.closeup import Closeup
from local.report.evidence import Evidence
from local.report.scores import Estimate, mean

BINS = 10  # of confidence
STEPS = 50  # points of a curve
FIVE = 5  # guesses
AGREEMENTS = (1.0, 0.75, 0.5, 0.0)  # the lower bound of each group


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence: from `start`, over 1 / BINS."""

    start: float
    observations: int
    confidence: float
    right: Estimate


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error (Guo et al. 2017).

    Attributes:
        error: overestimates the error of few observations.
        chance: the 95th percentile of the error of a perfectly calibrated run on as many observations.
        confidence, right: the mean probability, and the fraction of right answers.
    """

    error: float
    chance: float
    confidence: float
    right: float
    bins: list[Bin]


@dataclass(frozen=True)
class Temperature:
    """The divisor of the log-probabilities that gives the smallest log-loss, that loss, and the present one."""

    value: float
    log_loss: float
    log_loss_now: float


@dataclass(frozen=True)
class RiskPoint:
    """The fraction of wrong answers if only those of at least this confidence are given."""

    coverage: float
    risk: float
    confidence: float


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve (Geifman and El-Yaniv 2017), and the area under it."""

    area: float
    points: list[RiskPoint]


@dataclass(frozen=True)
class AgreementRecalls:
    """Recalls of observations by the fraction of views that agree: `least` or more, up to the row before."""

    least: float
    observations: int
    recall_at_1: Estimate
    recall_at_5: Estimate


@dataclass(frozen=True)
class Trust:
    """The calibration of the first guess, and of five guesses together.

    Attributes:
        five_expected, five_observed: how often five guesses should contain the true class, and how often they do.
    """

    first: Calibration
    five: Calibration
    five_expected: Estimate
    five_observed: Estimate
    best_temperature: Temperature
    risk_coverage: RiskCoverage
    agreement: list[AgreementRecalls]


def measure_trust(evidence: Evidence, closeup: Closeup) -> Trust:
    """Calibration, risk by coverage, and the recalls by the agreement of views."""
    outcome, probabilities = evidence.outcome, evidence.probabilities
    first = probabilities.max(axis=1)
    five = np.take_along_axis(probabilities, outcome.top[:, :FIVE], axis=1).sum(axis=1)
    is_first, is_in_five = outcome.ranks < 1, outcome.ranks < FIVE
    return Trust(
        first=calibrate(first, is_first),
        five=calibrate(five, is_in_five),
        five_expected=mean(five),
        five_observed=mean(is_in_five),
        best_temperature=best_temperature(evidence),
        risk_coverage=risk_coverage(first, is_first),
        agreement=recalls_by_agreement(closeup.agreement, is_first, is_in_five),
    )


def calibrate(confidence: np.ndarray, is_right: np.ndarray) -> Calibration:
    """The calibration of (answers,) probabilities, over bins of equal width."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)

    def error(hits: np.ndarray) -> np.ndarray:
        gaps = [np.bincount(bins, row - confidence, minlength=BINS) for row in np.atleast_2d(hits)]
        return np.abs(gaps).sum(axis=1) / len(confidence)

    rng = np.random.default_rng(0)
    chance = error(rng.random((200, len(confidence))) < confidence)
    rows = [
        Bin(index / BINS, int(own.sum()), float(confidence[own].mean()), proportion(is_right[own]))
        for index in np.unique(bins).tolist()
        for own in [bins == index]
    ]
    error_now, at_chance = float(error(is_right)[0]), float(np.percentile(chance, 95))
    return Calibration(error_now, at_chance, float(confidence.mean()), float(is_right.mean()), rows)


def proportion(hits: np.ndarray) -> Estimate:
    """A proportion with its Wilson interval, which suits the few observations of a bin better than a bootstrap."""
    bounds = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return Estimate(float(hits.mean()), float(bounds.low), float(bounds.high))


def best_temperature(evidence: Evidence) -> Temperature:
    """The temperature with the smallest log-loss, over the observations whose class is in the bank."""
    known = np.isfinite(evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth])
    logits, truth = torch.tensor(evidence.log_probabilities[known]), torch.tensor(evidence.truth[known])

    def loss(log_temperature: float) -> float:
        scaled = logits / float(np.exp(log_temperature))
        return torch.nn.functional.cross_entropy(scaled, truth).item()

    best = minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 0.01})
    return Temperature(float(np.exp(best.x)), float(best.fun), loss(0.0))


def risk_coverage(confidence: np.ndarray, is_right: np.ndarray) -> RiskCoverage:
    """The risk-coverage curve of (answers,) probabilities, at STEPS points."""
    order = np.argsort(-confidence, kind="stable")
    risk = np.cumsum(~is_right[order]) / np.arange(1, len(order) + 1)
    ends = np.unique(np.linspace(1, len(order), STEPS).astype(int))
    points = [
        RiskPoint(float(end / len(order)), float(risk[end - 1]), float(confidence[order[end - 1]])) for end in ends
    ]
    return RiskCoverage(float(risk.mean()), points)


def recalls_by_agreement(agreement: np.ndarray, is_first: np.ndarray, is_in_five: np.ndarray) -> list[AgreementRecalls]:
    """The recalls of the observations of each group of AGREEMENTS."""
    rows, above = [], np.inf
    for least in AGREEMENTS:
        own = (agreement >= least) & (agreement < above)
        above = least
        if own.any():
            rows.append(AgreementRecalls(least, int(own.sum()), mean(is_first[own]), mean(is_in_five[own])))
    return rows

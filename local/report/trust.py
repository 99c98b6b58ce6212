"""Whether a run's probabilities mean what they say."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from local.report.evidence import Evidence
from local.report.scores import Estimate, GroupRecalls, recalls_by

BINS = 10  # of confidence
STEPS = 50  # points of a curve
FIVE = 5  # guesses
ALL_VIEWS = "all of them"
# By name, the lower bound of each group of observations.
AGREEMENTS = {
    ALL_VIEWS: 1.0,
    "75\N{NO-BREAK SPACE}% or more": 0.75,
    "50\N{NO-BREAK SPACE}% or more": 0.5,
    "less than half": 0.0,
}


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
class RiskCoverage:
    """The risk-coverage curve (Geifman and El-Yaniv 2017), and the area under it.

    Attributes:
        points: (coverage, risk, confidence): the fraction of wrong answers, the risk, if only the answers of at least
            this confidence are given, which are the fraction `coverage` of all.
    """

    area: float
    points: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Trust:
    """The calibration of the first guess, and of five guesses together.

    Attributes:
        agreement: the recalls by the fraction of an observation's views that alone give its first guess.
    """

    first: Calibration
    five: Calibration
    best_temperature: Temperature
    risk_coverage: RiskCoverage
    agreement: list[GroupRecalls]


def measure_trust(evidence: Evidence) -> Trust:
    ranks, probabilities = evidence.outcome.ranks, evidence.probabilities
    first = probabilities.max(axis=1)
    five = np.take_along_axis(probabilities, evidence.outcome.top[:, :FIVE], axis=1).sum(axis=1)
    agreements = [
        next((name for name, least in AGREEMENTS.items() if own >= least), None) for own in evidence.agreement.tolist()
    ]
    return Trust(
        first=calibrate(first, ranks < 1),
        five=calibrate(five, ranks < FIVE),
        best_temperature=best_temperature(evidence),
        risk_coverage=risk_coverage(first, ranks < 1),
        agreement=recalls_by(ranks, agreements, list(AGREEMENTS)),
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
    points = zip(ends / len(order), risk[ends - 1], confidence[order[ends - 1]], strict=True)
    return RiskCoverage(float(risk.mean()), [tuple(map(float, point)) for point in points])

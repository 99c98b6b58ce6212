"""Whether a run's probabilities mean what they say."""

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from local.base.metrics import bounded
from local.report.closeup import Closeup
from local.report.evidence import Evidence

BINS = 10  # of confidence
STEPS = 50  # points of a curve
COVERAGE = 5  # guesses
AGREEMENTS = (1.0, 0.75, 0.5, 0.0)  # lower bounds of what is told together


def trust(evidence: Evidence, closeup: Closeup) -> dict:
    """Calibration of the first guess and of the five, risk by coverage, and what the views' agreement is worth."""
    outcome, probabilities = evidence.outcome, evidence.probabilities
    first = probabilities.max(axis=1)
    five = np.take_along_axis(probabilities, outcome.top[:, :COVERAGE], axis=1).sum(axis=1)
    right, among = outcome.places < 1, outcome.places < COVERAGE
    return {
        "first": calibration(first, right),
        "five": calibration(five, among),
        "five_expected": bounded(five),
        "five_observed": bounded(among.astype(float)),
        "best_temperature": best_temperature(evidence),
        "risk_coverage": risk_coverage(first, right),
        "agreement": by_agreement(closeup.agreement, right, among),
    }


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict:
    """The expected calibration error (Guo et al. 2017) over bins of equal width, and each bin's share of right answers.

    The error is biased upwards by the bins' own chance; `chance` is what a calibrated run would show on as many.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)

    def error(hits: np.ndarray) -> np.ndarray:
        gaps = [np.bincount(bins, row - confidence, minlength=BINS) for row in np.atleast_2d(hits)]
        return np.abs(gaps).sum(axis=1) / len(confidence)

    rng = np.random.default_rng(0)
    chance = error(rng.random((200, len(confidence))) < confidence)
    return {
        "error": float(error(right)[0]),
        "chance": float(np.percentile(chance, 95)),
        "confidence": float(confidence.mean()),
        "right": float(right.mean()),
        "bins": [
            {
                "from": number / BINS,
                "observations": int((bins == number).sum()),
                "confidence": float(confidence[bins == number].mean()),
                "right": proportion(right[bins == number]),
            }
            for number in np.unique(bins)
        ],
    }


def proportion(hits: np.ndarray) -> dict:
    """The share that is true with its interval (Wilson 1927): of a bin's few resampling would know too little."""
    bounds = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"value": float(hits.mean()), "low": float(bounds.low), "high": float(bounds.high)}


def best_temperature(evidence: Evidence) -> dict:
    """By what to divide the log-probabilities for the least log-loss, and that loss."""
    known = np.isfinite(evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth])
    logits, truth = torch.tensor(evidence.log_probabilities[known]), torch.tensor(evidence.truth[known])

    def loss(log_temperature: float) -> float:
        scaled = logits / float(np.exp(log_temperature))
        return torch.nn.functional.cross_entropy(scaled, truth).item()

    best = minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 0.01})
    return {"value": float(np.exp(best.x)), "log_loss": float(best.fun), "log_loss_now": loss(0.0)}


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict:
    """The share of wrong answers among the surest ones, by how many are answered (Geifman and El-Yaniv 2017)."""
    sure = np.argsort(-confidence, kind="stable")
    risk = np.cumsum(~right[sure]) / np.arange(1, len(sure) + 1)
    ends = np.unique(np.linspace(1, len(sure), STEPS).astype(int))
    return {
        "area": float(risk.mean()),
        "points": [
            {
                "coverage": float(end / len(sure)),
                "risk": float(risk[end - 1]),
                "confidence": float(confidence[sure[end - 1]]),
            }
            for end in ends
        ],
    }


def by_agreement(agreement: np.ndarray, right: np.ndarray, among: np.ndarray) -> list[dict]:
    """How often answers are right by the share of a photo's views that vote alike."""
    rows, above = [], np.inf
    for least in AGREEMENTS:
        chosen = (agreement >= least) & (agreement < above)
        above = least
        if chosen.any():
            rows.append(
                {
                    "least": least,
                    "observations": int(chosen.sum()),
                    "recall_at_1": bounded(right[chosen].astype(float)),
                    "recall_at_5": bounded(among[chosen].astype(float)),
                }
            )
    return rows

"""The temperature of a prediction is that of the lowest log-loss."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss

from local.banks.calibration import fit_inverse_temperature


def test_the_temperature_of_all_predictions_is_that_of_the_lowest_log_loss_with_one_more_wrong_guess():
    rng = np.random.default_rng(0)
    logits, truth, weights = 8 * rng.normal(size=(60, 5)), rng.integers(0, 5, 60), rng.uniform(0, 2, 60)
    logits[np.arange(60), truth] += 8
    weights[:5], truth[5:8] = 0, -1  # of classes that the bank lacks
    found = fit_inverse_temperature(torch.tensor(logits).log_softmax(dim=1), truth, weights)
    rows = (weights > 0) & (truth >= 0)
    second = np.argsort(logits, axis=1)[:, -2]

    def loss(factor: float) -> float:
        sharp, own = softmax(factor * logits[rows], axis=1), {"labels": range(5), "sample_weight": weights[rows]}
        return rows.sum() * log_loss(truth[rows], sharp, **own) + log_loss(second[rows], sharp, **own)

    assert found == pytest.approx(min(np.exp(np.arange(-4, 2, 0.01)), key=loss), rel=0.02)
    assert found < 0.9


@pytest.mark.parametrize("count", [1, 9, 99])
def test_where_all_guesses_are_right_the_next_one_is_wrong_by_the_rule_of_succession(count):
    log_probabilities = torch.tensor([[100.0, 0.0]] * count).log_softmax(dim=1)
    truth, weights = np.zeros(count, dtype=int), np.ones(count)
    found = fit_inverse_temperature(log_probabilities / 20, truth, weights)
    wrong = (found * log_probabilities / 20).softmax(dim=1)[0, 1].item()
    assert wrong == pytest.approx(1 / (count + 1), rel=0.05)

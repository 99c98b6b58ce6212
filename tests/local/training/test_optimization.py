"""Parameters are updated by the recipe's optimizer and schedule, and a resumed optimizer continues exactly."""

import math

import pytest
import torch

from local.recipes.settings import OptimSettings
from local.training.optimization import MOMENTUM, Optimization

STEPS = 20


def make(parameter, steps=STEPS, larger_is_better=True, scores=(), **settings):
    settings = OptimSettings(**{"learning_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0, **settings})
    groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}]
    return Optimization(groups, settings, steps, torch.device("cpu"), larger_is_better, scores)


def step(optimization, parameter, number):
    optimization.backward((parameter**2 * torch.arange(4.0)).sum())
    optimization.step(number)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_an_optimizer_continues_where_it_was(optimizer):
    weights = []
    for stops in (False, True):
        parameter = torch.nn.Parameter(torch.ones(4))
        optimization = make(parameter, optimizer=optimizer)
        for number in range(1, 7):
            if stops and number == 4:
                tensors = optimization.tensors()
                optimization = make(parameter, optimizer=optimizer)
                optimization.load_tensors(tensors)
            step(optimization, parameter, number)
        weights.append(parameter.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.ones(4))


def rates(**settings):
    """The learning rate of every step."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimization, found = make(parameter, **settings), []
    for number in range(1, STEPS + 1):
        step(optimization, parameter, number)
        found.append(optimization.learning_rate)
    return found


def test_the_cosine_rises_linearly_to_its_peak_and_falls_to_zero():
    rise = [0.1 * number / 4 for number in range(1, 4)]
    fall = [0.05 * (1 + math.cos(math.pi * number / 16)) for number in range(17)]
    assert rates(warmup=0.2) == pytest.approx(rise + fall)


def test_a_constant_learning_rate_rises_linearly_and_stays():
    assert rates(warmup=0.2, schedule="constant") == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 17)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_plateau_reduces_the_learning_rate_also_when_resumed(sign):
    """Three epochs without a better score, with a patience of two, of which some are trained before resuming."""
    scores = [sign * score for score in (0.5, 0.4, 0.4, 0.4)]
    settings = {"schedule": "plateau", "plateau_factor": 0.2, "plateau_patience": 2, "larger_is_better": sign > 0}
    for resumed in range(5):
        optimization = make(torch.nn.Parameter(torch.ones(4)), scores=scores[:resumed], **settings)
        for number, score in enumerate(scores[resumed:], resumed + 1):
            assert optimization.learning_rate == pytest.approx(0.1), number
            optimization.end_epoch(score)
        assert optimization.learning_rate == pytest.approx(0.02)


def test_a_gradient_is_clipped_to_its_norm():
    parameter = torch.nn.Parameter(torch.ones(4))
    step(make(parameter, optimizer="sgd", grad_clip_norm=0.5), parameter, 0)
    change = torch.ones(4) - parameter.detach()
    # timm's SGD has Nesterov's momentum, which adds the gradient to the first step twice.
    assert change.norm().item() == pytest.approx(0.1 * (1 + MOMENTUM) * 0.5, rel=1e-4)
    assert torch.allclose(change / change.norm(), torch.arange(4.0) / torch.arange(4.0).norm())

"""How much of a training is kept is decided by validation, by more than chance, and said with its reason."""

import numpy as np
import pytest
import timm
import torch

from local.training.adaptation import copy_state
from local.training.evaluation import Evaluation
from local.training.mixing import choose_mix_ratio, describe_choice, interpolate_weights


def evaluation_with(correct, of=200):
    """An evaluation in which the first `correct` observations are hits."""
    return Evaluation(None, np.repeat((np.arange(of) < correct)[:, None].astype(float), 3, axis=1), {})


@pytest.mark.parametrize(
    ("correct", "mix_ratio"),
    [
        ([100, 110, 130, 120, 90], 0.5),
        ([100, 130, 130, 120, 90], 0.25),  # of equals the nearest to the encoder before training
        ([100, 90, 80, 70, 120], 1.0),
        ([100, 100, 90, 80, 70], 0.0),
        ([100, 101, 101, 100, 100], 0.0),  # one hit is within its standard error
    ],
)
def test_the_best_ratio_is_chosen_where_it_gains_more_than_chance(correct, mix_ratio):
    assert choose_mix_ratio([evaluation_with(count) for count in correct]) == mix_ratio


@pytest.mark.parametrize("of", [1, 2])
def test_a_gain_on_a_single_observation_keeps_nothing(of):
    evaluations = [evaluation_with(correct, of) for correct in (0, 1, 1, 1, 1)]
    assert choose_mix_ratio(evaluations) == 0.0


@pytest.mark.parametrize(
    ("correct", "of", "says"),
    [
        # 30 of 200 become correct: a gain of .15, with the standard error of a proportion, sqrt(.15 * .85 / 199).
        (
            [100, 110, 130, 120, 90],
            200,
            "kept: 50% of the weights of epoch 3, which gains +0.150 ± 0.025 over the encoder before",
        ),
        (
            [100, 100, 101, 90, 90],
            200,
            "unchanged: 50% of the weights of epoch 3 gain +0.005 ± 0.005, no more than the standard error",
        ),
        ([100, 80, 90, 70, 60], 200, "unchanged: no mixture with epoch 3 is better; the best, 50%, gains -0.050"),
        (
            [0, 0, 1, 0, 0],
            1,
            "unchanged: 50% of the weights of epoch 3 gain +1.000, without a standard error to compare",
        ),
    ],
)
def test_what_is_kept_of_a_training_is_said_with_its_reason(correct, of, says, recwarn):
    evaluations = [evaluation_with(count, of) for count in correct]
    mix_ratio = choose_mix_ratio(evaluations)
    assert mix_ratio == (0.5 if says.startswith("kept: 50%") else 0.0)
    line = describe_choice(evaluations, mix_ratio, 3)
    assert says in line
    assert f"in the mean of Recall@1, 5 and 10 over {of} validation observation" in line
    assert not list(recwarn)


def test_interpolated_weights_are_on_the_line_between_two_encoders():
    module = timm.create_model("test_resnet", num_classes=0)
    before, after = copy_state(module), {}
    for name, value in before.items():
        after[name] = value + torch.randn_like(value) if value.is_floating_point() else value + 7
    for ratio in (0.0, 0.25, 1.0):
        mixed = interpolate_weights(before, after, ratio)
        assert mixed.keys() == before.keys()
        for name, value in mixed.items():
            if value.is_floating_point():
                assert torch.allclose(value, (1 - ratio) * before[name] + ratio * after[name], atol=1e-5)
            else:  # a count of batches has no mean
                assert torch.equal(value, after[name] if ratio else before[name])

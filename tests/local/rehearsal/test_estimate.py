"""The time on Kaggle's GPUs is estimated from the operations of the encoders."""

from dataclasses import replace

import pytest
import timm
from torch import nn

from local.rehearsal.estimate import CARDS, DECODED, SPEED, count_operations, estimate_on_t4, seconds_per_view
from tests.manifests import manifest


def test_the_operations_are_those_of_a_convolution_worked_by_hand():
    # 8 x 8 positions, 4 filters of 3 x 3 x 3 weights, a multiplication and an addition each
    assert count_operations(nn.Conv2d(3, 4, 3), 10) == 8 * 8 * 4 * 27 * 2


def test_the_operations_of_a_vision_transformer_are_the_published_ones():
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert count_operations(module, 224) == pytest.approx(2 * 1.26e9, rel=0.15)  # 1.26 GMACs with attention


def test_the_estimate_is_the_slower_of_decoding_and_forward_passes():
    made = manifest()
    [one] = made.members
    each = seconds_per_view(one)
    assert each > 0
    assert each * len(one.views) < 1 / DECODED  # a tiny encoder
    said = estimate_on_t4(made, round(DECODED * 60), 43200.0)
    assert "would take about 1:00; the limit is 12:00:00" in said
    assert "(estimated)" in said
    assert "there is time for 45%; the limit is 0:30" in estimate_on_t4(made, round(DECODED * 60), 30.0)
    [encoder] = one.encoders
    full = replace(one, encoders=(replace(encoder, precision="full"),))
    assert seconds_per_view(full) == pytest.approx(each * SPEED["half"] / SPEED["full"])
    assert CARDS == 2

"""An error in the scored rerun costs only what is not done yet, and the same work is not done twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernel.__main__ as story
from kernel.__main__ import embed_test_set
from kernel.budget import UNLIMITED
from kernel.encoders import open_encoder
from kernel.inputs import InputError
from kernel.manifest import Weights, read_weights
from kernel.observations import find_test_table
from kernel.start import Setup


@pytest.mark.parametrize("is_rerun", [False, True])
def test_a_member_that_cannot_be_opened_leaves_the_predictions_to_those_before_it(trained, drawn, capsys, is_rerun):
    weights = read_weights(trained)
    (member,) = weights.manifest.members
    [spec] = member.encoders
    other = replace(member, encoders=(replace(spec, architecture="test_vit"),))  # which the weights do not fit
    both = Weights(trained, replace(weights.manifest, members=(member, other)))
    setup = Setup(both, find_test_table(drawn.competition), UNLIMITED, Path("unused"), is_rerun)
    if not is_rerun:
        with pytest.raises(InputError, match="does not fit test_vit"):
            embed_test_set(setup)
        return
    (found,), _ = embed_test_set(setup)
    (expected,), _ = embed_test_set(replace(setup, weights=weights))
    assert torch.equal(found.values, expected.values)
    assert "predicting without test_vit" in capsys.readouterr().out


def test_members_share_the_embeddings_of_an_encoder_and_its_views(trained, drawn, monkeypatch):
    weights, opened = read_weights(trained), []
    (member,) = weights.manifest.members
    assert len(member.views) > 1
    members = (member, replace(member, views=member.views[:1]), replace(member, weight=0.5))
    several = Weights(trained, replace(weights.manifest, members=members))
    monkeypatch.setattr(story, "open_encoder", lambda *args: opened.append(args) or open_encoder(*args))
    setup = Setup(several, find_test_table(drawn.competition), UNLIMITED, Path("unused"), False)
    first, fewer, again = embed_test_set(setup)[0]
    assert len(opened) == 2
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, fewer.values)

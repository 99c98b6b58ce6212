"""In the scored rerun, what goes wrong late costs what is not done yet, and nothing that is."""

import math
from dataclasses import replace

import pytest
import torch

import kernel.__main__ as story
from kernel.budget import Budget
from kernel.inputs import InputError
from kernel.manifest import Weights, read_weights
from kernel.observations import find_test_table


@pytest.mark.parametrize("is_rerun", [False, True])
def test_a_member_that_cannot_be_opened_leaves_the_answer_to_those_before_it(
    trained, drawn, monkeypatch, capsys, is_rerun
):
    weights = read_weights(trained)
    (member,) = weights.manifest.members
    other = replace(member, encoder=replace(member.encoder, architecture="test_vit"))  # which the weights do not fit
    both = Weights(trained, replace(weights.manifest, members=(member, other)))
    table, budget = find_test_table(drawn.competition), Budget(math.inf, 0.0)
    monkeypatch.setattr(story, "IS_RERUN", is_rerun)
    if not is_rerun:
        with pytest.raises(InputError, match="does not fit test_vit"):
            story.embed_members(both, table, budget)
        return
    (found,) = story.embed_members(both, table, budget)
    (expected,) = story.embed_members(weights, table, budget)
    assert torch.equal(found.values, expected.values)
    assert "is left out, and what comes after it" in capsys.readouterr().out

"""In the scored rerun, what goes wrong late costs what is not done yet, and nothing that is."""

import copy
import math

import pytest
import torch

import kernel.__main__ as story
from kernel.budget import Budget
from kernel.inputs import InputError, Weights, read_weights
from kernel.observations import find_test_table


@pytest.mark.parametrize("is_rerun", [False, True])
def test_a_member_that_cannot_be_opened_leaves_the_answer_to_those_before_it(
    trained, drawn, monkeypatch, capsys, is_rerun
):
    weights = read_weights(trained)
    manifest = copy.deepcopy(weights.manifest)
    manifest["members"] += copy.deepcopy(manifest["members"])
    manifest["members"][1]["encoder"]["architecture"] = "test_vit"  # which the weights do not fit
    table, budget = find_test_table(drawn.competition, manifest), Budget(math.inf, 0.0)
    monkeypatch.setattr(story, "IS_RERUN", is_rerun)
    if not is_rerun:
        with pytest.raises(InputError, match="does not fit test_vit"):
            story.embed_members(Weights(trained, manifest), table, budget)
        return
    (found,) = story.embed_members(Weights(trained, manifest), table, budget)
    (expected,) = story.embed_members(weights, table, budget)
    assert torch.equal(found.values, expected.values)
    assert "is left out, and what comes after it" in capsys.readouterr().out

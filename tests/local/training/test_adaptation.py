"""The recipe says which parameters of an encoder are trained, and how fast."""

import pytest
import timm
import torch
from torch import nn

from local.recipes.settings import OptimSettings
from local.training.adaptation import (
    add_low_rank_updates,
    copy_state,
    group_by_layer,
    set_training_mode,
    unfreeze,
)


@pytest.fixture
def module():
    """A tiny encoder of its own for each test, since these change it."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0).eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def tiny_transformer():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).eval()


def tiny_tower():
    from open_clip.model import _build_vision_tower

    torch.manual_seed(0)
    vision = {"image_size": 160, "layers": 3, "width": 64, "patch_size": 32, "head_width": 32}
    return _build_vision_tower(24, vision).eval()


ARCHITECTURES = [tiny_transformer, tiny_tower, lambda: timm.create_model("test_resnet", num_classes=0).eval()]


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_low_rank_updates_start_at_zero_and_merge_exactly(make):
    module, photos = make(), torch.randn(2, 3, 160, 160)
    before = module(photos)
    unfreeze(module, -1)
    add_low_rank_updates(module, 2)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.endswith((".up", ".down")) for name in trainable)
    assert torch.allclose(module(photos), before, atol=1e-6)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1)
    moved = module(photos)
    assert not torch.allclose(moved, before, atol=1e-3)
    merged = make()
    merged.load_state_dict(copy_state(module))
    assert torch.allclose(merged(photos), moved, atol=1e-5)  # attention takes another path where nothing learns


def test_low_rank_updates_are_in_the_last_groups_alone():
    module = tiny_transformer()
    unfreeze(module, 2)
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    add_low_rank_updates(module, 2)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trainable
    assert {name.split(".parametrizations.")[0] for name in trainable} <= {name.rsplit(".", 1)[0] for name in expected}


@pytest.mark.parametrize("make", ARCHITECTURES)
@pytest.mark.parametrize("rank", [0, 2])
def test_lower_layers_have_a_smaller_learning_rate(make, rank):
    module = make()
    unfreeze(module, -1)
    if rank:
        add_low_rank_updates(module, rank)
    groups = group_by_layer(module, OptimSettings(layer_decay=0.5, learning_rate=1.0))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    in_order = [rates[id(parameter)] for parameter in module.parameters() if parameter.requires_grad]
    assert len(rates) == len(in_order)
    assert min(in_order) == in_order[0] < 0.5
    assert max(in_order) == in_order[-1] == 1.0


def test_without_layer_decay_all_layers_have_the_same_learning_rate(module):
    unfreeze(module, -1)
    assert {group["lr"] for group in group_by_layer(module, OptimSettings())} == {OptimSettings().learning_rate}


def test_only_the_last_groups_are_trained(module):
    trainable = unfreeze(module, 1)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert 0 < len(trainable) < len(list(module.parameters()))
    assert len(names) == len(trainable)
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in names)
    assert len(unfreeze(module, 2)) > len(trainable)
    assert len(unfreeze(module, -1)) == len(list(module.parameters()))
    assert unfreeze(module, 0) == []


def test_only_the_last_groups_of_an_open_clip_tower_are_trained():
    tower = tiny_tower()
    unfreeze(tower, 2)
    names = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert "proj" in names
    assert any(name.startswith("transformer.resblocks.2.") for name in names)
    assert not any(name.startswith(("conv1", "transformer.resblocks.0.", "transformer.resblocks.1.")) for name in names)


def test_a_pretrained_encoder_keeps_its_batch_statistics(module):
    photos = torch.randn(4, 3, 64, 64)
    before = copy_state(module)
    set_training_mode(module, pretrained=True)
    module(photos)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    set_training_mode(module, pretrained=False)
    module(photos)
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_layer_of_two_names_is_copied_under_both_with_its_low_rank_update():
    layer = nn.Linear(8, 8)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    names = set(module.state_dict())
    add_low_rank_updates(module, 2)
    layer.parametrizations.weight[0].up.data.fill_(1.0)
    copied = copy_state(module)
    assert set(copied) == names
    assert torch.equal(copied["0.weight"], layer.weight)
    assert torch.equal(copied["2.weight"], layer.weight)

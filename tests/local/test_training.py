"""Fine-tuning learns what it is told to, and keeps nothing that chance alone could explain."""

import json

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy, normalize

from kernel.encoders import Encoder, Preprocessing
from local.competition import read_competition, split_for_validation
from local.recipe import make_recipe
from local.runs import train_run
from local.training import PrototypicalLoss, copy_state, finetune, set_training, unfreeze, warmup_cosine
from tests.conftest import TINY


@pytest.fixture
def fresh():
    """A tiny encoder of its own for each test, since training changes it."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=0)
    preprocessing = Preprocessing(64, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, "crop")
    return Encoder(module.eval(), preprocessing, module.num_features, [torch.device("cpu")])


@pytest.fixture(scope="module")
def parts(drawn):
    return split_for_validation(read_competition(drawn.competition), 0)


def recipe(**settings):
    return make_recipe({"epochs": 2, "patience": 3, **settings}, "the test")


def test_training_that_gains_nothing_leaves_the_encoder_as_it_came(fresh, parts):
    before = copy_state(fresh.module)
    log, chosen = finetune(fresh, *parts, recipe(learning_rate=1e-12, weight_decay=0.0))
    assert chosen == 0
    assert [row["epoch"] for row in log] == [0, 1, 2]
    assert all(torch.equal(value, before[name]) for name, value in fresh.module.state_dict().items())


def test_training_that_ruins_the_encoder_is_caught(fresh, parts):
    before = copy_state(fresh.module)
    _, chosen = finetune(fresh, *parts, recipe(learning_rate=10.0, unfreeze=-1))
    after = fresh.module.state_dict()
    assert (chosen == 0) == all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.isfinite().all() for value in after.values())


def test_it_stops_when_recall_has_not_risen_for_as_long_as_patience_says(fresh, parts):
    log, _ = finetune(fresh, *parts, recipe(epochs=20, patience=2, learning_rate=1e-12, weight_decay=0.0))
    assert len(log) == 3


def test_only_the_last_groups_learn(fresh):
    learning = unfreeze(fresh.module, 1)
    names = [name for name, parameter in fresh.module.named_parameters() if parameter.requires_grad]
    assert 0 < len(learning) < len(list(fresh.module.parameters()))
    assert len(names) == len(learning)
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in names)
    assert len(unfreeze(fresh.module, 2)) > len(learning)
    assert len(unfreeze(fresh.module, -1)) == len(list(fresh.module.parameters()))
    assert unfreeze(fresh.module, 0) == []


def test_only_the_last_groups_of_an_open_clip_tower_learn():
    from open_clip.model import _build_vision_tower

    vision = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32}
    tower = _build_vision_tower(24, vision)
    unfreeze(tower, 2)
    names = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert "proj" in names
    assert any(name.startswith("transformer.resblocks.2.") for name in names)
    assert not any(name.startswith(("conv1", "transformer.resblocks.0.", "transformer.resblocks.1.")) for name in names)


def test_a_pretrained_encoder_keeps_its_batch_statistics(fresh):
    photos = torch.randn(4, 3, 64, 64)
    before = copy_state(fresh.module)
    set_training(fresh.module, pretrained=True)
    fresh.module(photos)
    assert all(torch.equal(value, before[name]) for name, value in fresh.module.state_dict().items())
    set_training(fresh.module, pretrained=False)
    fresh.module(photos)
    assert any(not torch.equal(value, before[name]) for name, value in fresh.module.state_dict().items())


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_loss_is_cross_entropy_over_squared_distances(pooling):
    torch.manual_seed(0)
    centre, prototypes = torch.randn(6) / 5, normalize(torch.randn(4, 6))
    loss = PrototypicalLoss(centre, prototypes, recipe(temperature=0.5, pooling=pooling))
    photos, owners, targets = normalize(torch.randn(5, 6)), torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3, 1, 0])
    pooled = []
    for owner in range(3):
        own = photos[owners == owner]
        pooled.append(own.mean(dim=0) if pooling == "mean" else own.amax(dim=0))
    embedded = normalize(normalize(torch.stack(pooled)) - centre)
    expected = cross_entropy(-(torch.cdist(embedded, prototypes) ** 2) / 0.5, targets)
    assert torch.allclose(loss(photos, owners, targets), expected, atol=1e-5)


def test_fixed_prototypes_stay_and_learned_ones_move():
    start = (torch.zeros(6), normalize(torch.randn(4, 6)))
    assert not PrototypicalLoss(*start, recipe()).prototypes.requires_grad
    assert PrototypicalLoss(*start, recipe(prototypes="learned")).prototypes.requires_grad


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    factors = np.array([warmup_cosine(step, 100, 0.1) for step in range(100)])
    assert factors.argmax() in (9, 10)
    assert factors.max() == 1
    assert (np.diff(factors[:10]) > 0).all()
    assert (np.diff(factors[10:]) < 0).all()
    assert factors[-1] < 0.01


@pytest.mark.parametrize(("views", "larger"), [(["plain", "larger"], 96), (["plain", "hflip"], 0)])
def test_photos_are_decoded_larger_only_for_a_recipe_with_the_larger_view(drawn, tmp_path, views, larger):
    train_run(make_recipe({**TINY, "epochs": 0, "views": views}, "the test"), drawn.competition, tmp_path / "run")
    member = json.loads((tmp_path / "run" / "manifest.json").read_text())["members"][0]
    assert member["views"] == views
    assert member["encoder"]["preprocessing"]["larger"] == larger

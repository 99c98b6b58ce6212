"""Fine-tuning learns what it is told to, and keeps nothing that chance alone could explain."""

import json

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

from kernel.encoders import Encoder, Preprocessing
from local import training
from local.competition import places_of, read_competition, sort_ids, split_for_validation
from local.recipe import make_recipe
from local.runs import train_run
from local.training import (
    Judged,
    PrototypicalLoss,
    Support,
    add_low_rank,
    choose_share,
    collate,
    copy_state,
    finetune,
    group_by_layer,
    interpolate,
    probe,
    set_training,
    unfreeze,
    warmup_cosine,
)
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


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_that_gains_nothing_leaves_the_encoder_as_it_came(fresh, parts):
    before = copy_state(fresh.module)
    tuning = finetune(fresh, *parts, recipe(learning_rate=1e-12, weight_decay=0.0))
    assert (tuning.epoch, tuning.share) == (0, 0.0)
    assert [row["epoch"] for row in tuning.log] == [0, 1, 2]
    assert same(fresh.module.state_dict(), before)


def test_training_that_ruins_the_encoder_is_caught(fresh, parts):
    before = copy_state(fresh.module)
    tuning = finetune(fresh, *parts, recipe(learning_rate=10.0, unfreeze=-1))
    after = fresh.module.state_dict()
    assert (tuning.share == 0) == same(after, before)
    assert all(value.isfinite().all() for value in after.values())


def test_it_stops_when_recall_has_not_risen_for_as_long_as_patience_says(fresh, parts):
    tuning = finetune(fresh, *parts, recipe(epochs=20, patience=2, learning_rate=1e-12, weight_decay=0.0))
    assert len(tuning.log) == 3


@pytest.mark.parametrize(
    "settings", [{"lora": 2, "ema": 0.9}, {"ema": 0.9}, {"prototypes": "learned", "probe": 1}, {"rand_augment": 5}]
)
def test_every_way_of_learning_leaves_an_encoder_of_the_same_weights_by_name(fresh, parts, settings):
    names = set(fresh.module.state_dict())
    tuning = finetune(fresh, *parts, recipe(epochs=2, unfreeze=-1, learning_rate=1e-3, **settings))
    assert len(tuning.log) == 3
    assert set(fresh.module.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in fresh.module.parameters())


def test_a_linear_probe_moves_the_prototypes_and_leaves_the_encoder_alone(fresh, parts):
    fit, settings = parts[0], recipe(probe=2, prototypes="learned")
    places = torch.tensor(places_of(fit.class_ids, sort_ids(fit.class_ids)))
    start = normalize(torch.randn(int(places.max()) + 1, fresh.features))
    loss = PrototypicalLoss(torch.zeros(fresh.features), start, settings)
    batches = DataLoader(Support(fit.observations, fresh, settings), batch_size=16, collate_fn=collate)
    before = copy_state(fresh.module.requires_grad_(False))
    probe(fresh, loss, batches, places, settings)
    assert same(fresh.module.state_dict(), before)
    assert not torch.equal(loss.prototypes, start)


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
def test_low_rank_additions_start_as_nothing_and_merge_exactly(make):
    module, photos = make(), torch.randn(2, 3, 160, 160)
    before = module(photos)
    unfreeze(module, -1)
    add_low_rank(module, 2)
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(name.endswith((".up", ".down")) for name in learning)
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


def test_low_rank_additions_keep_to_the_last_groups():
    module = tiny_transformer()
    unfreeze(module, 2)
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    add_low_rank(module, 2)
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert learning
    assert {name.split(".parametrizations.")[0] for name in learning} <= {name.rsplit(".", 1)[0] for name in wanted}


@pytest.mark.parametrize("make", ARCHITECTURES)
@pytest.mark.parametrize("rank", [0, 2])
def test_lower_layers_learn_more_slowly(make, rank):
    module = make()
    unfreeze(module, -1)
    if rank:
        add_low_rank(module, rank)
    groups = group_by_layer(module, recipe(layer_decay=0.5, learning_rate=1.0))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    in_order = [rates[id(parameter)] for parameter in module.parameters() if parameter.requires_grad]
    assert len(rates) == len(in_order)
    assert min(in_order) == in_order[0] < 0.5
    assert max(in_order) == in_order[-1] == 1.0


def test_without_layer_decay_all_layers_learn_alike(fresh):
    unfreeze(fresh.module, -1)
    assert {group["lr"] for group in group_by_layer(fresh.module, recipe())} == {recipe().learning_rate}


def test_the_moving_average_is_what_is_judged_and_kept(fresh, parts, monkeypatch):
    """A decay of 1 with no warm-up would never leave the start: here the average lags behind what learns."""
    averages, update = [], ModelEmaV3.update

    def watched(average, module, step):
        update(average, module, step)
        averages.append(copy_state(average.module))

    monkeypatch.setattr(ModelEmaV3, "update", watched)
    monkeypatch.setattr(training, "choose_share", lambda judged: 1.0)
    finetune(fresh, *parts, recipe(epochs=1, unfreeze=-1, learning_rate=1e-2, ema=0.9))
    assert same(fresh.module.state_dict(), averages[-1])


def test_the_ends_of_the_interpolation_are_the_two_encoders(fresh):
    before, after = copy_state(fresh.module), {}
    for name, value in before.items():
        after[name] = value + torch.randn_like(value) if value.is_floating_point() else value + 7
    assert same(interpolate(before, after, 0.0), before)
    assert same(interpolate(before, after, 1.0), after)
    half = interpolate(before, after, 0.5)["conv1.0.weight"]
    assert torch.allclose(half, (before["conv1.0.weight"] + after["conv1.0.weight"]) / 2)


def judged_with(right, of=200):
    """Judgements in which the first `right` observations are hits."""
    return Judged(None, np.repeat((np.arange(of) < right)[:, None].astype(float), 3, axis=1))


@pytest.mark.parametrize(
    ("right", "share"),
    [
        ([100, 110, 130, 120, 90], 0.5),
        ([100, 130, 130, 120, 90], 0.25),  # of equals the nearest to the encoder as it came
        ([100, 90, 80, 70, 120], 1.0),
        ([100, 100, 90, 80, 70], 0.0),
        ([100, 101, 101, 100, 100], 0.0),  # one hit is within its standard error
    ],
)
def test_the_best_share_is_chosen_where_it_gains_more_than_chance(right, share):
    assert choose_share([judged_with(count) for count in right]) == share


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
    tower = tiny_tower()
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

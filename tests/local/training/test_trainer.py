"""Training learns what it is told to, keeps nothing that chance alone could explain, and loses nothing."""

import copy
import math
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from kernel.encoders import Encoder
from kernel.inputs import InputError
from kernel.manifest import Preprocessing
from kernel.tables import TAXONOMY
from local.data.competition import Labelled, read_competition, read_ranks, sort_ids, split_for_validation
from local.recipes.recipe import make_recipe
from local.training import finetuning
from local.training.adaptation import copy_state
from local.training.finetuning import finetune
from local.training.trainer import Stopped, Training


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


RANKS = [0.5] * len(TAXONOMY)


def recipe(**settings):
    return make_recipe({"epochs": 2, "patience": 3, **settings}, "the test")


@pytest.fixture(scope="module")
def ranks(drawn, parts):
    return read_ranks(read_competition(drawn.competition), sort_ids(parts[0].class_ids))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_that_gains_nothing_leaves_the_encoder_as_it_came(fresh, parts, tmp_path):
    before = copy_state(fresh.module)
    tuning = finetune(fresh, *parts, recipe(learning_rate=1e-12, weight_decay=0.0), tmp_path)
    assert (tuning.epoch, tuning.share) == (0, 0.0)
    assert [row["epoch"] for row in tuning.log] == [0, 1, 2]
    assert same(fresh.module.state_dict(), before)


def test_training_that_ruins_the_encoder_is_caught(fresh, parts, tmp_path):
    before = copy_state(fresh.module)
    tuning = finetune(fresh, *parts, recipe(learning_rate=1e4, unfreeze=-1), tmp_path)
    assert (tuning.epoch, tuning.share) == (0, 0.0)
    assert same(fresh.module.state_dict(), before)


def test_it_stops_when_recall_has_not_risen_for_as_long_as_patience_says(fresh, parts, tmp_path, capsys):
    tuning = finetune(fresh, *parts, recipe(epochs=20, patience=2, learning_rate=1e-12, weight_decay=0.0), tmp_path)
    assert len(tuning.log) == 3
    start = np.mean([tuning.log[0][f"recall_at_{count}"] for count in (1, 5, 10)])
    said = capsys.readouterr().out
    assert (
        f"stopping after epoch 2 of 20: the mean of Recall@1, 5 and 10 has not been better than the {start:.3f} of "
        "epoch 0 for 2 epochs (patience)"
    ) in said
    assert said.splitlines()[-1].startswith("chosen: the encoder as it came: ")


WAYS = [
    {
        "lora_rank": 2,
        "ema_decay": 0.9,
        "prototypes": "updated",
        "accumulate": 2,
        "balance": 1.0,
        "optimizer": "sgd",
    },
    {
        **{"prototypes": "learned", "head_only_epochs": 1, "arcface_margin": 0.1, "class_weight_exponent": 0.5},
        **{"rand_augment": 5, "rotate": 20, "translate": 0.1, "hue": 0.1, "erase": 0.5, "ema_decay": 0.9},
    },
    {"prototypes": "episodic", "ways": 5, "schedule": "plateau", "plateau_patience": 0, "optimizer": "adam"},
    {
        **{"prototypes": "learned", "matcher": "head", "hidden_features": 8, "dropout": 0.2, "hidden_dropout": 0.2},
        **{"mixup": 0.4, "cutmix": 1.0, "photos_per_observation": 1, "rank_weights": RANKS, "monitor": "log_loss"},
    },
]


@pytest.mark.parametrize("settings", WAYS)
def test_every_way_of_learning_leaves_an_encoder_of_the_same_weights_by_name(fresh, parts, ranks, tmp_path, settings):
    names = set(fresh.module.state_dict())
    tuning = finetune(fresh, *parts, recipe(epochs=2, unfreeze=-1, learning_rate=1e-3, **settings), tmp_path, ranks)
    assert len(tuning.log) == 3
    assert set(fresh.module.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in fresh.module.parameters())


def test_the_moving_average_is_what_is_judged_and_kept(fresh, parts, tmp_path, monkeypatch):
    """A decay of 1 with no warm-up would never leave the start: here the average lags behind what learns."""
    averages, update = [], ModelEmaV3.update

    def watched(average, module, step):
        update(average, module, step)
        averages.append(copy_state(average.module))

    monkeypatch.setattr(ModelEmaV3, "update", watched)
    monkeypatch.setattr(finetuning, "choose_share", lambda judged: 1.0)
    finetune(fresh, *parts, recipe(epochs=1, unfreeze=-1, learning_rate=1e-2, ema_decay=0.9), tmp_path)
    assert same(fresh.module.state_dict(), averages[-1])


class Interrupted(Training):
    """A training whose process is sent a real SIGTERM during one of its batches."""

    at = math.inf

    def follow(self, *given):
        Interrupted.at -= 1
        if Interrupted.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().follow(*given)


@pytest.mark.parametrize("settings", WAYS)
def test_it_goes_on_bit_for_bit_from_wherever_it_was_stopped(fresh, parts, ranks, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(finetuning, "Training", Interrupted)
    settings = recipe(unfreeze=-1, batch_size=8, learning_rate=1e-3, **settings)
    start, ends = copy_state(fresh.module), []
    for stops in ((), (1, 2, 1)):
        folder = tmp_path / str(len(ends))
        for at in stops:
            Interrupted.at = at
            fresh.module.load_state_dict(start)
            with pytest.raises(Stopped):
                finetune(fresh, *parts, settings, folder, ranks)
        Interrupted.at = math.inf
        fresh.module.load_state_dict(start)
        ends.append((finetune(fresh, *parts, settings, folder, ranks), copy_state(fresh.module)))
    (tuning, state), (other, same_state) = ends
    assert same(state, same_state)
    assert [row["loss"] for row in tuning.log] == [row["loss"] for row in other.log]
    assert tuning.share == other.share


def test_a_damaged_checkpoint_costs_no_more_than_the_time_since_the_one_before(fresh, parts, tmp_path, capsys):
    start = copy_state(fresh.module)
    finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "whole")
    ended = copy_state(fresh.module)
    fresh.module.load_state_dict(start)
    finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "damaged")
    newest = sorted((tmp_path / "damaged").glob("0*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    fresh.module.load_state_dict(start)
    finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "damaged")
    assert "is damaged: going on from the one before" in capsys.readouterr().out
    assert same(copy_state(fresh.module), ended)


def test_a_loss_that_is_no_number_ends_the_training_with_what_was_learnt(fresh, parts, tmp_path, monkeypatch, capsys):
    class Poisoned(Training):
        def follow(self, batch, number, *given):
            if self.epoch == 2:
                batch.photos[:] = 0
                self.head.prototypes.data[:] = math.nan
            return super().follow(batch, number, *given)

    monkeypatch.setattr(finetuning, "Training", Poisoned)
    tuning = finetune(fresh, *parts, recipe(unfreeze=-1, epochs=3), tmp_path)
    assert [row["epoch"] for row in tuning.log] == [0, 1]
    assert "epoch 2, batch 0: the loss is nan" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in fresh.module.state_dict().values())


def test_memory_that_does_not_suffice_is_one_line_and_loses_nothing(fresh, parts, tmp_path, monkeypatch):
    class Cramped(Training):
        def follow(self, batch, number, *given):
            if self.epoch == 2 and self.recipe.train.batch_size > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().follow(batch, number, *given)

    monkeypatch.setattr(finetuning, "Training", Cramped)
    with pytest.raises(InputError, match=re.escape("--resume --set batch_size=4 --set accumulate=2")):
        finetune(fresh, *parts, recipe(unfreeze=-1, batch_size=8), tmp_path)
    tuning = finetune(fresh, *parts, recipe(unfreeze=-1, batch_size=4, accumulate=2), tmp_path)
    assert [row["epoch"] for row in tuning.log] == [0, 1, 2]


class NoRoom(nn.Module):
    """An encoder for which a device has no room: it fails as torch does, once `left` further copies are made."""

    def __init__(self, module, left):
        super().__init__()
        self.module, self.left = module, left

    def forward(self, photos):
        return self.module(photos)

    def group_matcher(self, coarse=False):
        return {"stem": "^module"}

    def __deepcopy__(self, memo):
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 8 GiB")
        return NoRoom(copy.deepcopy(self.module, memo), self.left - 1)


@pytest.mark.parametrize(
    ("copies", "settings", "doing"),
    [
        (0, {}, "copying the encoder"),
        (1, {"ema_decay": 0.9}, "copying the encoder"),
        (1, {"head_only_epochs": 1, "ema_decay": 0.9}, "freeing"),
    ],
)
def test_an_encoder_whose_copy_finds_no_room_is_one_line(fresh, parts, tmp_path, copies, settings, doing):
    fresh.module = NoRoom(fresh.module, copies)
    with pytest.raises(
        InputError, match=f"^the GPU is out of memory while {doing}.*smaller encoder, or train on the CPU"
    ):
        finetune(fresh, *parts, recipe(unfreeze=-1, prototypes="learned", **settings), tmp_path)


def test_an_epoch_that_finds_no_room_to_be_judged_loses_nothing(fresh, parts, tmp_path, monkeypatch):
    start, judge, calls = copy_state(fresh.module), finetuning.judge, []

    def cramped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return judge(*given)

    finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "whole")
    ended = copy_state(fresh.module)
    fresh.module.load_state_dict(start)
    monkeypatch.setattr(finetuning, "judge", cramped)
    with pytest.raises(
        InputError, match=r"while judging epoch 2: .* keeps the last checkpoint, continue with --resume"
    ):
        finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "cramped")
    fresh.module.load_state_dict(start)
    finetune(fresh, *parts, recipe(unfreeze=-1), tmp_path / "cramped")
    assert same(copy_state(fresh.module), ended)


def test_an_error_that_is_not_of_memory_stays_a_traceback(fresh, parts, tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(finetuning, "judge", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune(fresh, *parts, recipe(), tmp_path)


def test_nothing_to_learn_is_refused(fresh, parts, tmp_path):
    with pytest.raises(InputError, match="nothing learns"):
        finetune(fresh, *parts, recipe(unfreeze=0), tmp_path)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate after every step."""
    found = []

    class Watched(Training):
        def step(self, done):
            super().step(done)
            found.append(self.learning_rate)

    monkeypatch.setattr(finetuning, "Training", Watched)
    return found


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(fresh, parts, tmp_path, rates):
    finetune(fresh, *parts, recipe(unfreeze=-1, epochs=5, patience=9, batch_size=2, warmup=0.2), tmp_path)
    peak = int(np.argmax(rates))
    assert 0 < peak <= math.ceil(0.2 * len(rates))
    assert rates[peak] == pytest.approx(1e-4)
    assert (np.diff(rates[:peak]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 1e-6


def test_a_constant_learning_rate_rises_and_stays(fresh, parts, tmp_path, rates):
    settings = recipe(unfreeze=-1, epochs=3, patience=9, batch_size=4, warmup=0.2, schedule="constant")
    finetune(fresh, *parts, settings, tmp_path)
    top = int(np.argmax(rates))
    assert 0 < top <= math.ceil(0.2 * len(rates))
    assert rates[top:] == [pytest.approx(1e-4)] * (len(rates) - top)


def test_another_learning_rate_begins_another_course(fresh, parts, tmp_path, monkeypatch):
    rates = []

    class Watched(Training):
        def train_epoch(self, signals):
            rates.append(self.learning_rate)
            return super().train_epoch(signals)

    monkeypatch.setattr(finetuning, "Training", Watched)
    still = {"weight_decay": 0.0, "schedule": "plateau", "plateau_patience": 0, "warmup": 0.0}
    start = copy_state(fresh.module)
    first = finetune(fresh, *parts, recipe(epochs=20, patience=3, learning_rate=1e-12, **still), tmp_path)
    assert len(first.log) == 4
    fresh.module.load_state_dict(start)
    rates.clear()
    second = finetune(fresh, *parts, recipe(epochs=20, patience=3, learning_rate=1e-9, **still), tmp_path)
    assert len(second.log) == 7
    assert rates[0] == pytest.approx(1e-9)


def test_a_class_whose_photos_cannot_be_read_is_not_learnt_and_costs_nothing_else(fresh, parts, ranks, tmp_path):
    fit, validation = parts
    lost, bad = fit.class_ids[0], tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    observations = [
        replace(one, photos=(bad,)) if class_id == lost else one
        for one, class_id in zip(fit.observations, fit.class_ids, strict=True)
    ]
    settings = recipe(epochs=1, unfreeze=-1, prototypes="learned", matcher="head", rank_weights=RANKS)
    learnt = Labelled(observations, fit.class_ids)
    tuning = finetune(fresh, learnt, validation, settings, tmp_path / "checkpoints", ranks)
    assert lost not in tuning.classes
    assert len(tuning.classes) == len(set(fit.class_ids)) - 1 == len(tuning.head.bias)

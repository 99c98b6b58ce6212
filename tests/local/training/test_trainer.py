"""Fine-tuning keeps what validation finds better, says what it kept and why, and loses nothing to an interruption."""

import copy
import math
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.manifest import Preprocessing
from kernel.tables import TAXONOMY
from local.data.competition import read_competition
from local.data.observations import split_for_validation
from local.recipes.recipe import make_recipe
from local.training import finetuning
from local.training.adaptation import copy_state
from local.training.checkpoints import read_checkpoint
from local.training.evaluation import Evaluator
from local.training.finetuning import finetune
from local.training.mixing import interpolate_weights
from local.training.signals import Stopped
from local.training.trainer import Trainer


@pytest.fixture
def fresh():
    """A tiny encoder of its own for each test, since training changes it."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=0)
    preprocessing = Preprocessing(64, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, "crop")
    return Encoder(module.eval(), preprocessing, module.num_features, [torch.device("cpu")])


@pytest.fixture(scope="module")
def data(drawn):
    return split_for_validation(read_competition(drawn.competition), 0)


RUINOUS = 0.1
HELPFUL = {
    **{"prototypes": "learned", "unfreeze": -1, "epochs": 6, "patience": 6, "learning_rate": 1e-3, "batch_size": 8},
    **{"colour_jitter": 0.0, "crop_scale": 1.0},
}
RANKS = [0.5] * len(TAXONOMY)


def recipe(**settings):
    return make_recipe({"epochs": 2, "patience": 3, **settings}, "the test")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def best_weights(folder, before):
    """The trained weights of the best epoch, as they were before they were interpolated with those before training."""
    return before | read_checkpoint(folder).part("best.encoder")


def mean_recall(row):
    return np.mean([row[f"recall_at_{count}"] for count in (1, 5, 10)])


def test_training_that_changes_nothing_leaves_the_encoder_unchanged_and_says_so(fresh, data, tmp_path, capsys):
    before = copy_state(fresh.module)
    tuning = finetune(fresh, data, recipe(learning_rate=1e-12, weight_decay=0.0), tmp_path)
    assert (tuning.epoch, tuning.mix_ratio) == (0, 0.0)
    assert [row["epoch"] for row in tuning.log] == [0, 1, 2]
    assert same(fresh.module.state_dict(), before)
    assert (
        "kept: the encoder before training, unchanged: no mixture with epoch 1 is better; the best, 25%, gains +0.000 "
        "in the mean of Recall@1, 5 and 10 over 15 validation observations"
    ) in capsys.readouterr().out


def test_training_that_ruins_the_encoder_is_thrown_away(fresh, data, tmp_path, capsys):
    """Its epoch is finished, and ranks the validation worse than the encoder before training, which is then kept."""
    before = copy_state(fresh.module)
    tuning = finetune(fresh, data, recipe(epochs=1, learning_rate=RUINOUS, batch_size=8, unfreeze=-1), tmp_path)
    ruined = best_weights(tmp_path, before)
    assert not same(ruined, before)
    assert mean_recall(tuning.log[1]) < mean_recall(tuning.log[0])
    assert (tuning.epoch, tuning.mix_ratio) == (0, 0.0)
    assert same(fresh.module.state_dict(), before)
    assert "kept: the encoder before training, unchanged: " in capsys.readouterr().out


def test_training_that_helps_is_kept(fresh, data, tmp_path, capsys):
    """Validated on what it is trained on, without augmentation, training cannot but help."""
    before = copy_state(fresh.module)
    tuning = finetune(fresh, replace(data, validation=data.train), recipe(**HELPFUL), tmp_path)
    assert tuning.epoch > 0 < tuning.mix_ratio
    after = best_weights(tmp_path, before)
    assert same(fresh.module.state_dict(), interpolate_weights(before, after, tuning.mix_ratio))
    said = f"kept: {tuning.mix_ratio:.0%} of the weights of epoch {tuning.epoch}, which gains +"
    assert said in capsys.readouterr().out


def test_a_head_that_is_kept_is_that_of_the_best_epoch_and_the_line_says_so(fresh, data, tmp_path, capsys):
    settings = recipe(unfreeze=-1, prototypes="learned", matcher="head", learning_rate=1e-3, monitor="log_loss")
    before = copy_state(fresh.module)
    tuning = finetune(fresh, data, settings, tmp_path)
    assert same(fresh.module.state_dict(), best_weights(tmp_path, before))
    head = read_checkpoint(tmp_path).part("best.head")["prototypes"]
    assert torch.allclose(tuning.head.prototypes, torch.nn.functional.normalize(head), atol=1e-6)
    losses = [row["log_loss"] for row in tuning.log[1:]]
    assert losses[tuning.epoch - 1] == min(losses)
    said = f"kept: the encoder and head of epoch {tuning.epoch}: log_loss is {min(losses):.3f}, the best of 2 epochs; "
    assert said in capsys.readouterr().out


def test_it_stops_when_recall_has_not_risen_for_as_long_as_patience_says(fresh, data, tmp_path, capsys):
    tuning = finetune(fresh, data, recipe(epochs=20, patience=2, learning_rate=1e-12, weight_decay=0.0), tmp_path)
    assert len(tuning.log) == 3
    start = np.mean([tuning.log[0][f"recall_at_{count}"] for count in (1, 5, 10)])
    said = capsys.readouterr().out
    assert (
        f"stopping after epoch 2 of 20: the mean of Recall@1, 5 and 10 has not been better than the {start:.3f} of "
        "epoch 0 for 2 epochs (patience)"
    ) in said
    assert said.splitlines()[-1].startswith("kept: the encoder before training, unchanged: ")


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


def test_the_moving_average_is_what_is_evaluated_and_kept(fresh, data, tmp_path, monkeypatch):
    """A decay of 1 with no warm-up would never leave the start: here the average lags behind what learns."""
    averages, update = [], ModelEmaV3.update

    def watched(average, module, step):
        update(average, module, step)
        averages.append(copy_state(average.module))

    monkeypatch.setattr(ModelEmaV3, "update", watched)
    monkeypatch.setattr(finetuning, "choose_mix_ratio", lambda evaluations: 1.0)
    finetune(fresh, data, recipe(epochs=1, unfreeze=-1, learning_rate=1e-2, ema_decay=0.9), tmp_path)
    assert same(fresh.module.state_dict(), averages[-1])


class Interrupted(Trainer):
    """A training whose process is sent a real SIGTERM during one of its batches."""

    at = math.inf

    def forward_backward(self, *given):
        Interrupted.at -= 1
        if Interrupted.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward_backward(*given)


@pytest.mark.parametrize("settings", WAYS)
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(fresh, data, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(finetuning, "Trainer", Interrupted)
    settings = recipe(unfreeze=-1, batch_size=8, learning_rate=1e-3, **settings)
    start, ends = copy_state(fresh.module), []
    for stops in ((), (1, 2, 1)):
        folder = tmp_path / str(len(ends))
        for at in stops:
            Interrupted.at = at
            fresh.module.load_state_dict(start)
            with pytest.raises(Stopped):
                finetune(fresh, data, settings, folder)
        Interrupted.at = math.inf
        fresh.module.load_state_dict(start)
        tuning = finetune(fresh, data, settings, folder)
        ends.append((tuning, copy_state(fresh.module), read_checkpoint(folder).tensors))
    (tuning, state, trained), (other, same_state, same_trained) = ends
    assert same(state, same_state)
    assert same(trained, same_trained)
    assert state.keys() == start.keys()
    assert len(tuning.log) == 3
    assert not any(parameter.requires_grad for parameter in fresh.module.parameters())
    assert [row["loss"] for row in tuning.log] == [row["loss"] for row in other.log]
    assert tuning.mix_ratio == other.mix_ratio


@pytest.mark.parametrize("where", ["evaluating", "between two epochs", "after the last epoch"])
def test_a_signal_outside_of_the_batches_loses_nothing(fresh, data, tmp_path, monkeypatch, where):
    trained, calls = [], []

    class Watched(Trainer):
        def forward_backward(self, batch, number):
            trained.append((self.epoch, number))
            return super().forward_backward(batch, number)

    def with_signal(function, at):
        def signalled(*given):
            calls.append(at)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*given)

        return signalled

    monkeypatch.setattr(finetuning, "Trainer", Watched)
    settings, start = recipe(unfreeze=-1, learning_rate=1e-3), copy_state(fresh.module)
    whole = finetune(fresh, data, settings, tmp_path / "whole")
    ended, batches = copy_state(fresh.module), sorted(trained)
    trained.clear()
    fresh.module.load_state_dict(start)
    with monkeypatch.context() as patched:
        if where == "evaluating":  # epoch 1, which comes after the encoder before training
            patched.setattr(Evaluator, "evaluate", with_signal(Evaluator.evaluate, 2))
        else:
            at = 1 if where == "between two epochs" else 2
            patched.setattr(finetuning, "finish_epoch", with_signal(finetuning.finish_epoch, at))
        with pytest.raises(Stopped, match="continue with --resume"):
            finetune(fresh, data, settings, tmp_path / "stopped")
    tuning = finetune(fresh, data, settings, tmp_path / "stopped")
    assert sorted(trained) == batches
    assert same(copy_state(fresh.module), ended)
    assert [row["loss"] for row in tuning.log] == [row["loss"] for row in whole.log]


@pytest.mark.parametrize(
    ("elapsed", "writing", "is_due"),
    [(299, 1, False), (301, 1, True), (301, 30, False), (599, 30, False), (601, 30, True)],
)
def test_a_checkpoint_is_due_after_five_minutes_or_twenty_times_what_the_last_one_took(
    monkeypatch, elapsed, writing, is_due
):
    monkeypatch.setattr("time.monotonic", lambda: 1000 + elapsed)
    assert Trainer.is_save_due(SimpleNamespace(saved_at=1000, saving_seconds=writing)) == is_due


def test_a_checkpoint_is_written_when_it_is_due_and_at_the_end_and_not_for_every_epoch(
    fresh, data, tmp_path, monkeypatch
):
    written = []

    class Watched(Trainer):
        def is_save_due(self):
            return (self.epoch, self.batch) == (2, 1)

        def state(self):
            written.append((self.epoch, self.batch))
            return super().state()

    monkeypatch.setattr(finetuning, "Trainer", Watched)
    finetune(fresh, data, recipe(unfreeze=-1, epochs=3, patience=9, batch_size=8), tmp_path)
    assert written == [(2, 1), (4, 0)]
    monkeypatch.setattr(finetuning, "Trainer", Watched)
    finetune(fresh, data, recipe(unfreeze=-1, epochs=3, patience=9, batch_size=8), tmp_path)
    assert written == [(2, 1), (4, 0)]  # what is on the disk already is not written again


def test_a_training_that_diverges_leaves_no_checkpoint_of_it(fresh, data, tmp_path, monkeypatch):
    class Poisoned(Trainer):
        def forward_backward(self, batch, number):
            return math.nan if self.epoch == 2 else super().forward_backward(batch, number)

    monkeypatch.setattr(finetuning, "Trainer", Poisoned)
    finetune(fresh, data, recipe(unfreeze=-1, epochs=3), tmp_path)
    assert read_checkpoint(tmp_path) is None


def test_a_damaged_checkpoint_costs_no_more_than_the_time_since_the_one_before(
    fresh, data, tmp_path, monkeypatch, capsys
):
    start = copy_state(fresh.module)
    monkeypatch.setattr(Trainer, "is_save_due", lambda trainer: True)
    finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "whole")
    ended = copy_state(fresh.module)
    fresh.module.load_state_dict(start)
    finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "damaged")
    newest = sorted((tmp_path / "damaged").glob("0*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    fresh.module.load_state_dict(start)
    finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "damaged")
    assert "is damaged: continuing from the one before" in capsys.readouterr().out
    assert same(copy_state(fresh.module), ended)


def test_a_loss_that_is_no_number_ends_the_training_with_what_was_learnt(fresh, data, tmp_path, monkeypatch, capsys):
    class Poisoned(Trainer):
        def forward_backward(self, batch, number):
            if self.epoch == 2:
                batch.photos[:] = 0
                self.head.prototypes.data[:] = math.nan
            return super().forward_backward(batch, number)

    monkeypatch.setattr(finetuning, "Trainer", Poisoned)
    tuning = finetune(fresh, data, recipe(unfreeze=-1, epochs=3), tmp_path)
    assert [row["epoch"] for row in tuning.log] == [0, 1]
    assert "epoch 2, batch 0: the loss is nan" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in fresh.module.state_dict().values())


def test_memory_that_does_not_suffice_is_one_line_and_loses_nothing(fresh, data, tmp_path, monkeypatch):
    class Cramped(Trainer):
        def forward_backward(self, batch, number):
            if self.epoch == 2 and self.recipe.train.batch_size > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().forward_backward(batch, number)

    monkeypatch.setattr(finetuning, "Trainer", Cramped)
    with pytest.raises(InputError, match=re.escape("--resume --set batch_size=4 --set accumulate=2")):
        finetune(fresh, data, recipe(unfreeze=-1, batch_size=8), tmp_path)
    tuning = finetune(fresh, data, recipe(unfreeze=-1, batch_size=4, accumulate=2), tmp_path)
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
        (1, {"head_only_epochs": 1, "ema_decay": 0.9}, "unfreezing"),
    ],
)
def test_an_encoder_whose_copy_finds_no_room_is_one_line(fresh, data, tmp_path, copies, settings, doing):
    fresh.module = NoRoom(fresh.module, copies)
    with pytest.raises(
        InputError, match=f"^the GPU is out of memory while {doing}.*smaller encoder, or train on the CPU"
    ):
        finetune(fresh, data, recipe(unfreeze=-1, prototypes="learned", **settings), tmp_path)


def test_an_epoch_that_finds_no_room_to_be_evaluated_loses_nothing(fresh, data, tmp_path, monkeypatch):
    start, evaluate, calls = copy_state(fresh.module), Evaluator.evaluate, []

    def cramped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return evaluate(*given)

    finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "whole")
    ended = copy_state(fresh.module)
    fresh.module.load_state_dict(start)
    monkeypatch.setattr(Evaluator, "evaluate", cramped)
    with pytest.raises(
        InputError, match=r"while evaluating epoch 2: .* keeps the last checkpoint, continue with --resume"
    ):
        finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "cramped")
    fresh.module.load_state_dict(start)
    finetune(fresh, data, recipe(unfreeze=-1), tmp_path / "cramped")
    assert same(copy_state(fresh.module), ended)


def test_an_error_that_is_not_of_memory_stays_a_traceback(fresh, data, tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Evaluator, "evaluate", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune(fresh, data, recipe(), tmp_path)


def test_nothing_to_learn_is_refused(fresh, data, tmp_path):
    with pytest.raises(InputError, match="nothing is trained"):
        finetune(fresh, data, recipe(unfreeze=0), tmp_path)


def test_another_learning_rate_begins_another_schedule(fresh, data, tmp_path, monkeypatch):
    rates = []

    class Watched(Trainer):
        def train_epoch(self, signals):
            rates.append(self.optimization.learning_rate)
            return super().train_epoch(signals)

    monkeypatch.setattr(finetuning, "Trainer", Watched)
    still = {"weight_decay": 0.0, "schedule": "plateau", "plateau_patience": 0, "warmup": 0.0}
    start = copy_state(fresh.module)
    first = finetune(fresh, data, recipe(epochs=20, patience=3, learning_rate=1e-12, **still), tmp_path)
    assert len(first.log) == 4
    fresh.module.load_state_dict(start)
    rates.clear()
    second = finetune(fresh, data, recipe(epochs=20, patience=3, learning_rate=1e-9, **still), tmp_path)
    assert len(second.log) == 7
    assert rates[0] == pytest.approx(1e-9)


def test_the_schedule_covers_all_steps_of_all_epochs(fresh, data, tmp_path, monkeypatch):
    rates = []

    class Watched(Trainer):
        def optimizer_step(self, step):
            super().optimizer_step(step)
            rates.append(self.optimization.learning_rate)

    monkeypatch.setattr(finetuning, "Trainer", Watched)
    finetune(fresh, data, recipe(unfreeze=-1, epochs=3, patience=9, batch_size=2, accumulate=3, warmup=0.2), tmp_path)
    steps = 3 * math.ceil(math.ceil(len(data.train_set) / 2) / 3)
    peak = round(0.2 * steps)
    assert len(rates) == steps
    assert rates[peak - 1] == pytest.approx(1e-4)
    assert (np.diff(rates[:peak]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 1e-6


def test_a_class_whose_photos_cannot_be_read_is_not_trained_on_and_costs_nothing_else(fresh, data, tmp_path):
    lost, bad = data.labelled.class_ids[data.train][0], tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    is_lost = (data.labelled.class_ids == lost) & data.train
    observations = [
        replace(observation, photos=(bad,)) if is_bad else observation
        for observation, is_bad in zip(data.labelled.observations, is_lost, strict=True)
    ]
    settings = recipe(epochs=1, unfreeze=-1, prototypes="learned", matcher="head", rank_weights=RANKS)
    split = replace(data, labelled=replace(data.labelled, observations=observations))
    tuning = finetune(fresh, split, settings, tmp_path / "checkpoints")
    assert lost not in tuning.classes
    assert len(tuning.classes) == len(data.train_set.classes) - 1 == len(tuning.head.bias)


@pytest.mark.parametrize(
    ("is_killed", "error", "says"),
    [(True, InputError, "loads photos was killed, .* continue with --resume"), (False, RuntimeError, "of our own")],
)
def test_a_photo_worker_that_is_killed_is_one_line_and_the_training_can_be_resumed(
    fresh, data, tmp_path, monkeypatch, is_killed, error, says
):
    parent = os.getpid()

    def fail(*_):
        assert os.getpid() != parent
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("an error of our own")

    with monkeypatch.context() as patched:
        patched.setattr("local.training.batches.PhotoDataset.__getitem__", fail)
        with pytest.raises(error, match=says):
            finetune(fresh, data, recipe(epochs=1), tmp_path)
    assert len(finetune(fresh, data, recipe(epochs=1), tmp_path).log) == 2

"""Train an encoder with its head: the optimizer steps of an epoch, and the checkpoints to resume from."""

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernel.forward import Encoder, is_out_of_memory
from kernel.inputs import InputError
from local.base import distributed
from local.base.console import counted, progress, say
from local.data.observations import LabelledObservations, encode_labels
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, settings_of
from local.training.adaptation import (
    add_low_rank_updates,
    copy_state,
    group_by_layer,
    set_training_mode,
    trainable_state,
    unfreeze,
)
from local.training.batches import (
    Batch,
    BatchAugmentation,
    ObservationBatchSampler,
    PhotoDataset,
    derive_seed,
    make_loader,
    seed_everything,
)
from local.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from local.training.checks import is_first
from local.training.evaluation import Evaluation, monitored_score
from local.training.head import Head, TrainingTask
from local.training.optimization import Optimization
from local.training.resuming import CHANGEABLE, refuse_other_training
from local.training.signals import Stopped, StopSignals

HEAD_ONLY_RATE = 10.0  # times the learning rate: a head alone can be trained faster than a pretrained encoder
# Between two checkpoints: what a training that is killed loses. It is longer where writing is slow, so that at most a
# twentieth of the time is spent on it.
SAVE_SECONDS, SAVE_RATIO = 300, 20


class Trainer:
    """A training at one point of it: at its start, or at the newest checkpoint in its folder, if there is one.

    Epochs below 1 are the `head_only_epochs`: they train the head alone, so that its large errors at the start do not
    distort the features. That is LP-FT (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

    Args:
        encoder: to train; it is copied.
        train: the observations to train on, each with a readable photo.
        data_sha256: of the data, recorded in checkpoints.
        folder: for checkpoints.

    Attributes:
        evaluated: the encoder to evaluate: the moving average of the weights where the recipe has one.
        epoch, batch: the next to be trained.
        log: the rows of log.csv so far.
        best: what `keep_best` has kept of the best epoch so far, on the CPU; only the first process has it.
        seconds: of the present epoch, by what they were spent on; see `local.training.log.NOT_TRAINING`.
        schedule_start: rows of the log at the start of the present schedule. When a training is resumed with other
            epochs or another learning rate, patience and plateau count from there.
    """

    def __init__(
        self, encoder: Encoder, head: Head, train: LabelledObservations, recipe: Recipe, data_sha256: str, folder: Path
    ):
        self.recipe, self.head, self.folder, self.data_sha256 = recipe, head, folder, data_sha256
        self.settings, self.device = recipe.train, encoder.device
        self.encoder = self.evaluated = with_module(encoder, copy.deepcopy(encoder.module))
        self.before = encoder.module
        self.classes = train.classes
        self.labels = encode_labels(train.class_ids, self.classes)
        self.sampler = ObservationBatchSampler(self.labels, self.settings, *distributed.rank_and_world_size())
        photos = self.settings.photos_per_observation
        dataset = PhotoDataset(train.observations, encoder.preprocessing, recipe.augment, photos)
        self.loader = make_loader(dataset, self.sampler, self.device)
        self.augment = BatchAugmentation(len(self.classes), recipe.augment, self.device)
        self.weights_sha256 = weights_digest(recipe.encoder)
        self.epoch, self.batch, self.loss_sum = 1 - self.settings.head_only_epochs, 0, (0.0, 0.0)
        self.log: list[dict] = []
        self.best: dict[str, torch.Tensor] = {}
        self.seconds: Counter[str] = Counter()
        self.saved: tuple[int, int] | None = None  # epoch and batch of the newest checkpoint
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0
        self.schedule_start = 1
        self.average: ModelEmaV3 | None = None
        checkpoint = read_checkpoint(folder)
        if checkpoint:
            self.resume(checkpoint)
        else:
            self.begin_phase()

    @property
    def is_head_only(self) -> bool:
        """Whether the present epoch trains the head alone."""
        return self.epoch < 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.sampler) / self.settings.accumulate)

    def begin_phase(self) -> None:
        """Unfreeze what is trained from here on, the head or the encoder with it, and make its optimizer."""
        groups = self.parameter_groups()
        if not groups:
            raise InputError('nothing is trained: unfreeze = 0 needs prototypes = "learned"')
        monitor, done = self.settings.monitor, self.log[self.schedule_start :]
        epochs = self.settings.head_only_epochs if self.is_head_only else self.settings.epochs
        self.optimization = Optimization(
            groups,
            self.recipe.optim,
            epochs * self.steps_per_epoch,
            self.device,
            larger_is_better=monitor != "log_loss",
            scores=[monitored_score(row, monitor) for row in done],
        )
        self.task: nn.Module = TrainingTask(self.encoder, self.head)
        if distributed.rank_and_world_size()[1] > 1:
            self.task = DistributedDataParallel(self.task)

    def parameter_groups(self) -> list[dict]:
        """The trainable parameters of the phase, with their learning rates; all others are frozen."""
        module, optim = self.encoder.module, self.recipe.optim
        module.requires_grad_(False)
        rate = optim.learning_rate * (HEAD_ONLY_RATE if self.is_head_only else 1)
        of_head = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        groups = [{"params": of_head, "lr": rate, "weight_decay": 0.0}] if of_head else []
        if self.is_head_only:
            return groups
        unfreeze(module, self.settings.unfreeze)
        if self.settings.lora_rank:
            add_low_rank_updates(module, self.settings.lora_rank)
        if self.settings.gradient_checkpointing:
            module.set_grad_checkpointing(True)
        groups = [*group_by_layer(module, optim), *groups]
        if optim.ema_decay:
            # With a decay that grows from 0 to `ema_decay`, since a few shots make few steps.
            self.average = ModelEmaV3(module, optim.ema_decay, use_warmup=True)
            self.evaluated = with_module(self.encoder, self.average.module)
        return groups

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, (0.0, 0.0)
        self.seconds.clear()
        if self.epoch == 1:
            self.begin_phase()

    def train_epoch(self, signals: StopSignals) -> float:
        """Train the rest of the present epoch, and write a checkpoint whenever one is due.

        Returns:
            The mean loss. NaN or infinity as soon as a batch's loss is not finite; that batch trains nothing.

        Raises:
            Stopped: a signal has come; a checkpoint is written.
        """
        set_training_mode(self.encoder.module, self.recipe.encoder.pretrained)
        self.head.train()
        self.sampler.set_epoch(self.epoch + self.settings.head_only_epochs, self.batch)
        last = len(self.sampler) - 1
        what = f"epoch {self.epoch}" if not self.is_head_only else "head-only epoch"
        batches = progress(self.loader, what, last + 1 - self.batch, "batch")
        for number, batch in enumerate(self.timed(batches), self.batch):
            with self.out_of_memory_named(number):
                loss = self.forward_backward(batch, number)
                if not math.isfinite(loss):
                    return loss
                if (number + 1) % self.settings.accumulate and number != last:
                    continue
                self.optimizer_step(number // self.settings.accumulate + 1)
            self.batch = number + 1
            stops = distributed.all_reduce_any(signals.pending, self.device)
            if stops or self.is_save_due():
                self.save()
            if stops:
                raise Stopped(f"epoch {self.epoch} after batch {self.batch} of {len(self.sampler)}")
        total, count = distributed.all_reduce_sum(list(self.loss_sum), self.device)
        return total / max(1.0, count)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each of them is there is added to `seconds`."""
        started = time.monotonic()
        for batch in batches:
            self.seconds["waiting"] += time.monotonic() - started
            yield batch
            started = time.monotonic()

    def forward_backward(self, batch: Batch, number: int) -> float:
        """Add the gradient of a batch, by its number in the epoch, to that of the optimizer step. Returns its loss."""
        group, batches = self.settings.accumulate, len(self.sampler)
        rank = distributed.rank_and_world_size()[0]
        seed_everything(derive_seed(self.settings.seed, self.epoch + self.settings.head_only_epochs, number, rank))
        pixels = self.encoder.normalise(batch.photos, self.device)
        labels = torch.tensor(self.labels[batch.indices.numpy()], device=self.device)
        pixels, targets = self.augment(pixels, labels)
        ends_step = (number + 1) % group == 0 or number + 1 == batches
        accumulates = isinstance(self.task, DistributedDataParallel) and not ends_step
        with self.task.no_sync() if accumulates else contextlib.nullcontext():
            index, query_mask = batch.observation_index.to(self.device), batch.query_mask.to(self.device)
            loss = self.task(pixels, index, targets.to(self.device), query_mask)
            value = loss.item()
            if distributed.all_reduce_any(not math.isfinite(value), self.device):
                return value if not math.isfinite(value) else math.nan
            in_step = group if number // group < batches // group else batches % group
            self.optimization.backward(loss / in_step)
        total, count = self.loss_sum
        self.loss_sum = total + value * len(batch.indices), count + len(batch.indices)
        return value

    def optimizer_step(self, step: int) -> None:
        """Take the `step`-th optimizer step of the epoch, counted from 1."""
        first_epoch = 1 - self.settings.head_only_epochs if self.is_head_only else 1
        self.optimization.step((self.epoch - first_epoch) * self.steps_per_epoch + step)
        if self.average:
            self.average.update(self.encoder.module, (self.epoch - 1) * self.steps_per_epoch + step)

    @contextlib.contextmanager
    def out_of_memory_named(self, number: int) -> Iterator[None]:
        """Turn a lack of memory in a batch into one line that says what to change, after writing a checkpoint."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.save()
            settings, change = self.settings, "--set gradient_checkpointing=true"
            if settings.batch_size > 1 and not self.sampler.is_episodic:
                change = f"--set batch_size={settings.batch_size // 2} --set accumulate={settings.accumulate * 2}"
            elif settings.gradient_checkpointing:
                change = "on a larger device, or train again with a smaller encoder or image_size"
            where = f"epoch {self.epoch}, batch {number}"
            raise InputError(f"out of memory in {where}: continue with --resume {change}") from error

    def keep_best(self, evaluation: Evaluation) -> None:
        """Keep the evaluated weights as those of the best epoch so far: those that differ from before training."""
        if not is_first():
            return
        before, after = self.before.state_dict(), copy_state(self.evaluated.module)
        changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
        tensors = {f"encoder.{name}": value for name, value in changed.items()}
        tensors |= {f"head.{name}": value.clone() for name, value in self.head.state_dict().items()}
        tensors["hits"] = torch.tensor(evaluation.hits)
        self.best = {name: value.cpu() for name, value in tensors.items()}

    def is_save_due(self) -> bool:
        """Whether so much time has passed since the last checkpoint that it is worth writing another."""
        return time.monotonic() - self.saved_at >= max(SAVE_SECONDS, SAVE_RATIO * self.saving_seconds)

    def save(self) -> None:
        """Write a checkpoint of the present state, unless the newest one is of this state.

        The first process alone writes, and takes no part in any communication meanwhile. So it can decide alone when to
        write; the others wait for it at the next batch.
        """
        if not is_first() or self.saved == (self.epoch, self.batch):
            return
        started = time.monotonic()
        write_checkpoint(self.folder, self.state())
        self.saved, self.saved_at = (self.epoch, self.batch), time.monotonic()
        self.saving_seconds = self.saved_at - started
        self.seconds["writing"] += self.saving_seconds

    def state(self) -> Checkpoint:
        """The present state, from which `resume` continues."""
        trainable = trainable_state(self.encoder.module)
        average = self.average.module.state_dict() if self.average else {}
        parts = {
            "encoder": trainable,
            "head": self.head.state_dict(),
            "average": {name: value for name, value in average.items() if name in trainable},
            "optimizer": self.optimization.tensors(),
            "best": self.best,
        }
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        notes = {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.sampler.batch_size,
            "loss_sum": self.loss_sum,
            "log": self.log,
            "schedule": schedule_key(self.recipe),
            "schedule_start": self.schedule_start,
            "scaler": self.optimization.scaler.state_dict(),
            "trained": self.epoch if self.batch == len(self.sampler) else self.epoch - 1,
            "settings": settings_of(self.recipe, CHANGEABLE),
            "weights": self.weights_sha256,
            "data_sha256": self.data_sha256,
        }
        return Checkpoint(tensors, notes)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go to the state of a checkpoint.

        Raises:
            InputError: it is of other data, or of settings that make another training.
        """
        notes = checkpoint.notes
        refuse_other_training(self.folder, notes, self.recipe, self.data_sha256)
        self.epoch, self.log, self.loss_sum = notes["epoch"], notes["log"], tuple(notes["loss_sum"])
        # Copied, since the tensors of a file that is read keep it open.
        self.best = {name: value.clone() for name, value in checkpoint.part("best").items()}
        step_size, seen = self.sampler.batch_size * self.settings.accumulate, notes["batch"] * notes["batch_size"]
        is_done = seen >= len(self.labels)  # and not evaluated yet, or it would not be the present epoch
        self.batch = len(self.sampler) if is_done else seen // step_size * self.settings.accumulate
        self.saved = self.epoch, self.batch
        is_same_schedule = notes["schedule"] == schedule_key(self.recipe)
        self.schedule_start = notes["schedule_start"] if is_same_schedule else max(1, len(self.log) + is_done)
        epochs = counted(self.settings.epochs, "epoch")
        if self.epoch > self.settings.epochs:
            say(f"{epochs} already trained{'; the part of the next epoch is not used' if self.batch else ''}")
        elif is_done and self.epoch == self.settings.epochs:
            say(f"{epochs} already trained; evaluating the last one again")
        else:
            say(f"continuing in epoch {self.epoch} after batch {self.batch} of {len(self.sampler)}")
        self.begin_phase()
        self.encoder.module.load_state_dict(checkpoint.part("encoder"), strict=False)
        self.head.load_state_dict(checkpoint.part("head"))
        if self.average:
            self.average.module.load_state_dict(checkpoint.part("average"), strict=False)
        self.optimization.load_tensors(checkpoint.part("optimizer"))
        if notes["scaler"]:
            self.optimization.scaler.load_state_dict(notes["scaler"])


def schedule_key(recipe: Recipe) -> list[float]:
    """The settings that, when they change, start a new schedule of the learning rate."""
    return [recipe.train.epochs, recipe.optim.learning_rate]


def with_module(encoder: Encoder, module: nn.Module) -> Encoder:
    """The same encoder with another module."""
    return Encoder(module, encoder.preprocessing, encoder.features, [encoder.device])

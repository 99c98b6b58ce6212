"""One training as it stands: its encoder and head, its optimiser and schedule, and the checkpoint to go on from."""

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from kernel.encoders import Encoder, is_out_of_memory, pick_dtype
from kernel.inputs import InputError
from local.base import distributed
from local.base.console import counted, progress, say
from local.data.competition import Labelled, places_of, sort_ids
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, current_names, differences, settings_of
from local.recipes.settings import CANDIDATES
from local.training.adaptation import add_low_rank, group_by_layer, learning_state, set_training, unfreeze
from local.training.batches import Batch, Draws, Mixing, Photos, collate, seed_all, seed_of
from local.training.checkpoints import (
    Checkpoint,
    flatten_optimiser,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from local.training.checks import is_first
from local.training.evaluation import monitored
from local.training.head import Head

HEAD_ONLY_RATE = 10.0  # times the learning rate: a head alone may go faster than an encoder that has much to lose
SAVE_SECONDS = 600  # between two checkpoints within an epoch
MOMENTUM = 0.9  # of SGD
KEEP = "give another --out, or keep the old settings"
# What may change when a training goes on; with anything else changed it would be another training.
FREE = (
    *("epochs", "patience", "learning_rate", "batch_size", "accumulate", "gradient_checkpointing"),
    *("reference", "choose", *(name for name in CANDIDATES if name not in ("resize_mode", "matcher"))),
)


class Stopped(KeyboardInterrupt):
    """The user or the system asked to stop; what was learnt is kept."""


class Signals:
    """Ctrl-C and SIGTERM, obeyed between two steps of a training, so that nothing is lost.

    Attributes:
        pending: whether to stop at the next chance.
    """

    def __init__(self) -> None:
        self.pending, self.is_training = False, False

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        """Wait for the end of a step; between epochs, where a checkpoint is just written, and a second time, do not."""
        if not self.is_training or self.pending:
            raise Stopped("stopped: go on with --resume")
        self.pending = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While steps are taken."""
        self.is_training = True
        try:
            yield
        except RuntimeError as error:
            # What is sent to every process, as SLURM does, also ends those that load photos.
            if not (self.pending and "DataLoader worker" in str(error)):
                raise
            raise Stopped("stopped: go on with --resume") from error
        self.is_training = False


def stand_apart(worker: int) -> None:
    """Take a worker out of the group of processes that Ctrl-C and torchrun send their signals to.

    Otherwise it dies of them before the training has saved where it stands.
    """
    if hasattr(os, "setsid"):
        os.setsid()


class Learner(nn.Module):
    """Encoder and head as one module, so that several processes can share its gradients."""

    def __init__(self, encoder: Encoder, head: Head):
        super().__init__()
        self.module, self.head, self.embed = encoder.module, head, encoder.forward

    def forward(
        self, pixels: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor
    ) -> torch.Tensor:
        """Normalised photos -> the mean loss; see `Head.forward`."""
        device = pixels.device
        with torch.autocast(device.type, pick_dtype(device), enabled=device.type == "cuda"):
            embeddings = self.embed(pixels, self.module)
        return self.head(embeddings, owners, targets, asked)


class Training:
    """A training as it stands, which goes on from the newest checkpoint in its folder, if there is one.

    In epochs below 1 the head alone is trained (`head_only_epochs`), so that its first large errors do not distort the
    features: LP-FT (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

    Attributes:
        kept: the encoder that is judged: the moving average, where the recipe wants one.
        epoch, batch: the next to be trained.
        log: the rows of log.csv so far.
        since: rows of the log that were there when the present course began: with other epochs or another learning rate
            than before, patience and plateau are counted anew.
    """

    def __init__(self, encoder: Encoder, head: Head, fit: Labelled, recipe: Recipe, data_sha256: str, folder: Path):
        self.recipe, self.head, self.folder, self.data_sha256 = recipe, head, folder, data_sha256
        self.encoder = self.kept = with_module(encoder, copy.deepcopy(encoder.module))
        self.classes = sort_ids(fit.class_ids)
        self.targets = places_of(fit.class_ids, self.classes)
        self.draws = Draws(self.targets, recipe.train, distributed.rank_and_world_size())
        self.loader = DataLoader(
            Photos(fit.observations, encoder.preprocessing, recipe.augment, recipe.train.photos_per_observation),
            batch_sampler=self.draws,
            collate_fn=collate,
            num_workers=max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
            worker_init_fn=stand_apart,
            persistent_workers=True,
            pin_memory=encoder.device.type == "cuda",
            generator=torch.Generator(),  # of its own, since every draw is seeded
        )
        self.mixing = Mixing(len(head.sizes), recipe.augment, encoder.device)
        self.weights = weights_digest(recipe.encoder.encoder)
        self.epoch, self.batch, self.losses = 1 - recipe.train.head_only_epochs, 0, [0.0, 0.0]
        self.log, self.since = [], 1
        self.average: ModelEmaV3 | None = None
        checkpoint = read_checkpoint(folder)
        if checkpoint:
            self.restore(checkpoint)
        else:
            self.begin_phase()

    def begin_phase(self) -> None:
        """Free what learns from here on, the head alone or the encoder with it, under an optimiser of its own."""
        train, optim, module = self.recipe.train, self.recipe.optim, self.encoder.module
        is_head_only = self.epoch < 1
        rate = optim.learning_rate * (HEAD_ONLY_RATE if is_head_only else 1)
        own = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        groups = [{"params": own, "lr": rate, "weight_decay": 0.0}] if own else []
        module.requires_grad_(False)
        if not is_head_only:
            unfreeze(module, train.unfreeze)
            if train.lora_rank:
                add_low_rank(module, train.lora_rank)
            if train.gradient_checkpointing:
                module.set_grad_checkpointing(True)
            groups = [*group_by_layer(module, optim), *groups]
            if optim.ema_decay:
                # The average starts short and lengthens, since a few shots make few steps.
                self.average = ModelEmaV3(module, optim.ema_decay, use_warmup=True)
                self.kept = with_module(self.encoder, self.average.module)
        if not groups:
            raise InputError('nothing learns: unfreeze = 0 needs prototypes = "learned"')
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        more = {"momentum": MOMENTUM} if optim.optimizer == "sgd" else {}
        self.optimiser = create_optimizer_v2(
            groups, opt=optim.optimizer, lr=optim.learning_rate, weight_decay=optim.weight_decay, **more
        )
        device = self.encoder.device
        uses_fp16 = device.type == "cuda" and pick_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16)
        self.learner: nn.Module = Learner(self.encoder, self.head)
        if distributed.rank_and_world_size()[1] > 1:
            self.learner = DistributedDataParallel(self.learner)
        self.schedule = self.make_schedule(train.head_only_epochs if is_head_only else train.epochs)

    def make_schedule(self, epochs: int) -> Scheduler | ReduceLROnPlateau:
        """How the learning rate goes, over so many epochs; a plateau is told again what the log knows of its course."""
        optim, monitor = self.recipe.optim, self.recipe.train.monitor
        if optim.schedule == "plateau":
            mode = "min" if monitor == "log_loss" else "max"
            plateau = ReduceLROnPlateau(self.optimiser, mode, optim.plateau_factor, optim.plateau_patience)
            for row in self.log[self.since :]:
                plateau.step(monitored(row, monitor))
            return plateau
        steps = epochs * self.steps
        ramp = round(steps * optim.warmup)
        if optim.schedule == "constant":
            return StepLRScheduler(
                self.optimiser, steps, decay_rate=1.0, warmup_t=ramp, warmup_prefix=True, t_in_epochs=False
            )
        return CosineLRScheduler(
            self.optimiser, max(1, steps - ramp), warmup_t=ramp, warmup_prefix=True, t_in_epochs=False
        )

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.draws) / self.recipe.train.accumulate)

    @property
    def learning_rate(self) -> float:
        """The present one, of what learns fastest."""
        return max(group["lr"] for group in self.optimiser.param_groups)

    def train_epoch(self, signals: "Signals") -> float:
        """The rest of the present epoch, and a checkpoint at its end.

        Returns:
            The mean loss; NaN, or infinity, where it became that, before it was followed.
        """
        set_training(self.encoder.module, self.recipe.encoder.pretrained)
        self.head.train()
        self.draws.start(self.epoch + self.recipe.train.head_only_epochs, self.batch)
        saved, group = time.monotonic(), self.recipe.train.accumulate
        batches = progress(self.loader, f"epoch {self.epoch}", len(self.draws) - self.batch)
        for number, batch in enumerate(batches, self.batch):
            is_last = number + 1 == len(self.draws)
            size = group if number // group < len(self.draws) // group else len(self.draws) % group
            with self.kept_on_failure(number):
                loss = self.follow(batch, number, size, (number + 1) % group == 0 or is_last)
            if not math.isfinite(loss):
                return loss
            if (number + 1) % group == 0 or is_last:
                self.batch = number + 1
                is_asked = distributed.all_reduce_any(signals.pending, self.encoder.device)
                if is_asked or is_last or time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if is_asked:
                    raise Stopped(self.where)
        total, seen = distributed.all_reduce_sum(self.losses, self.encoder.device)
        return total / max(1.0, seen)

    def follow(self, batch: Batch, number: int, size: int, is_step: bool) -> float:
        """One batch, one of `size` of a step. Returns its loss."""
        device, train = self.encoder.device, self.recipe.train
        seed_all(seed_of(train.seed, self.epoch + train.head_only_epochs, number, distributed.rank_and_world_size()[0]))
        pixels = self.encoder.normalise(batch.photos, device)
        targets = torch.tensor(self.targets[batch.index.numpy()], device=device)
        pixels, targets = self.mixing(pixels, targets)
        syncs = is_step or not isinstance(self.learner, DistributedDataParallel)
        with contextlib.nullcontext() if syncs else self.learner.no_sync():
            loss = self.learner(pixels, batch.owners.to(device), targets.to(device), batch.asked.to(device))
            value = loss.item()
            if distributed.all_reduce_any(not math.isfinite(value), device):
                return value if not math.isfinite(value) else math.nan
            self.scaler.scale(loss / size).backward()
        self.losses = [self.losses[0] + value * len(batch.index), self.losses[1] + len(batch.index)]
        if is_step:
            self.step(number // train.accumulate + 1)
        return value

    def step(self, done: int) -> None:
        """Follow the gradient; `done` steps of the epoch are then done."""
        first = 1 - self.recipe.train.head_only_epochs if self.epoch < 1 else 1
        if isinstance(self.schedule, Scheduler):
            self.schedule.step_update((self.epoch - first) * self.steps + done)
        self.scaler.unscale_(self.optimiser)
        if self.recipe.optim.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.optim.grad_clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.encoder.module, (self.epoch - 1) * self.steps + done)

    def next_epoch(self) -> None:
        """Stand at the beginning of the next epoch."""
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, [0.0, 0.0]
        if self.epoch == 1:
            self.begin_phase()

    @contextlib.contextmanager
    def kept_on_failure(self, number: int) -> Iterator[None]:
        """Turn a lack of memory into one line, with what was learnt kept."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.save()
            train, change = self.recipe.train, "--set gradient_checkpointing=true"
            if train.batch_size > 1 and not self.draws.is_episodic:
                change = f"--set batch_size={train.batch_size // 2} --set accumulate={train.accumulate * 2}"
            elif train.gradient_checkpointing:
                change = "on a larger device, or begin again with another encoder or smaller photos"
            where = f"epoch {self.epoch}, batch {number}"
            raise InputError(f"out of memory in {where}: go on with --resume {change}") from error

    def save(self) -> None:
        """Write a checkpoint of where the training stands."""
        if not is_first():
            return
        learning = learning_state(self.encoder.module)
        average = self.average.module.state_dict() if self.average else {}
        parts = {
            "encoder": learning,
            "head": self.head.state_dict(),
            "average": {name: value for name, value in average.items() if name in learning},
            "optimiser": dict(flatten_optimiser(self.optimiser)),
        }
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        notes = {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.draws.size,
            "losses": self.losses,
            "log": self.log,
            "since": self.since,
            "course": course_of(self.recipe),
            "scaler": self.scaler.state_dict(),
            "trained": self.epoch if self.batch == len(self.draws) else self.epoch - 1,
            "settings": settings_of(self.recipe, FREE),
            "weights": self.weights,
            "data_sha256": self.data_sha256,
        }
        write_checkpoint(self.folder, Checkpoint(tensors, notes))

    @property
    def where(self) -> str:
        """What to tell someone who stopped it."""
        return f"stopped in epoch {self.epoch} after batch {self.batch} of {len(self.draws)}: go on with --resume"

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint does.

        Raises:
            InputError: it is of other data, or of settings that make another training.
        """
        notes = checkpoint.notes
        refuse_other(self.folder, notes, self.recipe, self.data_sha256)
        self.epoch, self.log, self.losses = notes["epoch"], notes["log"], notes["losses"]
        group, seen = self.recipe.train.accumulate, notes["batch"] * notes["batch_size"]
        is_done = seen >= len(self.targets)
        is_same = notes["course"] == course_of(self.recipe)
        self.since = notes["since"] if is_same else max(1, len(self.log) + is_done)  # a done epoch is yet to be judged
        self.batch = len(self.draws) if is_done else seen // (self.draws.size * group) * group
        if self.epoch > self.recipe.train.epochs:
            say(f"{counted(self.recipe.train.epochs, 'epoch')} trained already; what was begun of the next is left out")
        elif is_done and self.epoch == self.recipe.train.epochs:
            say(f"{counted(self.epoch, 'epoch')} trained already; judging the last again")
        else:
            say(f"going on in epoch {self.epoch} after batch {self.batch} of {len(self.draws)}")
        self.begin_phase()
        self.encoder.module.load_state_dict(checkpoint.part("encoder"), strict=False)
        self.head.load_state_dict(checkpoint.part("head"))
        if self.average:
            self.average.module.load_state_dict(checkpoint.part("average"), strict=False)
        restore_optimiser(self.optimiser, checkpoint.part("optimiser"))
        if notes["scaler"]:
            self.scaler.load_state_dict(notes["scaler"])


def refuse_other(folder: Path, notes: dict, recipe: Recipe, data_sha256: str) -> None:
    """Continue a training with its own settings and data alone.

    Args:
        folder: of its checkpoints, to be named in errors.
        notes: of its newest checkpoint.

    Raises:
        InputError: it was made with others, or has more epochs than are asked for.
    """
    was, now = current_names(notes["settings"]), settings_of(recipe, FREE)
    found = differences(was, now, (notes.get("weights", ""), weights_digest(recipe.encoder.encoder)))
    different = [*found.values(), *([] if notes["data_sha256"] == data_sha256 else ["the data have changed"])]
    if different:
        raise InputError(f"{folder} is of another training: {'; '.join(different)}; {KEEP}")
    refuse_fewer_epochs(folder, notes, recipe)


def refuse_fewer_epochs(folder: Path, notes: dict, recipe: Recipe) -> None:
    """See `refuse_other`."""
    trained = max(0, notes.get("trained", notes["epoch"] - 1))
    if recipe.train.epochs < max(1, trained):
        raise InputError(
            f"{folder} holds a training of {counted(trained, 'finished epoch')}, and epochs is {recipe.train.epochs}: "
            f"--resume cannot undo epochs; set epochs to {max(1, trained)} or more, or give another --out"
        )


def course_of(recipe: Recipe) -> list[float]:
    """What says how a training goes on from where it stands."""
    return [recipe.train.epochs, recipe.optim.learning_rate]


def with_module(encoder: Encoder, module: nn.Module) -> Encoder:
    """The same encoder with other weights."""
    return Encoder(module, encoder.preprocessing, encoder.features, [encoder.device])

"""Train an encoder with its head, and judge it at every epoch as the kernel would use it."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from kernel.bank import Bank
from kernel.encoders import Encoder, pick_dtype
from kernel.mounts import InputError
from local import team
from local.adaptation import (
    add_low_rank,
    copy_state,
    group_by_layer,
    interpolate,
    learning_state,
    set_training,
    unfreeze,
)
from local.batches import Batch, Draws, Mixing, Photos, collate, seed_all, seed_of
from local.checkpoints import (
    Checkpoint,
    flatten_optimiser,
    full_disk_named,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from local.competition import Labelled, places_of, sort_ids
from local.console import progress, say
from local.head import Head
from local.judging import SHARES, Judged, best_of, choose_share, judge, log_line, log_row, monitored
from local.recipe import BANK, Recipe

PROBE_RATE = 10.0  # times the learning rate: a head alone may go faster than an encoder that has much to lose
SAVE_SECONDS = 600  # between two checkpoints within an epoch
MOMENTUM = 0.9  # of SGD
# What may change when a training goes on; with anything else changed it would be another training.
FREE = ("epochs", "patience", "learning_rate", "batch_size", "accumulate", "views", "reference", "choose", *BANK)


@dataclass(frozen=True)
class Tuning:
    """What training came to.

    Attributes:
        log: the rows of log.csv, one per epoch.
        epoch: whose weights were mixed in; 0 where the encoder stays as it came.
        share: of them in the encoder, one of SHARES.
        head: that was trained with it, where the recipe keeps it.
        classes: of the head.
    """

    log: list[dict]
    epoch: int
    share: float
    head: Bank | None = None
    classes: Sequence[str] = ()


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
        yield
        self.is_training = False


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

    Epochs below 1 are the probe's, in which the head learns alone, so that its first large errors do not distort the
    features: LP-FT (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

    Attributes:
        kept: the encoder that is judged: the moving average, where the recipe wants one.
        epoch, batch: the next to be trained.
        log: the rows of log.csv so far.
    """

    def __init__(self, encoder: Encoder, head: Head, fit: Labelled, recipe: Recipe, data_sha256: str, folder: Path):
        self.recipe, self.head, self.folder, self.data_sha256 = recipe, head, folder, data_sha256
        self.encoder = self.kept = with_module(encoder, copy.deepcopy(encoder.module))
        self.classes = sort_ids(fit.class_ids)
        self.targets = places_of(fit.class_ids, self.classes)
        self.draws = Draws(self.targets, recipe, team.place())
        self.loader = DataLoader(
            Photos(fit.observations, encoder.preprocessing, recipe),
            batch_sampler=self.draws,
            collate_fn=collate,
            num_workers=os.cpu_count() or 1,
            persistent_workers=True,
            pin_memory=encoder.device.type == "cuda",
            generator=torch.Generator(),  # of its own, since every draw is seeded
        )
        self.mixing = Mixing(len(head.sizes), recipe, encoder.device)
        self.epoch, self.batch, self.losses, self.log = 1 - recipe.probe, 0, [0.0, 0.0], []
        self.average: ModelEmaV3 | None = None
        checkpoint = read_checkpoint(folder)
        if checkpoint:
            self.restore(checkpoint)
        else:
            self.begin_phase()

    def begin_phase(self) -> None:
        """Free what learns from here on, the head alone or the encoder with it, under an optimiser of its own."""
        recipe, module = self.recipe, self.encoder.module
        is_probe = self.epoch < 1
        rate = recipe.learning_rate * (PROBE_RATE if is_probe else 1)
        own = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        groups = [{"params": own, "lr": rate, "weight_decay": 0.0}] if own else []
        module.requires_grad_(False)
        if not is_probe:
            unfreeze(module, recipe.unfreeze)
            if recipe.lora:
                add_low_rank(module, recipe.lora)
            if recipe.gradient_checkpointing:
                module.set_grad_checkpointing(True)
            groups = [*group_by_layer(module, recipe), *groups]
            if recipe.ema:
                # The average starts short and lengthens, since a few shots make few steps.
                self.average = ModelEmaV3(module, recipe.ema, use_warmup=True)
                self.kept = with_module(self.encoder, self.average.module)
        if not groups:
            raise InputError('nothing learns: unfreeze = 0 needs prototypes = "learned"')
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        more = {"momentum": MOMENTUM} if recipe.optimiser == "sgd" else {}
        self.optimiser = create_optimizer_v2(
            groups, opt=recipe.optimiser, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **more
        )
        device = self.encoder.device
        uses_fp16 = device.type == "cuda" and pick_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16)
        self.learner: nn.Module = Learner(self.encoder, self.head)
        if team.place()[1] > 1:
            self.learner = DistributedDataParallel(self.learner)
        self.schedule = self.make_schedule(recipe.probe if is_probe else recipe.epochs)

    def make_schedule(self, epochs: int) -> CosineLRScheduler | ReduceLROnPlateau:
        """How the learning rate goes, over so many epochs; a plateau's is told again what the log knows."""
        recipe = self.recipe
        if recipe.schedule == "plateau":
            mode = "min" if recipe.monitor == "log_loss" else "max"
            plateau = ReduceLROnPlateau(self.optimiser, mode, recipe.decay, recipe.decay_patience)
            for row in self.log[1:]:
                plateau.step(monitored(row, recipe))
            return plateau
        steps = epochs * self.steps
        ramp = round(steps * recipe.warmup)
        cycle = max(1, math.ceil((steps - ramp) / (recipe.restarts + 1)))
        return CosineLRScheduler(
            self.optimiser, cycle, warmup_t=ramp, warmup_prefix=True, cycle_limit=recipe.restarts + 1, t_in_epochs=False
        )

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.draws) / self.recipe.accumulate)

    @property
    def learning_rate(self) -> float:
        """The present one, of what learns fastest."""
        return max(group["lr"] for group in self.optimiser.param_groups)

    def train_epoch(self, signals: "Signals") -> float:
        """The rest of the present epoch, and a checkpoint at its end.

        Returns:
            The mean loss; NaN, or infinity, where it became that, before it was followed.
        """
        set_training(self.encoder.module, self.recipe.pretrained)
        self.head.train()
        self.draws.start(self.epoch + self.recipe.probe, self.batch)
        saved, group = time.monotonic(), self.recipe.accumulate
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
                is_asked = team.any_of(signals.pending, self.encoder.device)
                if is_asked or is_last or time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if is_asked:
                    raise Stopped(self.where)
        total, seen = team.total_of(self.losses, self.encoder.device)
        return total / max(1.0, seen)

    def follow(self, batch: Batch, number: int, size: int, is_step: bool) -> float:
        """One batch, one of `size` of a step. Returns its loss."""
        device, recipe = self.encoder.device, self.recipe
        seed_all(seed_of(recipe.seed, self.epoch + recipe.probe, number, team.place()[0]))
        pixels = self.encoder.normalise(batch.photos, device)
        targets = torch.tensor(self.targets[batch.index.numpy()], device=device)
        pixels, targets = self.mixing(pixels, targets)
        syncs = is_step or not isinstance(self.learner, DistributedDataParallel)
        with contextlib.nullcontext() if syncs else self.learner.no_sync():
            loss = self.learner(pixels, batch.owners.to(device), targets.to(device), batch.asked.to(device))
            value = loss.item()
            if team.any_of(not math.isfinite(value), device):
                return value if not math.isfinite(value) else math.nan
            self.scaler.scale(loss / size).backward()
        self.losses = [self.losses[0] + value * len(batch.index), self.losses[1] + len(batch.index)]
        if is_step:
            self.step(number // recipe.accumulate + 1)
        return value

    def step(self, done: int) -> None:
        """Follow the gradient; `done` steps of the epoch are then done."""
        first = 1 - self.recipe.probe if self.epoch < 1 else 1
        if isinstance(self.schedule, CosineLRScheduler):
            self.schedule.step_update((self.epoch - first) * self.steps + done)
        self.scaler.unscale_(self.optimiser)
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
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
        """Turn a want of memory into one line, with what was learnt kept."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search("out of memory|not enough memory", str(error)):
                raise
            self.save()
            size, times = self.recipe.batch_size, self.recipe.accumulate
            raise InputError(
                f"out of memory in epoch {self.epoch}, batch {number}: go on with --resume --set "
                f"batch_size={max(1, size // 2)} --set accumulate={times * 2}"
            ) from error

    def save(self) -> None:
        """Write a checkpoint of where the training stands."""
        if not team.is_first():
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
            "scaler": self.scaler.state_dict(),
            "settings": settings_of(self.recipe),
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
        notes, settings = checkpoint.notes, settings_of(self.recipe)
        different = [key for key, value in notes["settings"].items() if settings.get(key) != value]
        if different:
            was = ", ".join(f"{key} = {notes['settings'][key]!r}" for key in different)
            raise InputError(f"{self.folder} was trained with {was}: go on with that, or give another --out")
        if notes["data_sha256"] != self.data_sha256:
            raise InputError(f"{self.folder} was trained on other data: go on with that, or give another --out")
        self.epoch, self.log, self.losses = notes["epoch"], notes["log"], notes["losses"]
        group, seen = self.recipe.accumulate, notes["batch"] * notes["batch_size"]
        is_done = seen >= len(self.targets)
        self.batch = len(self.draws) if is_done else seen // (self.draws.size * group) * group
        say(f"going on in epoch {self.epoch} after batch {self.batch} of {len(self.draws)}")
        self.begin_phase()
        self.encoder.module.load_state_dict(checkpoint.part("encoder"), strict=False)
        self.head.load_state_dict(checkpoint.part("head"))
        if self.average:
            self.average.module.load_state_dict(checkpoint.part("average"), strict=False)
        restore_optimiser(self.optimiser, checkpoint.part("optimiser"))
        if notes["scaler"]:
            self.scaler.load_state_dict(notes["scaler"])


def settings_of(recipe: Recipe) -> dict:
    """The settings that make a training what it is, as JSON gives them back."""
    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in FREE}
    return json.loads(json.dumps(settings))


def finetune(
    encoder: Encoder,
    fit: Labelled,
    validation: Labelled,
    recipe: Recipe,
    folder: Path,
    ranks: Sequence[np.ndarray | None] = (),
    data_sha256: str = "",
) -> Tuning:
    """Train in place, from the newest checkpoint in `folder`, if there is one.

    Every epoch is judged by a bank rebuilt from the tuned encoder, or by the head where the recipe keeps it. The best
    epoch's weights are then mixed with those that the encoder came with, in a share that validation chooses; with a
    share of 0 the encoder stays as it came. An encoder whose head is kept is that of the best epoch.

    Args:
        folder: for checkpoints.
        ranks: see `Head`.
        data_sha256: of what is learnt from, to go on with the same alone.

    Raises:
        InputError: the checkpoint is of another training; memory or disk do not suffice.
        Stopped: by the user or the system.
    """
    views, keeps_head = recipe.views[:1], recipe.matcher == "head"  # one view is enough to compare

    def judged(candidate: Encoder, head: Head | None = None) -> Judged:
        return judge(candidate, fit, validation, recipe, views, head.bank() if head else None)

    encoder.module.requires_grad_(False).eval()
    start = judged(encoder)
    before, fit = sort_ids(fit.class_ids), fit.subset(start.seen)
    classes = sort_ids(fit.class_ids)  # a class none of whose photos can be read is not learnt
    prototypes = start.bank.prototypes[places_of(np.array(classes, dtype=object), before)]
    centre = -start.bank.layers[0].bias if recipe.centre else torch.zeros(prototypes.shape[1])
    torch.manual_seed(recipe.seed)
    sizes = np.bincount(places_of(fit.class_ids, classes), minlength=len(classes))
    head = Head(centre, prototypes, sizes, recipe, ranks).to(encoder.device)
    refuse_large(recipe, encoder.module, head)
    if recipe.prototypes == "episodic" and sizes.max() < 2:
        raise InputError("no class has two observations: an episode needs one to learn from and one to ask")
    training = Training(encoder, head, fit, recipe, data_sha256, folder)
    if not training.log:
        training.log.append(log_row(0, "", 0.0, start.scores))
    say(f"epoch 0: {log_line(training.log[0])}")

    with Signals() as signals, events(folder.parent / "tensorboard") as note:
        while training.epoch <= recipe.epochs and not is_over(training.log, recipe):
            began = time.monotonic()
            with signals.held():
                mean_loss = training.train_epoch(signals)
            if not math.isfinite(mean_loss):
                say(
                    f"epoch {training.epoch}, batch {training.batch}: the loss is {mean_loss}; stopping with what was "
                    "learnt before; a smaller learning_rate may help"
                )
                break
            if training.epoch < 1:
                say(f"probe {training.epoch + recipe.probe}: loss {mean_loss:.4f}")
                training.next_epoch()
                continue
            present = judged(training.kept, head if keeps_head else None)
            rate = training.learning_rate
            row = log_row(training.epoch, mean_loss, rate, present.scores, time.monotonic() - began)
            training.log.append(row)
            say(f"epoch {training.epoch}: loss {mean_loss:.4f}  {log_line(row)}")
            note(row)
            if best_of(training.log[1:], recipe) == training.epoch - 1:
                keep_best(folder, training, present)
            if isinstance(training.schedule, ReduceLROnPlateau):
                training.schedule.step(monitored(row, recipe))
            if recipe.prototypes == "updated":
                head.prototypes.copy_(present.bank.prototypes)
                head.centre.copy_(-present.bank.layers[0].bias if recipe.centre else head.centre)
            training.next_epoch()
    return settle(encoder, training, start, judged)


def refuse_large(recipe: Recipe, *modules: nn.Module) -> None:
    """Keep to the recipe's limit of parameters.

    Raises:
        InputError: there are more.
    """
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    if recipe.most_parameters and count > recipe.most_parameters:
        raise InputError(
            f"{recipe.encoder} with its head has {count:,} parameters, most_parameters allows "
            f"{recipe.most_parameters:,}: take a smaller encoder"
        )


def is_over(log: Sequence[dict], recipe: Recipe) -> bool:
    """Whether validation has stood still for as long as patience says. A head is not compared with the start."""
    first = 1 if recipe.matcher == "head" and len(log) > 1 else 0
    over = len(log) - 1 - first - best_of(log[first:], recipe) >= recipe.patience
    if over:
        say(f"no better {recipe.monitor} for {recipe.patience} epochs: stopping")
    return over


def keep_best(folder: Path, training: Training, judged: Judged) -> None:
    """Write the weights of the epoch that is the best so far; those before it are kept as long as checkpoints are."""
    if not team.is_first():
        return
    tensors = {f"encoder.{name}": value.cpu().contiguous() for name, value in copy_state(training.kept.module).items()}
    tensors |= {f"head.{name}": value.cpu().contiguous() for name, value in training.head.state_dict().items()}
    older = sorted(folder.glob("best-*.safetensors"))
    partial = folder / ".best.partial"
    with full_disk_named(folder):
        save_file(tensors | {"hits": torch.tensor(judged.hits)}, partial)
        os.replace(partial, folder / f"best-{training.epoch:06}.safetensors")
    for path in older[:-1]:
        path.unlink(missing_ok=True)


def settle(encoder: Encoder, training: Training, start: Judged, judged: Callable[[Encoder], Judged]) -> Tuning:
    """Put into the encoder what is worth keeping of a training that is over."""
    log, recipe = training.log, training.recipe
    keeps_head = recipe.matcher == "head"
    if len(log) == 1:
        if keeps_head:
            raise InputError("nothing was learnt, so that there is no head to keep: try a smaller learning_rate")
        return Tuning(log, 0, 0.0)
    epoch = best_of(log[1:], recipe) + 1
    team.wait()  # until it is written
    best = Checkpoint(load_file(training.folder / f"best-{epoch:06}.safetensors"), {})
    after = {name: value.to(encoder.device) for name, value in best.part("encoder").items()}
    if keeps_head:
        encoder.module.load_state_dict(after)
        training.head.load_state_dict(best.part("head"))
        say(f"chosen: epoch {epoch}, with its head")
        return Tuning(log, epoch, 1.0, training.head.bank(), training.classes)
    before, mixes = copy_state(encoder.module), []
    for share in SHARES[1:-1]:
        encoder.module.load_state_dict(interpolate(before, after, share))
        mixes.append(judged(encoder))
        say(f"{share:.0%} of epoch {epoch}: {log_line(mixes[-1].scores)}")
    share = choose_share([start, *mixes, Judged(start.bank, best.tensors["hits"].numpy(), {})])
    encoder.module.load_state_dict(interpolate(before, after, share))
    say(f"chosen: {share:.0%} of epoch {epoch}" if share else "chosen: the encoder as it came")
    return Tuning(log, epoch if share else 0, share)


def with_module(encoder: Encoder, module: nn.Module) -> Encoder:
    """The same encoder with other weights."""
    return Encoder(module, encoder.preprocessing, encoder.features, [encoder.device])


@contextlib.contextmanager
def events(folder: Path) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row of the log to TensorBoard's events."""
    if not team.is_first():
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which only training should pay

    with SummaryWriter(str(folder)) as writer:

        def note(row: dict) -> None:
            for name, value in row.items():
                if name != "epoch" and value != "":
                    writer.add_scalar(name, value, row["epoch"])

        yield note

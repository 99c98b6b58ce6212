"""Train an encoder with its head, judge it at every epoch as the kernel would use it, and keep what is worth it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kernel.bank import Bank
from kernel.encoders import Encoder
from kernel.inputs import InputError
from local.base import distributed
from local.base.console import counted, say
from local.base.files import write_tensors
from local.data.competition import Labelled, places_of, sort_ids
from local.recipes.recipe import Recipe
from local.recipes.settings import EncoderSettings, TrainSettings
from local.training.adaptation import copy_state, interpolate
from local.training.checkpoints import Checkpoint, full_disk_named, memory_named
from local.training.checks import is_first
from local.training.evaluation import (
    MONITORED,
    SHARES,
    Judged,
    Unusable,
    best_of,
    choose_share,
    judge,
    log_line,
    log_row,
    monitored,
    told_choice,
)
from local.training.head import Head
from local.training.trainer import Signals, Training


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
    train, views, keeps_head = recipe.train, recipe.bank.views[:1], recipe.keeps_head  # one view is enough to compare

    def judged(candidate: Encoder, head: Head | None = None) -> Judged:
        return judge(candidate, fit, validation, views, recipe.bank.pooling, head.bank() if head else None)

    encoder.module.requires_grad_(False).eval()
    with memory_named("judging the encoder as it came", folder):
        start = judged(encoder)
    if not start.seen.all():
        say(f"{counted(int((~start.seen).sum()), 'observation')} without a readable photo: nothing is learnt from that")
    before, fit = sort_ids(fit.class_ids), fit.subset(start.seen)
    classes = sort_ids(fit.class_ids)  # a class none of whose photos can be read is not learnt
    kept = places_of(np.array(classes, dtype=object), before)
    prototypes, ranks = start.bank.prototypes[kept], [groups if groups is None else groups[kept] for groups in ranks]
    centre = -start.bank.layers[0].bias
    torch.manual_seed(train.seed)
    sizes = np.bincount(places_of(fit.class_ids, classes), minlength=len(classes))
    with memory_named("making the head", folder):
        head = Head(centre, prototypes, sizes, train, ranks, recipe.bank.pooling).to(encoder.device)
    refuse_large(recipe.encoder, encoder.module, head)
    if train.prototypes == "episodic" and sizes.max() < 2:
        raise InputError("no class has two observations: an episode needs one to learn from and one to ask")
    with memory_named("copying the encoder to train it", folder):
        training = Training(encoder, head, fit, recipe, data_sha256, folder)
    if not training.log:
        training.log.append(log_row(0, "", 0.0, start.scores))
    say(f"epoch 0: {log_line(training.log[0])}")

    with Signals() as signals, events(folder.parent / "tensorboard") as note:
        while training.epoch <= train.epochs and not is_over(training.log, train, keeps_head, training.since):
            began = time.monotonic()
            with signals.held(), memory_named(f"training epoch {training.epoch}", folder):
                mean_loss = training.train_epoch(signals)
            if not math.isfinite(mean_loss):
                say(
                    f"epoch {training.epoch}, batch {training.batch}: the loss is {mean_loss}; stopping with what was "
                    "learnt before; a smaller learning_rate may help"
                )
                break
            if training.epoch < 1:
                say(f"head-only epoch {training.epoch + train.head_only_epochs}: loss {mean_loss:.4f}")
                with memory_named("freeing the encoder's weights to learn", folder):
                    training.next_epoch()
                continue
            try:
                with memory_named(f"judging epoch {training.epoch}", folder):
                    present = judged(training.kept, head if keeps_head else None)
            except Unusable as error:
                kept = "stopping with what was learnt before; a smaller learning_rate may help"
                say(f"epoch {training.epoch}: {error}; {kept}")
                break
            rate = training.learning_rate
            row = log_row(training.epoch, mean_loss, rate, present.scores, time.monotonic() - began)
            training.log.append(row)
            say(f"epoch {training.epoch}: loss {mean_loss:.4f}  {log_line(row)}")
            note(row)
            if best_of(training.log[1:], train.monitor) == training.epoch - 1:
                keep_best(folder, training, present)
            if isinstance(training.schedule, ReduceLROnPlateau):
                training.schedule.step(monitored(row, train.monitor))
            if train.prototypes == "updated":
                head.prototypes.copy_(present.bank.prototypes)
                head.centre.copy_(-present.bank.layers[0].bias)
            training.next_epoch()
    with memory_named("mixing the trained weights with those that the encoder came with", folder):
        return settle(encoder, training, start, judged)


def refuse_large(settings: EncoderSettings, *modules: nn.Module) -> None:
    """Check the limit of parameters.

    Raises:
        InputError: there are more.
    """
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    if settings.max_parameters and count > settings.max_parameters:
        raise InputError(
            f"{settings.encoder} with its head has {count:,} parameters, max_parameters allows "
            f"{settings.max_parameters:,}: use a smaller encoder"
        )


def is_over(log: Sequence[dict], train: TrainSettings, keeps_head: bool, since: int) -> bool:
    """Whether validation has stood still for as long as patience says. A head is not compared with the start.

    Args:
        since: rows of the log that were there when the present course began.
    """
    first = 1 if keeps_head and len(log) > 1 else 0
    best = first + best_of(log[first:], train.monitor)
    over = min(len(log) - since, len(log) - 1 - best) >= train.patience
    if over:
        monitor = MONITORED.get(train.monitor, train.monitor)
        say(
            f"stopping after epoch {log[-1]['epoch']} of {train.epochs}: {monitor} has not been better than the "
            f"{monitored(log[best], train.monitor):.3f} of epoch {log[best]['epoch']} for "
            f"{counted(train.patience, 'epoch')} (patience)"
        )
    return over


def keep_best(folder: Path, training: Training, judged: Judged) -> None:
    """Write the weights of the epoch that is the best so far; those before it are kept as long as checkpoints are."""
    if not is_first():
        return
    tensors = {f"encoder.{name}": value for name, value in copy_state(training.kept.module).items()}
    tensors |= {f"head.{name}": value for name, value in training.head.state_dict().items()}
    older = sorted(folder.glob("best-*.safetensors"))
    with full_disk_named(folder):
        write_tensors(tensors | {"hits": torch.tensor(judged.hits)}, folder / f"best-{training.epoch:06}.safetensors")
    for path in older[:-1]:
        path.unlink(missing_ok=True)


def settle(encoder: Encoder, training: Training, start: Judged, judged: Callable[[Encoder], Judged]) -> Tuning:
    """Put into the encoder what is worth keeping of a training that is over."""
    log, monitor, keeps_head = training.log, training.recipe.train.monitor, training.recipe.keeps_head
    if len(log) == 1:
        if keeps_head:
            raise InputError("nothing was learnt, so that there is no head to keep: try a smaller learning_rate")
        say("chosen: the encoder as it came: no epoch was finished")
        return Tuning(log, 0, 0.0)
    epoch = best_of(log[1:], monitor) + 1
    distributed.barrier()  # until it is written
    path = training.folder / f"best-{epoch:06}.safetensors"
    try:
        best = Checkpoint(load_file(path), {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}; remove {training.folder.parent} and train again") from error
    after = {name: value.to(encoder.device) for name, value in best.part("encoder").items()}
    if keeps_head:
        encoder.module.load_state_dict(after)
        training.head.load_state_dict(best.part("head"))
        say(
            f"chosen: epoch {epoch}, with its head: {MONITORED.get(monitor, monitor)} is "
            f"{monitored(log[epoch], monitor):.3f}, the best of "
            f"{counted(len(log) - 1, 'epoch')}; a trained head is not compared with the encoder as it came"
        )
        return Tuning(log, epoch, 1.0, training.head.bank(), training.classes)
    before, mixes = copy_state(encoder.module), []
    for share in SHARES[1:-1]:
        encoder.module.load_state_dict(interpolate(before, after, share))
        mixes.append(judged(encoder))
        say(f"{share:.0%} of epoch {epoch}: {log_line(mixes[-1].scores)}")
    every = [start, *mixes, Judged(start.bank, best.tensors["hits"].numpy(), {})]
    share = choose_share(every)
    encoder.module.load_state_dict(interpolate(before, after, share))
    say(told_choice(every, share, epoch))
    return Tuning(log, epoch if share else 0, share)


@contextlib.contextmanager
def events(folder: Path) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row of the log to TensorBoard's events."""
    if not is_first():
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which only training should pay

    with SummaryWriter(str(folder)) as writer:

        def note(row: dict) -> None:
            for name, value in row.items():
                if name != "epoch" and value != "":
                    writer.add_scalar(name, value, row["epoch"])

        yield note

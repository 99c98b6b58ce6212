"""Fine-tune an encoder: train it, evaluate every epoch as the kernel would, keep what validation finds better."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kernel.bank import Bank
from kernel.forward import Encoder
from kernel.inputs import InputError
from local.banks.estimators import ABSENT
from local.base import distributed
from local.base.console import counted, say
from local.data.observations import LabelledObservations, Split, encode_labels
from local.recipes.recipe import Recipe
from local.recipes.settings import EncoderSettings
from local.training.adaptation import copy_state
from local.training.checkpoints import Checkpoint, memory_named
from local.training.evaluation import (
    MONITOR_NAMES,
    Evaluation,
    Evaluator,
    NoUsableEmbedding,
    best_row,
    monitored_score,
)
from local.training.head import Head
from local.training.log import describe_scores, log_row, tensorboard
from local.training.mixing import MIX_RATIOS, choose_mix_ratio, describe_choice, interpolate_weights
from local.training.signals import StopSignals
from local.training.trainer import Trainer


@dataclass(frozen=True)
class Tuning:
    """The result of a fine-tuning.

    Attributes:
        log: the rows of log.csv, one for each epoch.
        epoch: whose weights are kept; 0 where the encoder is unchanged.
        mix_ratio: of these weights in the encoder, one of MIX_RATIOS; the rest are those before training.
        head: the bank that was trained with the encoder, where the recipe keeps it.
        classes: of the head.
        reason: why these weights are kept, as printed; empty without training.
    """

    log: list[dict]
    epoch: int
    mix_ratio: float
    head: Bank | None = None
    classes: Sequence[str] = ()
    reason: str = ""


def finetune(encoder: Encoder, split: Split, recipe: Recipe, folder: Path, data_sha256: str = "") -> Tuning:
    """Fine-tune an encoder in place, from the newest checkpoint in `folder` if there is one.

    Every epoch is evaluated by a bank of the class means of the encoder at that epoch, or by the head where the recipe
    keeps it. The weights of the best epoch are then interpolated with those before training, in the ratio that
    validation chooses; with a ratio of 0 the encoder is unchanged. Where the head is kept, the encoder is that of the
    best epoch.

    Args:
        split: which observations to train on, and which to validate on.
        folder: for checkpoints.
        data_sha256: of the data, by which a training that is resumed knows them again.

    Raises:
        InputError: the checkpoint is of another training; memory or disk do not suffice.
        Stopped: by the user or the system.
    """
    settings = recipe.train
    encoder.module.requires_grad_(False).eval()
    # One view suffices to compare epochs.
    views, precision = recipe.bank.views[:1], recipe.encoder.precision
    evaluator = Evaluator(split.train_set, split.validation_set, views, recipe.bank.pooling, precision)
    with memory_named("evaluating the encoder before training", folder):
        initial = evaluator.evaluate(encoder, "epoch 0")
    if not initial.has_embedding.all():
        say(f"{counted(int((~initial.has_embedding).sum()), 'observation')} without a readable photo: not trained on")
    evaluator = dataclasses.replace(evaluator, train=evaluator.train.subset(initial.has_embedding))
    with memory_named("making the head", folder):
        head = make_head(evaluator.train, initial, recipe).to(encoder.device)
    refuse_large(recipe.encoder, [encoder.module, head])
    with memory_named("copying the encoder to train it", folder):
        trainer = Trainer(encoder, head, evaluator.train, recipe, data_sha256, folder)
    if not trainer.log:
        trainer.log.append(log_row(0, "", 0.0, initial.scores))
    say(f"epoch 0: {describe_scores(trainer.log[0])}")

    with StopSignals() as signals, tensorboard(folder.parent / "tensorboard", len(trainer.log)) as write_row:
        while trainer.epoch <= settings.epochs and not is_patience_over(trainer):
            started = time.monotonic()
            with signals.lost_workers_named(folder), memory_named(f"training epoch {trainer.epoch}", folder):
                loss = trainer.train_epoch(signals)
            if not math.isfinite(loss):
                say(describe_divergence(f"epoch {trainer.epoch}, batch {trainer.batch}: the loss is {loss}"))
                break
            if trainer.is_head_only:
                say(f"head-only epoch {trainer.epoch + settings.head_only_epochs}: loss {loss:.4f}")
                with memory_named("unfreezing the encoder", folder):
                    trainer.next_epoch()
                continue
            try:
                with memory_named(f"evaluating epoch {trainer.epoch}", folder):
                    evaluation = evaluate_epoch(trainer, evaluator, signals)
            except NoUsableEmbedding as error:
                say(describe_divergence(f"epoch {trainer.epoch}: {error}"))
                break
            write_row(finish_epoch(trainer, evaluation, loss, time.monotonic() - started))
        else:  # a training that has diverged is not worth continuing from where it is
            trainer.save()
    with memory_named("interpolating the weights before and after training", folder):
        return keep_best_weights(encoder, trainer, evaluator, initial)


def evaluate_epoch(trainer: Trainer, evaluator: Evaluator, signals: StopSignals) -> Evaluation:
    """Evaluate the weights at the end of an epoch. If that is interrupted or fails, a checkpoint is written first.

    Raises:
        NoUsableEmbedding: the training has diverged; no checkpoint is written.
        Stopped: by the user or the system.
    """
    started = time.monotonic()
    try:
        with signals.immediate():
            head = trainer.head.bank() if trainer.recipe.keeps_head else None
            return evaluator.evaluate(trainer.evaluated, f"epoch {trainer.epoch}", head)
    except NoUsableEmbedding:
        raise
    except BaseException:
        trainer.save()
        raise
    finally:
        trainer.seconds["validation"] = time.monotonic() - started


def finish_epoch(trainer: Trainer, evaluation: Evaluation, loss: float, seconds: float) -> dict:
    """Log an epoch, keep its weights if they are the best so far, and go to the next. Returns the row of the log."""
    epoch, settings = trainer.epoch, trainer.recipe.train
    row = log_row(epoch, loss, trainer.optimization.learning_rate, evaluation.scores, seconds, trainer.seconds)
    trainer.log.append(row)
    say(f"epoch {epoch}: loss {loss:.4f}  {describe_scores(row)}")
    if best_row(trainer.log[1:], settings.monitor) == epoch - 1:
        trainer.keep_best(evaluation)
    trainer.optimization.end_epoch(monitored_score(row, settings.monitor))
    if settings.prototypes == "updated":
        trainer.head.prototypes.copy_(evaluation.bank.prototypes)
        trainer.head.centre.copy_(-evaluation.bank.layers[0].bias)
    trainer.next_epoch()
    return row


def make_head(train: LabelledObservations, initial: Evaluation, recipe: Recipe) -> Head:
    """A head that starts at the class means.

    Args:
        train: observations that have an embedding; a class without any is not trained on.
        initial: the evaluation of the encoder, whose bank may have more classes than `train`.
    """
    class_counts = np.bincount(encode_labels(train.class_ids, train.classes), minlength=len(train.classes))
    if recipe.train.prototypes == "episodic" and class_counts.max() < 2:
        raise InputError(
            "no class has two observations: an episode needs one for the support set and one for the queries"
        )
    prototypes, centre = initial.bank.prototypes[initial.bank.bias > ABSENT], -initial.bank.layers[0].bias
    rank_groups = list(train.group_by_rank(train.classes).values())
    torch.manual_seed(recipe.train.seed)
    return Head(centre, prototypes, class_counts, recipe.train, rank_groups, recipe.bank.pooling)


def refuse_large(settings: EncoderSettings, modules: Sequence[nn.Module]) -> None:
    """Check the limit on parameters.

    Raises:
        InputError: there are more.
    """
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    if settings.max_parameters and count > settings.max_parameters:
        raise InputError(
            f"{settings.name} with its head has {count:,} parameters, max_parameters allows "
            f"{settings.max_parameters:,}: use a smaller encoder"
        )


def describe_divergence(what: str) -> str:
    """What ended a training early."""
    return f"{what}; stopping; the epochs before are not lost; a smaller learning_rate may help"


def is_patience_over(trainer: Trainer) -> bool:
    """Whether the score has not improved for `patience` epochs; says so. A head is not compared with epoch 0."""
    log, settings = trainer.log, trainer.recipe.train
    first = 1 if trainer.recipe.keeps_head and len(log) > 1 else 0
    best = first + best_row(log[first:], settings.monitor)
    if min(len(log) - trainer.schedule_start, len(log) - 1 - best) < settings.patience:
        return False
    say(
        f"stopping after epoch {log[-1]['epoch']} of {settings.epochs}: "
        f"{MONITOR_NAMES.get(settings.monitor, settings.monitor)} has not been better than the "
        f"{monitored_score(log[best], settings.monitor):.3f} of epoch {log[best]['epoch']} for "
        f"{counted(settings.patience, 'epoch')} (patience)"
    )
    return True


def keep_best_weights(encoder: Encoder, trainer: Trainer, evaluator: Evaluator, initial: Evaluation) -> Tuning:
    """Give the encoder the weights that validation finds best, and say which they are and why.

    Args:
        encoder: as it was before training.
        initial: its evaluation.
    """
    log, monitor = trainer.log, trainer.recipe.train.monitor
    if len(log) == 1:
        if trainer.recipe.keeps_head:
            raise InputError("no epoch was finished, so there is no trained head to keep: try a smaller learning_rate")
        reason = "kept: the encoder before training, unchanged: no epoch was finished"
        say(reason)
        return Tuning(log, 0, 0.0, reason=reason)
    epoch = best_row(log[1:], monitor) + 1
    best = Checkpoint(distributed.broadcast_object(trainer.best), {})
    before = copy_state(encoder.module)
    after = before | {name: value.to(encoder.device) for name, value in best.part("encoder").items()}
    if trainer.recipe.keeps_head:
        encoder.module.load_state_dict(after)
        trainer.head.load_state_dict(best.part("head"))
        reason = (
            f"kept: the encoder and head of epoch {epoch}: {MONITOR_NAMES.get(monitor, monitor)} is "
            f"{monitored_score(log[epoch], monitor):.3f}, the best of {counted(len(log) - 1, 'epoch')}; a trained head "
            "is not compared with the encoder before training"
        )
        say(reason)
        return Tuning(log, epoch, 1.0, trainer.head.bank(), trainer.classes, reason)
    evaluations = [initial]
    for mix_ratio in MIX_RATIOS[1:-1]:
        encoder.module.load_state_dict(interpolate_weights(before, after, mix_ratio))
        what = f"{mix_ratio:.0%} of the weights of epoch {epoch}"
        evaluations.append(evaluator.evaluate(encoder, what))
        say(f"{what}: {describe_scores(evaluations[-1].scores)}")
    evaluations.append(Evaluation(initial.bank, best.tensors["hits"].numpy(), {}))
    mix_ratio = choose_mix_ratio(evaluations)
    encoder.module.load_state_dict(interpolate_weights(before, after, mix_ratio))
    reason = describe_choice(evaluations, mix_ratio, epoch)
    say(reason)
    return Tuning(log, epoch if mix_ratio else 0, mix_ratio, reason=reason)

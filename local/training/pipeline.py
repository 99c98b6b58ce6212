"""Make a run, step by step: load, split, tune the encoder, select the bank, export."""

import dataclasses
import time
from pathlib import Path

from kernel.encoders import fitting_dtype
from kernel.inputs import InputError
from kernel.photos import UNREADABLE_FILE, write_unreadable
from local.banks.estimators import expand_to_classes
from local.banks.selection import BankSelection, plan_bank
from local.base.console import Progress, say
from local.base.files import write_json
from local.base.run_folder import CACHE, REFERENCE_FILE
from local.data.concatenated_encoders import ConcatenatedEncoders
from local.data.observations import Split, encode_labels, split_for_validation
from local.encoders.variants import pooled_parts
from local.recipes.recipe import Recipe
from local.recipes.settings import SearchSettings
from local.training.checkpoints import full_disk_named, memory_named
from local.training.checks import CHECKPOINTS, is_first, partial_of
from local.training.export import export_run, refuse_unopenable, write_reference
from local.training.finetuning import Tuning, finetune
from local.training.folder import run_folder
from local.training.inputs import (
    Inputs,
    describe_data,
    describe_training,
    embed_class_names,
    load_inputs,
    move_to_device,
)
from local.training.log import peak_memory_gb
from local.training.resuming import is_done, refuse_other_checkpoints
from local.training.threshold import choose_threshold


def make_run(recipe: Recipe, data: Path, out: Path, uses_val: bool, resumes: bool) -> None:
    """Make the run `out`; see `local.training.run.train_run`, which has checked the arguments."""
    if resumes and out.exists() and is_done(out, recipe, data, uses_val):
        return
    inputs = load(recipe, data, out, uses_val)
    with run_folder(out) as folder:
        fill_folder(folder, out.parent / CACHE, inputs)
    say(f"{out}: done")


def load(recipe: Recipe, data: Path, out: Path, uses_val: bool) -> Inputs:
    """Load the encoder and the data, and check all that can be checked before the first photo is embedded."""
    checkpoints = partial_of(out) / CHECKPOINTS
    with Progress("loading the encoder and the data"):
        inputs = load_inputs(recipe, data, uses_val, checkpoints)
    refuse_other_checkpoints(out, inputs.recipe, inputs.data_sha256)
    if is_first():
        what = "opening the encoder as the kernel will"
        with Progress(what), full_disk_named(checkpoints), memory_named(what, checkpoints):
            refuse_unopenable(inputs, out)
    inputs = move_to_device(inputs, checkpoints)
    return embed_class_names(inputs, checkpoints) if is_first() else inputs


def fill_folder(folder: Path, cache: Path, inputs: Inputs) -> None:
    """Make a run of what was loaded, and write it into a folder.

    Args:
        cache: the folder of embeddings.
    """
    started, recipe = time.monotonic(), inputs.recipe
    say(f"{describe_data(inputs.labelled)}; {recipe.encoder.name} on {inputs.encoders[0].device.type}")
    split = split_for_validation(inputs.labelled, recipe.train.seed)
    inputs, tuning = tune(inputs, split, folder / CHECKPOINTS)
    is_tuned = any(inputs.competition_sha256 in spec.learnt_from for spec in inputs.specs)
    plan = plan_bank(split, recipe.bank.reference, is_tuned, recipe.train.monitor == "macro_f1", recipe.train.seed)
    head = expand_to_classes(tuning.head, tuning.classes, plan.classes) if tuning.head else None
    uses_parts = recipe.bank.pool_part != "all" or "pool_part" in recipe.search.choose
    encoders = ConcatenatedEncoders(inputs.encoders, tuple(map(pooled_parts, inputs.specs)) if uses_parts else ())
    texts = inputs.texts
    if texts is not None:
        texts = texts[encode_labels(plan.classes, inputs.labelled.classes)]
    selection = BankSelection(recipe.bank, recipe.search.choose, plan, encoders, cache, head, texts)
    # Neither the run's recipe nor its report say that a setting was chosen which it does not have.
    chosen = dataclasses.replace(recipe, search=SearchSettings(selection.choose))
    inputs = dataclasses.replace(inputs, recipe=chosen)
    selection.embed_all()
    if not is_first():
        return
    write_unreadable(list(selection.unreadable.items()), folder / UNREADABLE_FILE)
    bank, threshold = selection.select(), None
    if inputs.labelled.competition.grids:
        threshold, scores = choose_threshold(selection, bank)
        bank = dataclasses.replace(bank, scores=bank.scores | scores)
    export_run(folder, inputs, tuning, plan, bank, threshold)
    write_reference(plan, selection.embed_reference(bank.settings), folder / REFERENCE_FILE)
    metrics = {
        "validation": bank.scores,
        "validation_of_the_chosen_settings": bank.optimistic_scores,
        "chosen_epoch": tuning.epoch,
        "mix_ratio": tuning.mix_ratio,
        "kept": tuning.reason.removeprefix("kept: "),
        "seconds": round(time.monotonic() - started, 1),
        "memory_gb": peak_memory_gb(),
    }
    write_json(metrics, folder / "metrics.json")


def tune(inputs: Inputs, split: Split, checkpoints: Path) -> tuple[Inputs, Tuning]:
    """Train the encoder if the recipe says so, and convert all encoders to the kernel's precision.

    The bank is made after that, so that it is compared with embeddings of the same precision.

    Returns:
        The inputs, whose `specs` say whether an encoder has learnt from this competition, now or in an earlier run;
        and what the training came to.

    Raises:
        InputError: there is nothing to validate on, or the encoder has learnt from it in an earlier run.
    """
    recipe, source, specs = inputs.recipe, inputs.competition_sha256, inputs.specs
    part = (inputs.data_sha256, recipe.train.seed)
    for one, spec in zip(recipe.encoder.each, specs, strict=True):
        if spec.learnt_from.get(source, part) != part and not inputs.labelled.has_val:
            raise InputError(
                f"{one.name} was trained on observations that would validate it here: give the seed and the subset of "
                "its training"
            )
    tuning = Tuning([], 0, 0.0)
    if recipe.train.epochs:
        say(describe_training(split, recipe.train))
        used = split.largest_classes(recipe.train.max_classes)
        [encoder] = inputs.encoders
        tuning = finetune(encoder, used, recipe, checkpoints, inputs.data_sha256)
    if tuning.mix_ratio:
        specs = tuple(dataclasses.replace(spec, learnt_from=spec.learnt_from | {source: part}) for spec in specs)
    for encoder in inputs.encoders:
        encoder.module.to(fitting_dtype(encoder.module, encoder.device, recipe.encoder.precision))
    return dataclasses.replace(inputs, specs=specs), tuning

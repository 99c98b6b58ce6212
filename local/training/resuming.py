"""Whether a training may be resumed: only with its own data and settings, but for those that may change."""

from pathlib import Path

from kernel.inputs import InputError
from local.base.console import counted
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, current_names, differences, settings_of
from local.recipes.settings import CANDIDATES

KEEP = "give another --out, or keep the old settings"
# What may change when a training is resumed; with anything else changed it would be another training.
CHANGEABLE = (
    *("epochs", "patience", "learning_rate", "batch_size", "accumulate", "gradient_checkpointing"),
    *("reference", "choose", *(name for name in CANDIDATES if name not in ("resize_mode", "matcher"))),
)


def refuse_other_training(folder: Path, notes: dict, recipe: Recipe, data_sha256: str) -> None:
    """Check that a checkpoint is one of this training.

    Args:
        folder: of the checkpoints, for the message.
        notes: of the newest checkpoint.

    Raises:
        InputError: it was made with other settings or data, or more epochs are trained than the recipe has.
    """
    before, now = current_names(notes["settings"]), settings_of(recipe, CHANGEABLE)
    found = differences(before, now, (notes["weights"], weights_digest(recipe.encoder.encoder)))
    different = [*found.values(), *([] if notes["data_sha256"] == data_sha256 else ["the data have changed"])]
    if different:
        raise InputError(f"{folder} holds another training: {'; '.join(different)}; {KEEP}")
    refuse_fewer_epochs(folder, notes, recipe)


def refuse_fewer_epochs(folder: Path, notes: dict, recipe: Recipe) -> None:
    """Check that the recipe has at least as many epochs as are trained; see `refuse_other_training`."""
    trained = max(0, notes["trained"])
    if recipe.train.epochs < max(1, trained):
        raise InputError(
            f"{folder} holds a training of {counted(trained, 'finished epoch')}, and epochs is {recipe.train.epochs}: "
            f"--resume cannot undo epochs; set epochs to {max(1, trained)} or more, or give another --out"
        )

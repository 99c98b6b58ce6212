"""Whether a training may be resumed: only with the same data, and the same settings except those that may change."""

from collections.abc import Mapping
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, GivenSettings, read_manifest
from local.base.console import counted, say
from local.data.competition import read_competition
from local.data.observations import select_observations
from local.encoders.load import weights_digest
from local.recipes.recipe import Recipe, differences, settings_of
from local.recipes.settings import CANDIDATES
from local.training.checkpoints import read_notes
from local.training.checks import CHECKPOINTS, has_checkpoint, partial_of

KEEP = "give another --out, or keep the old settings"
# What may change when a training is resumed; with anything else changed it would be another training.
CHANGEABLE = (
    *("epochs", "patience", "learning_rate", "batch_size", "accumulate", "gradient_checkpointing"),
    *("reference", "choose", *(name for name in CANDIDATES if name not in ("resize_mode", "matcher"))),
)


def is_done(out: Path, recipe: Recipe, data: Path, uses_val: bool) -> bool:
    """Whether the run `out` has these settings and data already.

    Raises:
        InputError: it has others, and cannot be continued with these.
    """
    member = read_manifest(out / MANIFEST).members[0]
    trained = settings_of(Recipe()) | member.recipe  # a setting that is newer than the run had its default
    was = trained | member.given.recipe
    changed = changed_settings(trained, member.given, recipe)
    whole = read_competition(data, trained["resolution"])
    used = select_observations(whole, uses_val, *(was[name] for name in ("subset", "seed", "exclude")))
    if used.digest() != member.data_sha256:
        changed["data"] = f"{data} is not the data that it was made of, or has changed since"
    if not changed:
        say(f"{out} is done already, with the same settings and data: to train it further, give more epochs")
        return True
    notes = read_notes(out / CHECKPOINTS) if was["epochs"] and recipe.train.epochs else None
    fixed = [line for key, line in changed.items() if not notes or key not in CHANGEABLE]
    if fixed:
        why = "cannot be continued" if notes else "is finished and holds no training that could be continued"
        raise InputError(f"{out} {why}: {'; '.join(fixed)}; {KEEP}")
    refuse_fewer_epochs(out, notes, recipe)
    say(f"{out}: continuing its training; {'; '.join(changed.values())}")
    return False


def changed_settings(trained: Mapping, given: GivenSettings, recipe: Recipe) -> dict[str, str]:
    """The settings in which a recipe differs from those a finished run was given, by name, as lines.

    Args:
        trained: the run's settings, with all that was resolved and selected.
    """
    now = settings_of(recipe)
    changed = differences(trained | given.recipe, now, (given.weights, weights_digest(recipe.encoder)))
    for key in ("resize_mode", "resolution"):  # what "encoder" and "auto" stood for may be given by its own name
        if key not in trained["choose"] and now[key] == trained[key]:
            changed.pop(key, None)
    return changed


def refuse_other_checkpoints(out: Path, recipe: Recipe, data_sha256: str) -> None:
    """Check that the checkpoints to resume from, if any, are of this training; see `refuse_other_training`."""
    folders = (partial_of(out) / CHECKPOINTS, out / CHECKPOINTS)
    folder = next(filter(has_checkpoint, folders), None)
    notes = read_notes(folder) if folder else None
    if notes:
        refuse_other_training(folder, notes, recipe, data_sha256)


def refuse_other_training(folder: Path, notes: dict, recipe: Recipe, data_sha256: str) -> None:
    """Check that a checkpoint is one of this training.

    Args:
        folder: of the checkpoints, for the message.
        notes: of the newest checkpoint.

    Raises:
        InputError: it was made with other settings or data, or more epochs are trained than the recipe has.
    """
    now = settings_of(recipe, CHANGEABLE)
    found = differences(notes["settings"], now, (notes["weights"], weights_digest(recipe.encoder)))
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

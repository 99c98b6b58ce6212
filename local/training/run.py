"""Train a run: the folder that training leaves, complete or not at all."""

from pathlib import Path

from local.base.console import Progress
from local.recipes.recipe import Recipe
from local.training.checks import check_start, named


def train_run(recipe: Recipe, data: Path, out: Path, uses_val: bool = True, resumes: bool = False) -> None:
    """Train by a recipe and leave a run folder; after an error `out` is as it was.

    A training that is interrupted leaves its checkpoints in a hidden folder beside `out`. Under torchrun, all its
    processes call this.

    Args:
        uses_val: False trains as if the competition had no val, so that val can be the test.
        resumes: continue from the checkpoints of an interrupted training, or of a finished one with more epochs; where
            there are none, begin.

    Raises:
        InputError: something that the user gave is wrong, or `out` exists already.
    """
    out = named(out)
    check_start(recipe, data, out, resumes)
    with Progress("loading torch and the other libraries"):
        # Imported here: torch takes seconds, and mistakes must be answered immediately.
        from local.base import distributed
        from local.training.pipeline import make_run

    with distributed.process_group():
        make_run(recipe, data, out, uses_val, resumes)

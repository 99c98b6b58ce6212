"""The folder of drawings that `local/benchmark.py omniglot` reads. Without torch, so that a mistake is told at once."""

from pathlib import Path

from kernel.inputs import InputError
from local.base.console import counted


def find_alphabets(folder: Path) -> list[Path]:
    """The folders of the alphabets in `alphabet/character/drawing.png`, by name.

    Raises:
        InputError: there are fewer than two.
    """
    alphabets = sorted({drawing.parents[1] for drawing in folder.rglob("*/*/*.png")})
    if len(alphabets) < 2:
        raise InputError(
            f"{folder} holds {counted(len(alphabets), 'alphabet')}: give a folder of alphabet/character/drawing.png"
        )
    return alphabets

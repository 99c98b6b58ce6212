"""Find the alphabets for `local/benchmark.py omniglot`, without torch, so that mistakes are answered immediately."""

from pathlib import Path

from kernel.inputs import InputError
from local.base.console import counted


def find_alphabets(folder: Path) -> list[Path]:
    """The folders of the alphabets in `folder`, which holds `alphabet/character/drawing.png`.

    Raises:
        InputError: there are fewer than two.
    """
    alphabets = sorted({drawing.parents[1] for drawing in folder.rglob("*/*/*.png")})
    if len(alphabets) < 2:
        raise InputError(
            f"{folder} holds {counted(len(alphabets), 'alphabet')}: give a folder of alphabet/character/drawing.png"
        )
    return alphabets

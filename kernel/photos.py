"""Decode photos in threads, each behind its own guard: a photo that cannot be read costs only itself."""

import csv
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from kernel.manifest import Preprocessing

# Raise it when a photo or a view of it comes out in other pixels than before, so that cached embeddings are made anew.
PIXELS_VERSION = 1
UNREADABLE_FILE = "unreadable.csv"  # lists them, with their causes
UNREADABLE_LIMIT = 0.25  # fraction of unreadable photos above which something is wrong with all, such as the mount
DRAFT = 1.75  # keeps what the resize makes of a photo within a third of a grey level of the exact result, on average


def read_photo(path: Path, side: int) -> Image.Image:
    """A photo in RGB, upright. A JPEG may come smaller than it is, its shorter side at least DRAFT times `side`.

    `draft` lets the JPEG decoder leave out detail that the resize would average away, and spares the resize most of
    its work, which on a large photo is the larger half.
    """
    with Image.open(path) as image:
        width, height = image.size
        factor = DRAFT * side / min(width, height)
        image.draft("RGB", (int(width * factor), int(height * factor)))
        image.load()
        with suppress(Exception):  # it turns the photo before it fails at other tags, which phones often get wrong
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any photo in 8 bits of red, green and blue; Pillow itself cuts 16 bits off at 255, or refuses them."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop an RGB photo as the encoder's own evaluation transform does: (decoded, decoded, 3) uint8.

    PyTorch resizes bytes nearly twice as fast as Pillow; on photos, what comes out is within two grey levels of it.
    """
    size, short = preprocessing.decoded, shorter_side(preprocessing)
    if preprocessing.fit == "squash":
        width, height = short, short
    else:
        image = without_far_ends(image)
        width, height = image.size
        width, height = max(short, int(short * width / height)), max(short, int(short * height / width))
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(pixels, (height, width), mode=preprocessing.interpolation, antialias=True)
    return resized[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def without_far_ends(image: Image.Image, aspect: int = 8) -> Image.Image:
    """The middle of a photo more than `aspect` times as long as wide, which resized whole could fill the memory."""
    width, height = image.size
    longest = aspect * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def shorter_side(preprocessing: Preprocessing) -> int:
    """The shorter side of a photo before the centre is cut out of it, in pixels."""
    return int(preprocessing.decoded / preprocessing.scale)


def decode(path: Path, preprocessing: Preprocessing) -> np.ndarray | str:
    """One photo as (decoded, decoded, 3) uint8, or why it cannot be read.

    Whatever a decoder throws at a damaged file (OSError, struct.error, ZeroDivisionError, MemoryError, ...) is this
    photo's misfortune and nobody else's, so the guard is as wide as it can be.
    """
    try:
        return prepare(read_photo(path, shorter_side(preprocessing)), preprocessing)
    except Exception as error:
        return type(error).__name__


def decode_all(
    paths: Iterable[Path], preprocessing: Preprocessing, threads: Executor, timeout: float | None = None
) -> list[np.ndarray | str]:
    """`decode` of every path, in order. Threads suffice: Pillow lets go of the interpreter while it decodes.

    Args:
        timeout: seconds for all of them together; None waits for ever.

    Raises:
        TimeoutError: they took longer.
    """
    return list(threads.map(lambda path: decode(path, preprocessing), paths, timeout=timeout))


def name_unreadable(unreadable: Sequence[tuple[Path, str]], named: int = 3) -> str:
    """The first of the photos that could not be read, each with its cause: `a.jpg (OSError), b.jpg (OSError), ...`."""
    names = [f"{path} ({cause})" for path, cause in unreadable[:named]]
    return ", ".join(names + ["..."] * (len(unreadable) > named))


def write_unreadable(unreadable: Sequence[tuple[Path, str]], path: Path) -> None:
    """Write all photos that could not be read, with their causes, as CSV; nothing where there is none."""
    if unreadable:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("photo", "cause"), *unreadable])

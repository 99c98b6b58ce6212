"""Read a photo as the encoder wants it. Whatever is in the file, it raises no error."""

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from kernel.manifest import Preprocessing

# Increase it whenever a photo or a view changes in its pixels, so that cached embeddings are computed again.
PIXELS_VERSION = 3
UNREADABLE_FILE = "unreadable.csv"  # the photos that could not be read, with their causes
UNREADABLE_LIMIT = 0.25  # a larger fraction of unreadable photos has a common cause, such as the mount
DRAFT = 1.75  # at this factor the result differs from the exact one by less than a third of a grey level on average
MAX_ASPECT_RATIO = 8  # a longer photo, resized whole, could fill the memory


def read_photo(path: Path, side: int, is_whole: bool = False) -> Image.Image:
    """Read a photo as RGB, upright.

    A JPEG may be decoded at a reduced size, with a shorter side of at least `DRAFT * side` pixels: the decoder then
    skips detail that the resize would average away. That also saves most of the resize, the slower part for a large
    photo.

    Args:
        is_whole: the photo will be resized as a whole: `side` is of its longer side.
    """
    with Image.open(path) as image:
        width, height = image.size
        factor = DRAFT * side / (max(image.size) if is_whole else min(image.size))
        image.draft("RGB", (max(1, int(width * factor)), max(1, int(height * factor))))
        image.load()
        with suppress(Exception):  # invalid EXIF tags, frequent in photos of phones, raise only after the rotation
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a photo to 8-bit RGB.

    16-bit values are scaled down; Pillow alone would clip them at 255. The range of floating-point values, 0 to 1, to
    255 or to 65535, is guessed from their maximum. Values that are not finite become black.
    """
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0, posinf=0, neginf=0).clip(0, 65535)
        largest = values.max()
        factor = 255 if largest <= 1 else 1 if largest <= 255 else 1 / 257
        image = Image.fromarray((values * factor).round().astype(np.uint8))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def resize(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an RGB photo, and crop it as the encoder's evaluation transform does or pad it to a square.

    PyTorch resizes bytes nearly twice as fast as Pillow, with results within two grey levels of Pillow's.

    Returns:
        (decoded_size, decoded_size, 3) uint8.
    """
    size, short = preprocessing.decoded_size, shorter_side(preprocessing)
    if preprocessing.resize_mode == "squash":
        width, height = short, short
    elif preprocessing.resize_mode == "pad":
        width, height = (max(1, round(size * side / max(image.size))) for side in image.size)
    else:
        image = crop_to_aspect_ratio(image)
        width, height = image.size
        width, height = max(short, int(short * width / height)), max(short, int(short * height / width))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(pixels, (height, width), mode=preprocessing.interpolation, antialias=True)
    pixels = resized[0].permute(1, 2, 0).numpy()
    if preprocessing.resize_mode == "pad":
        return pad_to_square(pixels, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels[top : top + size, left : left + size]


def pad_to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Repeat the outermost pixels of (height, width, 3) on both sides, up to (size, size, 3)."""
    missing = [size - side for side in pixels.shape[:2]]
    return np.pad(pixels, [(many // 2, many - many // 2) for many in missing] + [(0, 0)], mode="edge")


def crop_to_aspect_ratio(image: Image.Image) -> Image.Image:
    """Crop the ends of a photo that is more than MAX_ASPECT_RATIO times as long as wide."""
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def shorter_side(preprocessing: Preprocessing) -> int:
    """The shorter side of a resized photo before the centre crop, in pixels."""
    return int(preprocessing.decoded_size / preprocessing.crop_pct)


def decode(path: Path, preprocessing: Preprocessing) -> np.ndarray | str:
    """Decode one photo to (decoded_size, decoded_size, 3) uint8. Returns the cause instead if it cannot be read.

    Decoders raise many kinds of errors on a damaged file (OSError, struct.error, ZeroDivisionError, MemoryError, ...),
    so all of them are caught.
    """
    try:
        if preprocessing.resize_mode == "pad":
            return resize(read_photo(path, preprocessing.decoded_size, is_whole=True), preprocessing)
        return resize(read_photo(path, shorter_side(preprocessing)), preprocessing)
    except Exception as error:
        return type(error).__name__


def describe_unreadable(unreadable: Sequence[tuple[Path, str]]) -> str:
    """The first three of the unreadable photos with their causes: `a.jpg (OSError), b.jpg (OSError), ...`."""
    names = [f"{path} ({cause})" for path, cause in unreadable[:3]]
    return ", ".join(names + ["..."] * (len(unreadable) > 3))


def write_unreadable(unreadable: Sequence[tuple[Path, str]], path: Path) -> None:
    """Write all unreadable photos and their causes as CSV; no file if there are none."""
    if unreadable:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("photo", "cause"), *unreadable])

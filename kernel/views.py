"""Test-time views: variants of a photo, made in batches on the encoder's device from one decoded photo."""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn


def rotate(photos: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate (batch, 3, size, size) counter-clockwise about the centre; the corners are filled by reflection."""
    matrix = rotation(degrees, photos.dtype, photos.device).expand(len(photos), 2, 3)
    grid = nn.functional.affine_grid(matrix, list(photos.shape), align_corners=False)
    return nn.functional.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)


@cache
def rotation(degrees: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The (2, 3) matrix of a rotation, kept because copying it to a GPU waits for the work queued there."""
    angle = math.radians(degrees)
    rows = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    return torch.tensor(rows, dtype=dtype, device=device)


def crop(photos: torch.Tensor, left: float, top: float) -> torch.Tensor:
    """Crop a square of 0.8 of the side out of (batch, 3, size, size), and resize it to the original size.

    Args:
        left, top: position of the square, from 0 (left, top) to 1 (right, bottom).
    """
    size = photos.shape[-1]
    side = round(size * 0.8)
    x, y = round((size - side) * left), round((size - side) * top)
    cut = photos[:, :, y : y + side, x : x + side]
    return nn.functional.interpolate(cut, size=(size, size), mode="bilinear", align_corners=False)


def shrink(photos: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (batch, 3, side, side) to a smaller size, with antialiasing; photos of that size are returned as is."""
    if photos.shape[-1] == size:
        return photos
    return nn.functional.interpolate(photos, size=(size, size), mode="bicubic", antialias=True)


def larger(photos: torch.Tensor) -> torch.Tensor:
    """The photo as decoded, larger than the encoder's own size (Touvron et al. 2019, https://arxiv.org/abs/1906.06423).

    All other views are made of the photo at the encoder's size. `Encoder.embed` recognises this function, and gives it
    the photo as decoded.
    """
    return photos


# Each maps (batch, 3, size, size) to the same shape; a recipe names them (`local/recipes/settings.py`).
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda photos: photos,
    "hflip": lambda photos: photos.flip(-1),
    "rotate90": lambda photos: photos.rot90(1, (-2, -1)),
    "rotate270": lambda photos: photos.rot90(3, (-2, -1)),
    "rotate15": partial(rotate, degrees=15),
    "rotate345": partial(rotate, degrees=345),
    "centre": partial(crop, left=0.5, top=0.5),
    "top-left": partial(crop, left=0, top=0),
    "top-right": partial(crop, left=1, top=0),
    "bottom-left": partial(crop, left=0, top=1),
    "bottom-right": partial(crop, left=1, top=1),
    "larger": larger,
}

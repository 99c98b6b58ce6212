"""Test-time views: variants of a photo, made in batches on the encoder's device from one decoded photo."""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from kernel.manifest import tile_names

CROP = 0.65  # of the side of a photo; the photo is decoded so large that a crop has the encoder's size


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
    """Cut a square of CROP of the side out of (batch, 3, side, side).

    Args:
        left, top: position of the square, from 0 (left, top) to 1 (right, bottom).
    """
    side = photos.shape[-1]
    cut = round(side * CROP)
    x, y = round((side - cut) * left), round((side - cut) * top)
    return photos[:, :, y : y + cut, x : x + cut]


def tile(grid: int, row: int, column: int, photos: torch.Tensor) -> torch.Tensor:
    """Cut one of grid x grid tiles out of (batch, 3, side, side). Together they cover the photo; none overlap."""
    side = photos.shape[-1]
    top, bottom, left, right = (round(side * edge / grid) for edge in (row, row + 1, column, column + 1))
    return photos[:, :, top:bottom, left:right]


def resize_batch(photos: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (batch, 3, height, width) with antialiasing; photos of that size already are returned as they are."""
    if photos.shape[-2:] == (size, size):
        return photos
    return nn.functional.interpolate(photos, size=(size, size), mode="bicubic", antialias=True)


def larger(photos: torch.Tensor) -> torch.Tensor:
    """The photo larger than the encoder's own size (Touvron et al. 2019, https://arxiv.org/abs/1906.06423)."""
    return photos


# Each maps (batch, 3, side, side) to a square of each photo; a recipe names them (`local/recipes/settings.py`).
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
# Of test photos that show several classes, for a competition that has them; a recipe does not name them.
TILES = {name: partial(tile, *map(int, name.split("-")[1:])) for name in tile_names(range(1, 7))}
ALL_VIEWS = VIEWS | TILES
CROPS = [VIEWS[name] for name in ("centre", "top-left", "top-right", "bottom-left", "bottom-right")]
CUT = [*CROPS, *TILES.values()]  # from the photo as decoded, which has the most detail


def make_view(view: Callable, decoded: torch.Tensor, pixels: torch.Tensor, larger_size: int) -> torch.Tensor:
    """One view of photos, (batch, 3, size, size), or at `larger_size` in the view `larger`.

    Args:
        view: of ALL_VIEWS.
        decoded, pixels: the photos as decoded, (batch, 3, side, side), and at the size of the encoder.
    """
    if view is larger:
        return resize_batch(decoded, larger_size or pixels.shape[-1])
    return resize_batch(view(decoded), pixels.shape[-1]) if view in CUT else view(pixels)

"""Each view is what its name says, made without a second decode."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from kernel.manifest import Preprocessing, tile_names, tiled
from kernel.photos import resize
from kernel.views import CROP, CROPS, TILES, VIEWS, make_view, resize_batch, rotate


@pytest.fixture
def photos():
    """Two smooth photos: a rotation of noise would compare nothing but its interpolation."""
    small = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(64, 64), mode="bicubic")


@pytest.mark.parametrize("name", list(VIEWS))
@pytest.mark.parametrize("decoded_size", [64, round(64 / CROP)])
def test_a_view_keeps_shape_type_and_range(photos, name, decoded_size):
    view = make_view(VIEWS[name], resize_batch(photos, decoded_size), photos, 0)
    assert (view.shape, view.dtype) == (photos.shape, photos.dtype)
    assert view.min() >= photos.min() - 0.1  # a resize overshoots
    assert view.max() <= photos.max() + 0.1
    assert name in ("plain", "larger") or not torch.allclose(view, photos, atol=1e-3)


def test_quarter_turns_move_every_pixel_and_change_none(photos):
    assert torch.equal(VIEWS["rotate90"](VIEWS["rotate270"](photos)), photos)
    assert torch.equal(VIEWS["rotate90"](photos), functional.rotate(photos, 90))


@pytest.mark.parametrize("degrees", [15, 345])
def test_small_turns_agree_with_torchvision_inside_the_circle(photos, degrees):
    expected = functional.rotate(photos, degrees, interpolation=functional.InterpolationMode.BILINEAR)
    inside = (torch.arange(64) - 31.5).pow(2)[:, None] + (torch.arange(64) - 31.5).pow(2) < 28**2
    assert (rotate(photos, degrees) - expected)[:, :, inside].abs().max() < 1e-3


def test_the_corners_of_a_turned_photo_are_not_black():
    assert rotate(torch.ones(1, 3, 32, 32), 15).min() > 0.999


@pytest.mark.parametrize("size", [32, 224, 227, 260, 299, 336, 384, 434, 448, 518, 1024])
def test_a_crop_of_a_photo_that_is_decoded_for_it_is_not_resized(size):
    side = round(size / CROP)
    decoded = torch.arange(side).expand(1, 1, side, side)
    assert {view(decoded).shape[-1] for view in CROPS} == {size}
    assert CROPS[2](decoded)[0, 0, 0, -1] == side - 1  # top-right


def test_crops_show_the_part_that_their_name_says():
    ramp = torch.linspace(0, 1, 100).expand(1, 3, 100, 100)  # brighter to the right
    means = {name: VIEWS[name](ramp).mean().item() for name in ("top-left", "centre", "top-right")}
    assert means["top-left"] == pytest.approx(CROP / 2, abs=0.01)
    assert means["centre"] == pytest.approx(0.5, abs=0.01)
    assert means["top-right"] == pytest.approx(1 - CROP / 2, abs=0.01)
    down = ramp.transpose(-1, -2)
    assert VIEWS["bottom-left"](down).mean() > 0.65 > 0.35 > VIEWS["top-right"](down).mean()


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 6])
def test_the_tiles_of_a_grid_have_each_pixel_once(grid):
    side = 67
    photo = torch.arange(side * side).view(1, 1, side, side)
    tiles = [TILES[name](photo) for name in tile_names([grid])]
    assert len(tiles) == grid**2
    assert torch.cat([tile.flatten() for tile in tiles]).sort().values.tolist() == list(range(side * side))
    sizes = [size for tile in tiles for size in tile.shape[-2:]]
    assert max(sizes) - min(sizes) <= 1
    rows = [torch.cat(tiles[first : first + grid], dim=-1) for first in range(0, grid**2, grid)]
    assert torch.equal(torch.cat(rows, dim=-2), photo)  # row after row


def test_a_photo_is_decoded_for_its_tiles_without_losing_its_margins_or_their_detail():
    cropping = Preprocessing(64, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875, "crop", larger_size=96)
    preprocessing = tiled(cropping, (1, 3, 5))
    photo = Image.new("RGB", (400, 320))
    photo.paste("red", (0, 0, 80, 64))
    photo.paste("blue", (320, 256, 400, 320))
    decoded = torch.from_numpy(resize(photo, preprocessing)).permute(2, 0, 1)[None].float()
    assert decoded.shape == (1, 3, 320, 320)
    for name, colour in (("tile-5-0-0", 0), ("tile-5-4-4", 2)):
        view = make_view(TILES[name], decoded, resize_batch(decoded, 64), 0)
        assert view.shape == (1, 3, 64, 64)
        assert torch.equal(view, TILES[name](decoded))  # at its full size, so not resized
        assert view[0, colour, 4:60, 4:60].min() > 250
        assert view.sum() == view[:, colour].sum()
    assert make_view(TILES["tile-3-0-1"], decoded, resize_batch(decoded, 64), 0).shape == (1, 3, 64, 64)

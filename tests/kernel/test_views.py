"""Each view is what its name says, made without a second decode."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from kernel.views import VIEWS, rotate


@pytest.fixture
def photos():
    """Two smooth photos: a rotation of noise would compare nothing but its interpolation."""
    small = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(64, 64), mode="bicubic")


@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_keeps_shape_type_and_range(photos, name):
    view = VIEWS[name](photos)
    assert (view.shape, view.dtype) == (photos.shape, photos.dtype)
    assert view.min() >= photos.min() - 1e-5
    assert view.max() <= photos.max() + 1e-5
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


def test_crops_show_the_part_that_their_name_says():
    ramp = torch.linspace(0, 1, 100).expand(1, 3, 100, 100)  # brighter to the right
    means = {name: VIEWS[name](ramp).mean().item() for name in ("top-left", "centre", "top-right")}
    assert means["top-left"] == pytest.approx(0.4, abs=0.01)
    assert means["centre"] == pytest.approx(0.5, abs=0.01)
    assert means["top-right"] == pytest.approx(0.6, abs=0.01)
    down = ramp.transpose(-1, -2)
    assert VIEWS["bottom-left"](down).mean() > 0.59 > 0.41 > VIEWS["top-right"](down).mean()

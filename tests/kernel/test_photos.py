"""Decoding gives what the encoder was trained on, and a photo that cannot be read costs only itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torchvision.transforms import Compose, ToTensor

from kernel.manifest import Preprocessing
from kernel.photos import decode, read_photo, to_rgb
from tests.conftest import photo

CROP = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875, "crop")


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (33, 190), (201, 97)])
@pytest.mark.parametrize("resize_mode", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_timms_evaluation_transform(tmp_path, size, resize_mode, interpolation):
    path = photo(tmp_path / "a.png", size=size)
    crop_mode = {"crop": "center", "squash": "squash"}[resize_mode]
    crop_pct = 0.875 if resize_mode == "crop" else 1.0
    transform = create_transform(
        (3, 64, 64),
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    preprocessing = replace(CROP, resize_mode=resize_mode, crop_pct=crop_pct, interpolation=interpolation)
    assert_pixels(decode(path, preprocessing), transform(Image.open(path)))


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (33, 190), (201, 97), (31, 64), (3, 500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_padded_photo_is_whole_and_its_edges_are_repeated(tmp_path, size, interpolation):
    path = photo(tmp_path / "a.png", size=size)
    keep = ResizeKeepRatio(64, longest=1.0, interpolation=interpolation)
    if min(size) > 3:  # timm would resize the last one to a width of 0
        transform = Compose([keep, CenterCropOrPad(64, padding_mode="edge"), ToTensor()])
        expected = transform(Image.open(path))
    else:
        column = Image.open(path).resize((1, 64), Image.Resampling[interpolation.upper()])
        expected = ToTensor()(column).expand(3, 64, 64)
    assert_pixels(decode(path, replace(CROP, resize_mode="pad", interpolation=interpolation)), expected)


@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_a_photo_of_floats_keeps_its_brightness_whatever_its_range(tmp_path, scale):
    grey = np.tile(np.arange(256, dtype=np.float32), (8, 1))
    values = grey * np.float32(scale)
    values[0, :3] = np.nan, np.inf, -np.inf
    grey[0, :3] = 0
    Image.fromarray(values).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "F"
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], grey)


def assert_pixels(found: np.ndarray, expected: torch.Tensor) -> None:
    """Compare (height, width, 3) bytes with (3, height, width) values in [0, 1]."""
    assert found.shape == (64, 64, 3)
    difference = np.abs(found - (expected.numpy().transpose(1, 2, 0) * 255).round())
    assert difference.max() <= 2  # PyTorch's weights are of 16 bits where Pillow's are of 32
    assert difference.mean() < 0.1


@pytest.mark.parametrize("resize_mode", ["crop", "pad"])
def test_a_large_jpeg_is_decoded_small_with_hardly_a_difference(tmp_path, resize_mode):
    path = photo(tmp_path / "a.jpg", size=(1600, 800), quality=95)
    assert read_photo(path, 73).size == (400, 200)
    assert read_photo(path, 73, is_whole=True).size == (200, 100)
    with Image.open(path) as image:
        image.save(tmp_path / "exact.png")
    preprocessing = replace(CROP, resize_mode=resize_mode)
    exact = decode(tmp_path / "exact.png", preprocessing)
    assert np.abs(decode(path, preprocessing).astype(int) - exact).mean() < 1


@pytest.mark.parametrize("resize_mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (20000, 2), (1, 1)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_photos_of_any_shape_can_be_read(tmp_path, size, suffix, resize_mode):
    Image.new("RGB", size, (90, 120, 30)).save(tmp_path / f"a{suffix}")
    found = decode(tmp_path / f"a{suffix}", replace(CROP, resize_mode=resize_mode))
    assert found.shape == (64, 64, 3)
    assert np.abs(found - np.array([90.0, 120.0, 30.0])).max() <= 3


def test_photos_are_upright_and_in_colour_whatever_their_file_says(tmp_path):
    image = Image.new("L", (80, 40), 30)
    image.paste(220, (0, 0, 40, 40))  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left is the top
    image.save(tmp_path / "a.jpg", exif=exif)
    upright = np.asarray(read_photo(tmp_path / "a.jpg", 20))
    assert upright.shape == (80, 40, 3)
    assert upright[:30].mean() > 200 > 60 > upright[50:].mean()


def test_a_truncated_photo_costs_only_itself(tmp_path):
    good = [photo(tmp_path / f"{number}.jpg", number) for number in range(3)]
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(good[0].read_bytes()[:200])
    empty, text, folder = tmp_path / "empty.jpg", tmp_path / "page.jpg", tmp_path / "folder.jpg"
    empty.touch()
    text.write_text("<html>404</html>")
    folder.mkdir()
    paths = [good[0], truncated, empty, good[1], text, folder, tmp_path / "missing.jpg", good[2]]
    decoded = [decode(path, CROP) for path in paths]
    causes = [result if isinstance(result, str) else "read" for result in decoded]
    assert [cause == "read" for cause in causes] == [True, False, False, True, False, False, False, True]
    assert causes[5:7] == ["IsADirectoryError", "FileNotFoundError"]
    for result, path in zip((decoded[0], decoded[3], decoded[7]), good, strict=True):
        assert (result == decode(path, CROP)).all()

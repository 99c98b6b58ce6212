"""Whatever lies in the hidden test set: each hostile photo costs only itself, or is read as a person would see it."""

import csv
import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kernel.manifest import Preprocessing
from kernel.observations import find_test_table
from kernel.photos import decode
from tests.conftest import command, photo

CROP = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875, "crop")


def picture(mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Red on the left, dark on the right, as far as the mode has colours."""
    image = Image.new("RGB", size, (200, 30, 30))
    image.paste((20, 20, 20), (size[0] // 2, 0, *size))
    return image.convert(mode)


@pytest.mark.parametrize("suffix", [".JPG", ".jpg", ".jpeg", ".webp", ".png"])
def test_every_usual_format_is_read(tmp_path, suffix):
    picture().save(tmp_path / f"a{suffix}")
    found = decode(tmp_path / f"a{suffix}", CROP)
    assert np.abs(found[:, :24].mean(axis=(0, 1)) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_every_mode_becomes_colour(tmp_path, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    picture(mode).save(tmp_path / f"a.{suffix}")
    found = decode(tmp_path / f"a.{suffix}", CROP)
    assert found.shape == (64, 64, 3)
    assert found[:, :24].mean() > found[:, 40:].mean() + 30


def test_sixteen_bits_keep_their_brightness(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "usual.png")
    deep, usual = decode(tmp_path / "deep.png", CROP), decode(tmp_path / "usual.png", CROP)
    assert np.abs(deep.astype(int) - usual.astype(int)).max() <= 1


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(tmp_path / "a.webp", CROP).mean(axis=(0, 1)).argmax() == 0


@pytest.mark.parametrize("size", [(1, 1), (20_000, 50), (50, 20_000), (3, 64)])
def test_any_shape_is_read(tmp_path, size):
    picture(size=size).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", CROP).shape == (64, 64, 3)


def test_a_photo_of_a_hundred_megapixels_is_read(tmp_path):
    picture(size=(12_500, 8_000)).save(tmp_path / "a.jpg", quality=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(tmp_path / "a.jpg", CROP).shape == (64, 64, 3)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated() -> bytes:
    buffer = io.BytesIO()
    picture(size=(400, 300)).save(buffer, "JPEG")
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "UnidentifiedImageError"),
        (b"\0" * 4096, "UnidentifiedImageError"),
        (b"<!DOCTYPE html><html>429 Too Many Requests</html>", "UnidentifiedImageError"),
        (truncated(), "OSError"),
        (bomb(), "DecompressionBombError"),
    ],
    ids=["empty", "zeros", "a page", "truncated", "a bomb"],
)
def test_what_is_no_photo_is_named_by_its_cause(tmp_path, content, cause):
    (tmp_path / "a.JPG").write_bytes(content)
    assert decode(tmp_path / "a.JPG", CROP) == cause


def test_a_photo_under_another_formats_name_is_read(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.JPG")
    assert decode(tmp_path / "a.JPG", CROP).shape == (64, 64, 3)


def test_a_tag_that_breaks_its_rules_does_not_cost_the_photo_nor_its_turn(tmp_path):
    picture().save(tmp_path / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x0128] = 2  # ResolutionUnit, a short
    content = exif.tobytes()
    assert content.count(b"\x28\x01\x03\x00") + content.count(b"\x01\x28\x00\x03") == 1
    broken = content.replace(b"\x28\x01\x03\x00", b"\x28\x01\x0b\x00")
    broken = broken.replace(b"\x01\x28\x00\x03", b"\x01\x28\x00\x0b")  # a float, which no reader can write again
    for name, written in (("good", content), ("broken", broken)):
        picture().save(tmp_path / f"{name}.jpg", exif=written)
    with Image.open(tmp_path / "broken.jpg") as image, pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(image)
    plain, good, broken = (decode(tmp_path / f"{name}.jpg", CROP) for name in ("plain", "good", "broken"))
    assert (broken == good).all()
    assert not (broken == plain).all()


def table_of(folder: Path, text: str) -> Path:
    table = folder / "metadata" / "FungiTastic-FewShot" / "FungiTastic-FewShot-Test.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("rows", "ids"),
    [
        (["4100099350.0,a.JPG", "7.0,b.JPG"], ["4100099350", "7"]),
        (["9223372036854775807,a.JPG", "18446744073709551615,b.JPG"], ["9223372036854775807", "18446744073709551615"]),
        (["1,a.JPG", "1,a.JPG", "1,b.JPG"], ["1"]),
        (["5,a.JPG"], ["5"]),
        (["1,a.JPG", "2", " ", ",b.JPG", "3,c.JPG"], ["1", "2", "3"]),
    ],
    ids=["float ids", "64 bits", "repeated rows", "one row", "broken rows"],
)
def test_a_table_of_any_length_and_spelling_of_ids_is_read(tmp_path, rows, ids):
    rows = [f"{row},x" if "," in row else row for row in rows]
    table_of(tmp_path, "\ufeff" + "\n".join(["observationID,filename,somethingNew", *rows]) + "\n")
    table = find_test_table(tmp_path, "fungiclef")
    assert [observation.id for observation in table.observations] == ids


@pytest.fixture
def hidden(trained, tmp_path):
    """A hidden test set of ten observations, and the weights of the drawn competition's run."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "weights").symlink_to(trained)
    names = [f"{number}-{number}.JPG" for number in range(10)]
    table_of(
        tmp_path / "input" / "fungi", "\n".join(["observationID,filename", *(f"{n[0]},{n}" for n in names)]) + "\n"
    )
    folder = tmp_path / "input" / "fungi" / "images" / "FungiTastic-FewShot" / "test" / "300p"
    return [photo(folder / name, seed) for seed, name in enumerate(names)]


def predict(folder: Path, **environment):
    return command("-m", "kernel", "--input", folder / "input", "--working", folder / "working", **environment)


def test_unreadable_photos_are_counted_by_cause_and_cost_only_themselves(hidden, tmp_path, trained):
    hidden[2].write_bytes(b"<html>")
    hidden[5].unlink()
    result = predict(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "10 photos (2 unreadable, 1 UnidentifiedImageError, 1 FileNotFoundError)" in result.stdout
    named = f"unreadable: {hidden[2]} (UnidentifiedImageError), {hidden[5]} (FileNotFoundError); all in unreadable.csv"
    assert named in result.stdout.splitlines()
    with (tmp_path / "working" / "unreadable.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["photo", "cause"],
            [str(hidden[2]), "UnidentifiedImageError"],
            [str(hidden[5]), "FileNotFoundError"],
        ]
    with (tmp_path / "working" / "submission.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    prior = " ".join(json.loads((trained / "manifest.json").read_text())["fallback_classes"])
    assert [number for number, row in enumerate(rows) if row[1] == prior] == [2, 5]


@pytest.mark.parametrize(("is_rerun", "code"), [(False, 2), (True, 0)])
def test_when_most_photos_are_unreadable_the_visible_run_fails_and_the_rerun_succeeds(hidden, tmp_path, is_rerun, code):
    for path in hidden[:6]:
        path.unlink()
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": "1"} if is_rerun else {}
    result = predict(tmp_path, env={**os.environ, **rerun})
    assert result.returncode == code
    assert "6 of 10 photos cannot be read" in result.stderr
    assert (result.stderr.splitlines()[-1] == "scored rerun: the predictions will be scored") == is_rerun
    assert len((tmp_path / "working" / "submission.csv").read_text().splitlines()) == 11


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe stands for a photo on a disk that hangs")
def test_a_photo_that_hangs_does_not_keep_the_kernel_from_ending(hidden, tmp_path):
    hidden[0].unlink()
    os.mkfifo(hidden[0])
    folders = ["--input", tmp_path / "input", "--working", tmp_path / "working"]
    result = command("-m", "kernel", *folders, "--time-limit", "0.001", timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "10 too late" in result.stdout


def test_a_table_without_rows_is_refused_in_one_line(hidden, tmp_path):
    table_of(tmp_path / "input" / "fungi", "observationID,filename\n")
    result = predict(tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*-Test\.csv has no test observation: [^\n]*\n", result.stderr)

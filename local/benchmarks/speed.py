"""Measure photos per second: of decoding, of the forward pass, of the whole, and of other pipelines.

Called by local/benchmark.py.
"""

import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from kernel.embeddings import embed_observations
from kernel.encoders import Encoder, pick_devices, pick_dtype
from kernel.observations import Observation
from kernel.photos import decode_all, shorter_side
from kernel.views import VIEWS
from local.base.console import progress, say
from local.drawing.fungi import draw, traits
from local.encoders.load import load_encoder

# Name -> (width and height in pixels, number of photos).
SIZES = {"300p": ((400, 300), 96), "500p": ((750, 500), 96), "fullsize": ((3000, 2000), 24)}
REPEATS = 3  # the fastest counts, because any disturbance makes a measurement slower


def best_rate(photos: int, work: Callable[[], object]) -> float:
    """Photos per second in the fastest of REPEATS runs, after a run to warm up."""
    work()
    seconds = []
    for _ in progress(range(REPEATS), "measuring", unit="repeat"):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return photos / min(seconds)


def draw_photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    paths = [folder / f"{size[0]}-{number}.jpg" for number in range(count)]
    for number, path in enumerate(progress(paths, f"drawing {size[0]}x{size[1]}", unit="photo")):
        draw(traits("Amanitaceae", "Amanita", str(number)), number, number, size).save(path, quality=88)
    return paths


@torch.inference_mode()
def plain_pipeline(paths: Sequence[Path], encoder: Encoder) -> None:
    """The usual pipeline: full decode, torchvision's transforms, a DataLoader with its defaults, one view."""
    preprocessing = encoder.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(shorter_side(preprocessing), transforms.InterpolationMode(preprocessing.interpolation)),
            transforms.CenterCrop(preprocessing.size),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )

    def load(batch: list[Path]) -> torch.Tensor:
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in batch])

    for photos in DataLoader(paths, batch_size=32, collate_fn=load):
        encoder.forward(photos.to(encoder.device), encoder.module).cpu()


@torch.inference_mode()
def one_by_one(paths: Sequence[Path], encoder: Encoder) -> None:
    """Another common pipeline: one photo at a time, resized as a float tensor."""
    preprocessing = encoder.preprocessing
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    for path in paths:
        pixels = functional.to_tensor(Image.open(path).convert("RGB"))
        pixels = functional.resize(pixels, shorter_side(preprocessing), mode, antialias=True)
        pixels = functional.center_crop(pixels, preprocessing.size)
        pixels = functional.normalize(pixels, preprocessing.mean, preprocessing.std)
        encoder.forward(pixels[None].to(encoder.device), encoder.module).cpu()


def pybioclip_embedding(encoder: Encoder) -> Callable[[Sequence[Path]], None] | None:
    """The code of pybioclip's `bioclip embed`, with this encoder instead of the one that it downloads.

    None if pybioclip is not installed, or if the input of the encoder is not 224 pixels as in pybioclip.
    """
    try:
        from bioclip._constants import DEFAULT_BATCH_SIZE
        from bioclip.predict import BaseClassifier, preprocess_img
    except ImportError:
        return None
    if encoder.preprocessing.size != 224:
        return None

    class Offline(BaseClassifier):
        def load_pretrained_model(self, **_) -> None:
            # pybioclip does not support half precision.
            self.model = SimpleNamespace(encode_image=copy.deepcopy(encoder.module).float())
            self.preprocess = preprocess_img

    classifier = Offline(device=encoder.device)

    def embed(paths: Sequence[Path]) -> None:
        for first in range(0, len(paths), DEFAULT_BATCH_SIZE):
            images = [classifier.ensure_rgb_image(str(path)) for path in paths[first : first + DEFAULT_BATCH_SIZE]]
            classifier.create_image_features(images).cpu()

    return embed


def measure_speed(encoder: Encoder, folder: Path) -> list[dict]:
    """One row per size of photo: photos per second of the parts, of the whole, and of other pipelines."""
    size, on_cpu, rows = encoder.preprocessing.size, encoder.device.type == "cpu", []
    batch = torch.randint(0, 256, (encoder.batch_size, 3, size, size), dtype=torch.uint8)
    plain, every = [VIEWS["plain"]], [view for name, view in VIEWS.items() if name != "larger"]  # at one size
    batches = [batch] * 6  # about as many photos as the whole is measured on; short runs seem faster than they are
    forward = best_rate(6 * len(batch), lambda: [encoder.embed(each, plain) for each in batches])
    all_views = best_rate(len(batch), lambda: encoder.embed(batch, every))
    pybioclip = pybioclip_embedding(encoder)
    for name, (pixels, count) in SIZES.items():
        paths = draw_photos(folder, pixels, count)
        paths *= 1 if on_cpu else 8  # a GPU needs more than one batch
        observations = [Observation(str(number), (path,)) for number, path in enumerate(paths)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            decode = best_rate(
                len(paths), lambda paths=paths, threads=threads: decode_all(paths, encoder.preprocessing, threads)
            )
        whole = best_rate(len(paths), lambda rows=observations: embed_observations(encoder, rows, ["plain"]))
        few = paths[:count]
        # On a CPU, decoding and the forward pass share the cores; beside a GPU they overlap.
        limit = 1 / (1 / decode + 1 / forward) if on_cpu else min(decode, forward)
        rows.append(
            {
                "photos": name,
                "decode": decode,
                "forward": forward,
                "end_to_end": whole,
                "share_of_limit": whole / limit,
                "plain_pipeline": best_rate(len(few), lambda few=few: plain_pipeline(few, encoder)),
                "one_by_one": best_rate(len(few), lambda few=few: one_by_one(few, encoder)),
                "pybioclip": best_rate(len(few), lambda few=few: pybioclip(few)) if pybioclip else None,
                "views_against_forwards": forward / (len(every) * all_views),
            }
        )
        say(table_row(rows[-1]))
    return rows


def table_row(row: dict) -> str:
    """A row of the table in RESULTS.md; the last column is the time of 11 views over that of 11 forward passes."""
    cells = [f"{row[name]:.1f}" for name in ("decode", "forward", "end_to_end")]
    cells += [f"{row['share_of_limit']:.2f}"]
    others = [row[name] for name in ("plain_pipeline", "one_by_one", "pybioclip")]
    cells += [f"{rate:.1f} ({row['end_to_end'] / rate:.1f}×)" if rate else "not here" for rate in others]
    return f"| {row['photos']} | {' | '.join(cells)} | {row['views_against_forwards']:.2f} |"


def speed(spec: str) -> dict:
    """The table of speeds for one encoder. timm:NAME gets random weights, which need no download."""
    module, described = load_encoder(spec, pretrained=not spec.startswith("timm:"))
    devices = pick_devices()
    module.requires_grad_(False).eval()
    module.to(devices[0], pick_dtype(devices[0]), memory_format=torch.channels_last)
    encoder = Encoder(module, described.preprocessing, described.features, devices)
    machine = (
        f"{torch.get_num_threads()} cores"
        if devices[0].type == "cpu"
        else " and ".join(torch.cuda.get_device_name(device) for device in devices)
    )
    say(f"{spec} at {encoder.preprocessing.size} px on {machine}; photos per second")
    columns = ("photos", "decode", "forward", "end to end", "of the limit")
    columns += ("plain pipeline", "one by one", "pybioclip", "11 views")
    say(f"| {' | '.join(columns)} |")
    say("|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as folder:
        return {"encoder": spec, "machine": machine, "rows": measure_speed(encoder, Path(folder))}

"""Measure photos per second: of decoding, of the forward pass, of the whole, and of other pipelines.

Called by local/benchmark.py.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms import functional

from kernel.embeddings import embed_observations
from kernel.encoders import keep_freed_memory, make_encoder, pick_devices
from kernel.forward import Encoder, gpu_batch_size, use_one_torch_thread
from kernel.inputs import prepare_torch
from kernel.loader import count_cores
from kernel.manifest import Preprocessing
from kernel.observations import Observation
from kernel.photos import decode, shorter_side
from kernel.views import VIEWS
from local.base.console import progress, say
from local.benchmarks.matching import measure_matching
from local.drawing.fungi import draw, traits
from local.encoders.load import load_encoder, size_for_views

# Name -> (width and height in pixels, number of photos).
SIZES = {"300p": ((400, 300), 96), "500p": ((750, 500), 96), "fullsize": ((3000, 2000), 24)}
ROUNDS = 5  # of which the median counts
FASTEST = 2  # ways to do the same are measured in every round, those that were the fastest at first
# In a measurement, at least; fewer would measure how it starts and ends.
CPU_PHOTOS, CPU_PHOTOS_IN_ALL_VIEWS, GPU_PHOTOS = 576, 96, 2048
ALL_VIEWS = [name for name in VIEWS if name != "larger"]  # those at one size
COLUMNS = ("photos", "decode", "forward", "end to end", "of the limit", "plain pipeline", "one by one", "pybioclip")


@dataclass(frozen=True)
class Work:
    """Something to time: a number of photos, and a function that processes them once."""

    photos: int
    run: Callable[[], object]


def measure_rounds(works: Mapping[str, Work]) -> list[dict[str, float]]:
    """Photos per second of each work, in each of ROUNDS rounds, after a run of each to warm up.

    Every round runs all works, so that a machine which becomes slower meanwhile becomes slower for all of them. Of the
    ways to do the same, "WHAT, way", only the FASTEST of the first run are run again.
    """
    rates = {name: work.photos / time_once(work) for name, work in progress(works.items(), "warming up", unit="way")}
    ways = {part: [name for name in works if name.startswith(f"{part}, ")] for part in ("decode", "forward")}
    slow = {name for part in ways.values() for name in sorted(part, key=rates.get)[:-FASTEST]}
    kept = [name for name in works if name not in slow]
    rounds: list[dict[str, float]] = [{} for _ in range(ROUNDS)]
    for one, name in progress([(one, name) for one in rounds for name in kept], "measuring", unit="run"):
        one[name] = works[name].photos / time_once(works[name])
    return rounds


def time_once(work: Work) -> float:
    start = time.perf_counter()
    work.run()
    return time.perf_counter() - start


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


class Decoded(Dataset):
    """Photos decoded by a function."""

    def __init__(self, paths: Sequence[Path], decode: Callable[[Path], np.ndarray]) -> None:
        self.paths, self.decode = paths, decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.decode(self.paths[index])))


def decode_with_torchvision(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """A full decode and a resize of bytes, with the centre crop of the encoder."""
    pixels = read_image(str(path), ImageReadMode.RGB)
    pixels = functional.resize(pixels, shorter_side(preprocessing), antialias=True)
    return functional.center_crop(pixels, preprocessing.size).permute(1, 2, 0).numpy()


def ways_to_decode(paths: Sequence[Path], preprocessing: Preprocessing) -> dict[str, Work]:
    """Decoding alone in threads and in processes: the fastest of them is what these cores can do."""
    cores, ours = count_cores(), partial(decode, preprocessing=preprocessing)
    ways = {}
    for number in sorted({1, 2, cores // 2, cores} - {0}):
        threads = ThreadPoolExecutor(number, initializer=use_one_torch_thread)
        ways[f"decode, {number} threads"] = Work(len(paths), lambda threads=threads: list(threads.map(ours, paths)))
    by_torchvision = partial(decode_with_torchvision, preprocessing=preprocessing)
    for name, function in (("processes", ours), ("processes, torchvision", by_torchvision)):
        loader = DataLoader(Decoded(paths, function), batch_size=16, num_workers=cores, persistent_workers=True)
        ways[f"decode, {cores} {name}"] = Work(len(paths), lambda loader=loader: list(loader))
    return ways


def ways_to_embed(encoder: Encoder) -> dict[str, Work]:
    """Forward passes alone, at several batch sizes: the fastest is what this machine's devices can do."""
    return ways_on_cpu(encoder) if encoder.device.type == "cpu" else ways_on_gpus(encoder)


def random_pixels(size: int, encoder: Encoder, device: torch.device) -> torch.Tensor:
    """A batch as the encoder's module gets it."""
    side, dtype = encoder.preprocessing.size, next(encoder.module.parameters()).dtype
    pixels = torch.randn(size, 3, side, side, device=device, dtype=dtype)
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def pass_forward(module: nn.Module, batch: torch.Tensor, repeats: int) -> None:
    """Pass a batch forward so many times, and wait until that is done."""
    for _ in range(repeats):
        module(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)


class ForwardPasses(Dataset):
    """Passes the same batch forward again and again, in the processes of a DataLoader."""

    def __init__(self, module: nn.Module, batch: torch.Tensor, repeats: int) -> None:
        self.module, self.batch, self.repeats = module, batch, repeats

    def __len__(self) -> int:
        return self.repeats

    def __getitem__(self, index: int) -> int:
        pass_forward(self.module, self.batch, 1)
        return index


def prepare_process(_: int) -> None:
    """Settings of the kernel's process, which a new one does not inherit."""
    prepare_torch()
    keep_freed_memory()


def ways_on_cpu(encoder: Encoder) -> dict[str, Work]:
    """With all threads of torch for each batch, with a batch in each thread, and with one in each process.

    As many photos as in the whole: a processor may be faster in its first seconds than in the next ones.
    """
    ways, cores = {}, torch.get_num_threads()
    for size in (4, 8, 16):
        repeats = -(-CPU_PHOTOS // (cores * size))  # of each thread
        once = partial(pass_forward, encoder.module, random_pixels(size, encoder, encoder.device))
        threads = ThreadPoolExecutor(cores, initializer=use_one_torch_thread)
        photos = cores * repeats * size
        ways[f"forward, batches of {size}"] = Work(photos, partial(once, cores * repeats))
        ways[f"forward, batches of {size} in each of {cores} threads"] = Work(
            photos, lambda once=once, threads=threads, repeats=repeats: list(threads.map(once, cores * [repeats]))
        )
        processes = DataLoader(  # new ones, since a process that was forked cannot use the threads of this one
            ForwardPasses(encoder.module, once.args[1], cores * repeats),
            batch_size=None,
            num_workers=cores,
            worker_init_fn=prepare_process,
            multiprocessing_context="spawn",
            persistent_workers=True,
        )
        ways[f"forward, batches of {size} in each of {cores} processes"] = Work(photos, partial(list, processes))
    return ways


def ways_on_gpus(encoder: Encoder) -> dict[str, Work]:
    """On all GPUs at once, with a thread for each: around the batch size that the kernel starts with."""
    ways, usual = {}, gpu_batch_size(encoder.preprocessing)
    for size in (usual // 2, usual, 2 * usual):
        repeats = -(-GPU_PHOTOS // size)
        each = [
            partial(pass_forward, module, random_pixels(size, encoder, device), repeats)
            for module, device in zip(encoder.replicas, encoder.devices, strict=True)
        ]
        threads = ThreadPoolExecutor(len(each))
        ways[f"forward, batches of {size}"] = Work(
            len(each) * repeats * size,
            lambda each=each, threads=threads: list(threads.map(lambda run: run(), each)),
        )
    return ways


def measure_speed(encoder: Encoder, in_all_views: Encoder, folder: Path) -> list[dict]:
    """A row per size of photo and number of views: photos per second of the parts, of the whole, and of others.

    Args:
        in_all_views: the encoder, with photos decoded as large as all views need them.
    """
    on_cpu, rows = encoder.device.type == "cpu", []
    pybioclip = pybioclip_embedding(encoder)
    for name, (pixels, count) in SIZES.items():
        few = draw_photos(folder, pixels, count)
        paths = few * -(-(CPU_PHOTOS if on_cpu else GPU_PHOTOS) // count)
        others = {"plain_pipeline": plain_pipeline, "one_by_one": one_by_one}
        works = {
            **ways_to_decode(paths, encoder.preprocessing),
            **ways_to_embed(encoder),
            "end_to_end": embedding_work(encoder, paths, ["plain"]),
            "all_views": embedding_work(in_all_views, paths[:CPU_PHOTOS_IN_ALL_VIEWS] if on_cpu else paths, ALL_VIEWS),
            **{key: Work(count, partial(other, few, encoder)) for key, other in others.items()},
            **({"pybioclip": Work(count, partial(pybioclip, few))} if pybioclip else {}),
        }
        rounds = measure_rounds(works)
        for views, whole in ((1, "end_to_end"), (len(ALL_VIEWS), "all_views")):
            row = speed_row(rounds, views, whole, on_cpu)
            row["photos"] = name if views == 1 else f"{name}, {views} views"
            rows.append(row)
            say(table_row(row))
    return rows


def embedding_work(encoder: Encoder, paths: Sequence[Path], views: Sequence[str]) -> Work:
    """The whole way from photos to embeddings, as the kernel goes it."""
    observations = [Observation(str(number), (path,)) for number, path in enumerate(paths)]
    return Work(len(paths), lambda: embed_observations(encoder, observations, views))


def speed_row(rounds: Sequence[Mapping[str, float]], views: int, whole: str, on_cpu: bool) -> dict:
    """The figures of one row, without its name: medians over the rounds.

    The limit is what the fastest way to decode and the fastest forward passes alone would allow: on a CPU they share
    the cores, beside a GPU they overlap. It is computed within each round, for the ways with the best medians: of ways
    that are equally fast, the luckiest of each round would be faster than any of them.
    """
    rates = {name: median(one[name] for one in rounds) for name in rounds[0]}
    ways = {
        part: max((name for name in rates if name.startswith(part)), key=rates.get) for part in ("decode", "forward")
    }

    def fraction(one: Mapping[str, float]) -> float:
        decode, forward = one[ways["decode"]], one[ways["forward"]] / views
        return one[whole] / (1 / (1 / decode + 1 / forward) if on_cpu else min(decode, forward))

    row = {"views": views, "decode": rates[ways["decode"]], "forward": rates[ways["forward"]] / views}
    row |= {"end_to_end": rates[whole], "share_of_limit": median(map(fraction, rounds))}
    row |= {"fastest": {part: name.partition(", ")[2] for part, name in ways.items()}}
    return row | {key: rates.get(key) if views == 1 else None for key in ("plain_pipeline", "one_by_one", "pybioclip")}


def table_row(row: dict) -> str:
    """A row of the table in RESULTS.md."""
    cells = [f"{row[name]:.1f}" for name in ("decode", "forward", "end_to_end")]
    cells += [f"{row['share_of_limit']:.2f}"]
    others = [row[name] for name in ("plain_pipeline", "one_by_one", "pybioclip")]
    cells += [f"{rate:.1f} ({row['end_to_end'] / rate:.1f}×)" if rate else "" for rate in others]
    return f"| {row['photos']} | {' | '.join(cells)} |"


def speed(spec: str) -> dict:
    """The table of speeds for one encoder. timm:NAME gets random weights, which need no download."""
    module, described = load_encoder(spec, pretrained=not spec.startswith("timm:"))
    devices = pick_devices()
    encoder = make_encoder(module.requires_grad_(False).eval(), described, devices)
    in_all_views = make_encoder(*size_for_views(module, described, ALL_VIEWS), devices)
    machine = (
        f"{torch.get_num_threads()} cores"
        if devices[0].type == "cpu"
        else " and ".join(torch.cuda.get_device_name(device) for device in devices)
    )
    say(f"{spec} at {encoder.preprocessing.size} px on {machine}; photos per second")
    say(f"| {' | '.join(COLUMNS)} |")
    say("|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_speed(encoder, in_all_views, Path(folder))
    for part in ("decode", "forward"):
        say(f"fastest way of {part}: {', '.join(dict.fromkeys(row['fastest'][part] for row in rows))}")
    return {"encoder": spec, "machine": machine, "rows": rows, "matching": measure_matching(devices[0])}

"""Open the encoders: build each architecture, load its weights, put it on the best device.

An encoder is described by its `EncoderSpec` in the manifest, and only by it; nothing is downloaded.
"""

import copy
import ctypes
import importlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from kernel.inputs import InputError, shorten
from kernel.manifest import EncoderSpec, Member, Preprocessing
from kernel.views import VIEWS, larger, shrink

# As CUDA, its libraries, and a CPU on Linux and on Windows say it.
OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED|can't allocate memory|not enough memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of a device or of the machine did not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


class Encoder:
    """Photos to embeddings, on one device or on several alike.

    Attributes:
        module: maps (batch, 3, size, size) normalised pixels to (batch, features).
        features: length of an embedding.
        batch_size: photos of one forward pass; halved whenever the memory does not suffice.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, features: int, devices: Sequence[torch.device]):
        self.module, self.preprocessing, self.features, self.device = module, preprocessing, features, devices[0]
        self.replicas = [module, *(copy.deepcopy(module).to(device) for device in devices[1:])]
        self.devices = list(devices)
        # Enough to fill a GPU, and few enough on a CPU for the budget to be watched between batches.
        self.batch_size = 16 if self.device.type == "cpu" else 128 * len(devices)
        # Normalisation is folded into one multiplication and one addition of the uint8 pixels.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self._factor, self._offset = 1 / (255 * std), mean / std

    def normalise(self, photos: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(batch, 3, size, size) uint8 -> float32 input of the encoder, on the device."""
        pixels = photos.to(device, non_blocking=True).float()
        return pixels * self._factor.to(device) - self._offset.to(device)

    def forward(self, pixels: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """(batch, 3, size, size) float32 -> (batch, features) float32, each row of length 1."""
        dtype = next(module.parameters()).dtype
        pixels = pixels.to(dtype).contiguous(memory_format=torch.channels_last)
        return nn.functional.normalize(module(pixels).float(), dim=1)

    @torch.inference_mode()
    def embed(self, photos: torch.Tensor, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """L2-normalised embeddings of every view.

        Args:
            photos: (batch, 3, decoded, decoded) uint8, on the CPU.
            views: each maps (batch, 3, size, size) to the same shape; `larger` stands for the photos as decoded.

        Returns:
            (batch, views, features) float32, on the CPU.
        """
        parts = photos.chunk(len(self.replicas))
        if len(parts) == 1:
            return self._embed_part(photos, views, self.module, self.device)
        with ThreadPoolExecutor(len(parts)) as pool:  # CUDA calls release the interpreter's lock
            each = zip(parts, self.replicas, self.devices, strict=False)
            tasks = [pool.submit(self._embed_part, part, views, module, device) for part, module, device in each]
            return torch.cat([task.result() for task in tasks])

    @torch.inference_mode()
    def try_one_photo(self) -> None:
        """Pass one photo through every replica, to see whether the memory suffices for it."""
        side = self.preprocessing.decoded
        photo = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        for module, device in zip(self.replicas, self.devices, strict=True):
            self._embed_views(photo, [VIEWS["plain"]], module, device)

    def _embed_views(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> torch.Tensor:
        """All views of one batch on one device; in a frame of its own, which takes along what fills the memory."""
        forget_cached(module)
        decoded = self.normalise(photos, device)
        pixels = shrink(decoded, self.preprocessing.size)
        made = (decoded if view is larger else view(pixels) for view in views)
        return torch.stack([self.forward(each, module) for each in made], dim=1).cpu()

    @torch.inference_mode()
    def _embed_part(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> torch.Tensor:
        try:
            embedded = self._embed_views(photos, views, module, device)
        except RuntimeError as error:
            if len(photos) == 1 or not OUT_OF_MEMORY.search(str(error)):
                raise
        else:
            if embedded.isfinite().all() or next(module.parameters()).dtype == torch.float32:
                return embedded
            print("half precision overflows in this encoder: going on in full", flush=True)
            module.float()
            return self._embed_part(photos, views, module, device)
        # Outside the except clause, whose traceback would hold on to the memory.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(photos) + 1) // 2
        self.batch_size = min(self.batch_size, half * len(self.replicas))
        print(f"out of memory: going on with batches of {self.batch_size} photos", flush=True)
        return torch.cat([self._embed_part(part, views, module, device) for part in photos.split(half)])


def forget_cached(module: nn.Module) -> None:
    """Let layers compute anew what they keep of their weights in evaluation mode.

    The attention biases of timm's LeViT, TinyViT and EfficientFormer are kept until `train()` is called. Loading
    weights, changing them in place or casting them does not clear them.
    """
    for layer in module.modules():
        if type(layer).train is nn.Module.train:
            continue
        modes = [(part, part.training) for part in layer.modules()]
        layer.train()
        for part, mode in modes:
            part.training = mode


def pick_devices() -> list[torch.device]:
    """The GPUs that can do a real operation, else the CPU.

    `is_available` is also true of cards that this torch was not built for; their first operation fails.
    """
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            torch.ones(8, device=device).sum().item()
            devices.append(device)
        except RuntimeError as error:
            print(f"{device} fails at a sum and is left alone: {str(error).splitlines()[0]}", flush=True)
    if not devices:
        keep_freed_memory()
    return devices or [torch.device("cpu")]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system.

    Otherwise every layer's activations, of tens of megabytes, are mapped and cleared anew, page by page, which takes as
    long again as the arithmetic. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def pick_dtype(device: torch.device, precision: str = "half") -> torch.dtype:
    """The type of an encoder's weights on a device.

    Args:
        precision: "half" is the fastest type that keeps embeddings: bf16 where the GPU has it, fp16 on a T4, which has
            fp16 tensor cores alone, and fp32 on a CPU. "full" is fp32 everywhere.
    """
    if device.type == "cpu" or precision == "full":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def build_module(library: str, architecture: str, arguments: dict) -> nn.Module:
    """An encoder without its weights. For open_clip only the visual tower is built: the texts are never needed."""
    if library == "timm":
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    # Imported here since most runs never need it; open_clip has no public way to build the one tower.
    tower = importlib.import_module("open_clip.model")
    return tower._build_vision_tower(**arguments)


def describe_versions(members: Sequence[Member]) -> str:
    """One line: the versions that run here, beside those that the members of the manifest were trained with."""
    parts = []
    for library, here in (("timm", timm.__version__), ("torch", torch.__version__)):
        trained = sorted({member.versions.get(library, "an unknown one") for member in members})
        parts.append(f"{library} {here} (trained with {' and '.join(trained)})")
    return f"running with {', '.join(parts)}"


def versions_of(spec: EncoderSpec) -> str:
    """The version of an encoder's library here and in training, for the message of an error."""
    name = "timm" if spec.library == "timm" else "open_clip_torch"
    try:
        here = timm.__version__ if name == "timm" else version(name)
    except PackageNotFoundError:
        here = "(not installed)"
    return f"{name} {here} (trained with {spec.packages.get(name, 'an unknown one')})"


def read_module(path: Path, spec: EncoderSpec) -> nn.Module:
    """The module of an encoder with its weights, frozen, in evaluation mode, on the CPU in fp32.

    Raises:
        InputError: the weights do not fit its architecture; or the library that is installed
            cannot build that architecture, as one that is older than the training's.
    """
    try:
        module = build_module(spec.library, spec.architecture, spec.arguments)
    except Exception as error:  # each version of a library fails in its own way at what it does not know
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{spec.architecture} cannot be built by {versions_of(spec)}: {reason}; run it with the version that "
            "it was trained with, or train again with this one"
        ) from error
    try:
        module.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        reason = f"{path} does not fit {spec.architecture} of {versions_of(spec)}: {shorten(error)}"
        raise InputError(f"{reason}; train or bundle again") from error
    return module.requires_grad_(False).eval()


def place_module(module: nn.Module, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """The encoder on its devices.

    Raises:
        RuntimeError: a GPU has no memory for it and one photo.
    """
    # Cast, not autocast: open_clip under bf16 autocast is 3.6 times slower than fp32 on a CPU.
    module.to(devices[0], pick_dtype(devices[0], spec.precision), memory_format=torch.channels_last)
    encoder = Encoder(module, spec.preprocessing, spec.features, devices)
    if encoder.device.type != "cpu":
        encoder.try_one_photo()
    return encoder


def open_encoder(path: Path, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """Open an encoder on the devices; on one of them, or on the CPU, where memory does not suffice.

    Args:
        path: its weights.

    Raises:
        InputError: see `read_module`.
    """
    if devices[0].type == "cpu":
        return place_module(read_module(path, spec), spec, devices)
    for choice in [devices, *([device] for device in devices if len(devices) > 1)]:
        module = read_module(path, spec)  # anew: of one that was moved in part, a part has lost its precision
        try:
            return place_module(module, spec, choice)
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        # Outside the except clause, whose traceback would hold on to the memory.
        del module
        torch.cuda.empty_cache()
        print(f"out of memory: {spec.architecture} does not fit on {' and '.join(map(str, choice))}", flush=True)
    print("going on with the CPU", flush=True)
    keep_freed_memory()
    return open_encoder(path, spec, [torch.device("cpu")])

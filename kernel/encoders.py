"""Open the encoders: build the architecture, load the weights, move the module to the GPUs or the CPU.

The `EncoderSpec` in the manifest says how to build an encoder. Nothing is downloaded.
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

# The wording of CUDA, of its libraries, and of CPU allocators on Linux and Windows.
OUT_OF_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED|can't allocate memory|not enough memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the machine is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


class Encoder:
    """Embeds photos on one device, or on several devices of the same kind.

    Attributes:
        module: maps (batch, 3, size, size) normalised pixels to (batch, features).
        preprocessing: how photos become these pixels.
        features: length of an embedding.
        batch_size: photos per forward pass on all devices together; halved when memory runs out.
        replicas: the module on each of `devices`.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, features: int, devices: Sequence[torch.device]):
        self.module, self.preprocessing, self.features, self.device = module, preprocessing, features, devices[0]
        self.replicas = [module, *(copy.deepcopy(module).to(device) for device in devices[1:])]
        self.devices = list(devices)
        # Large enough to fill a GPU. Small on a CPU, because the budget is checked between batches.
        self.batch_size = 16 if self.device.type == "cpu" else 128 * len(devices)
        # (pixels / 255 - mean) / std as one multiplication and one subtraction.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self._factor, self._offset = 1 / (255 * std), mean / std

    def normalise(self, photos: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Normalise (batch, 3, size, size) uint8 to float32 on the device."""
        pixels = photos.to(device, non_blocking=True).float()
        return pixels * self._factor.to(device) - self._offset.to(device)

    def forward(self, pixels: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Embed (batch, 3, size, size) float32. Returns (batch, features) float32, L2-normalised."""
        dtype = next(module.parameters()).dtype
        pixels = pixels.to(dtype).contiguous(memory_format=torch.channels_last)
        return nn.functional.normalize(module(pixels).float(), dim=1)

    @torch.inference_mode()
    def embed(self, photos: torch.Tensor, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """Embed every view of every photo.

        Args:
            photos: (batch, 3, decoded_size, decoded_size) uint8, on the CPU.
            views: each maps (batch, 3, size, size) to the same shape. `larger` uses the photos at `decoded_size`.

        Returns:
            (batch, views, features) float32, L2-normalised, on the CPU.
        """
        chunks = photos.chunk(len(self.replicas))
        if len(chunks) == 1:
            return self._embed_chunk(photos, views, self.module, self.device)
        with ThreadPoolExecutor(len(chunks)) as pool:  # CUDA calls release the GIL
            each = zip(chunks, self.replicas, self.devices, strict=False)
            tasks = [pool.submit(self._embed_chunk, chunk, views, module, device) for chunk, module, device in each]
            return torch.cat([task.result() for task in tasks])

    @torch.inference_mode()
    def try_one_photo(self) -> None:
        """Pass one photo through every replica, which raises an error if there is no memory for it."""
        side = self.preprocessing.decoded_size
        photo = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        for module, device in zip(self.replicas, self.devices, strict=True):
            self._embed_views(photo, [VIEWS["plain"]], module, device)

    def _embed_views(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> torch.Tensor:
        """Embed all views of one batch on one device. Its local tensors are freed when it raises an error."""
        clear_eval_caches(module)
        decoded = self.normalise(photos, device)
        pixels = shrink(decoded, self.preprocessing.size)
        made = (decoded if view is larger else view(pixels) for view in views)
        return torch.stack([self.forward(each, module) for each in made], dim=1).cpu()

    @torch.inference_mode()
    def _embed_chunk(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> torch.Tensor:
        """`_embed_views`, in smaller batches when memory runs out, and in fp32 when half precision overflows."""
        try:
            embedded = self._embed_views(photos, views, module, device)
        except RuntimeError as error:
            if len(photos) == 1 or not OUT_OF_MEMORY.search(str(error)):
                raise
        else:
            if embedded.isfinite().all() or next(module.parameters()).dtype == torch.float32:
                return embedded
            print("half precision overflows in this encoder: continuing in full precision", flush=True)
            module.float()
            return self._embed_chunk(photos, views, module, device)
        # Outside the except clause, because the traceback keeps the tensors alive.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(photos) + 1) // 2
        self.batch_size = min(self.batch_size, half * len(self.replicas))
        print(f"out of memory: continuing with batches of {self.batch_size} photos", flush=True)
        return torch.cat([self._embed_chunk(chunk, views, module, device) for chunk in photos.split(half)])


def clear_eval_caches(module: nn.Module) -> None:
    """Clear what layers cache in evaluation mode, so that it is computed from the current weights.

    timm's LeViT, TinyViT and EfficientFormer cache their attention biases until `train()` is called. Loading new
    weights, changing them in place or casting them does not clear the cache.
    """
    for layer in module.modules():
        if type(layer).train is nn.Module.train:
            continue
        modes = [(child, child.training) for child in layer.modules()]
        layer.train()
        for child, mode in modes:
            child.training = mode


def pick_devices() -> list[torch.device]:
    """The GPUs on which an operation succeeds; without any, the CPU.

    `torch.cuda.is_available()` is also true for GPUs that this build of torch does not support. Their first operation
    fails.
    """
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            torch.ones(8, device=device).sum().item()
            devices.append(device)
        except RuntimeError as error:
            print(f"{device} is not used, because an operation on it failed: {shorten(error)}", flush=True)
    if not devices:
        keep_freed_memory()
    return devices or [torch.device("cpu")]


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system. Other C libraries are not changed.

    By default, the activations of every layer (tens of megabytes) are mapped and zeroed again, page by page, which
    takes as long as the arithmetic itself.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def pick_dtype(device: torch.device, precision: str = "half") -> torch.dtype:
    """The dtype of an encoder's weights on a device.

    Args:
        precision: "half" is bf16 on GPUs that support it, fp16 on older ones (a T4's tensor cores have only fp16), and
            fp32 on a CPU. "full" is fp32 everywhere.
    """
    if device.type == "cpu" or precision == "full":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def build_module(library: str, architecture: str, arguments: dict) -> nn.Module:
    """Build an encoder with random weights. Of an open_clip model, only the vision tower is built."""
    if library == "timm":
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    # Imported only here, because most runs do not need it. open_clip has no public function that builds one tower.
    open_clip_model = importlib.import_module("open_clip.model")
    return open_clip_model._build_vision_tower(**arguments)


def describe_versions(members: Sequence[Member]) -> str:
    """One line with the versions of timm and torch, here and in the training of the members."""
    parts = []
    for library, here in (("timm", timm.__version__), ("torch", torch.__version__)):
        trained = sorted({member.versions.get(library, "an unknown version") for member in members})
        parts.append(f"{library} {here} (trained with {' and '.join(trained)})")
    return f"running with {', '.join(parts)}"


def library_versions(spec: EncoderSpec) -> str:
    """The versions of an encoder's library, here and in training, for error messages."""
    name = "timm" if spec.library == "timm" else "open_clip_torch"
    try:
        here = timm.__version__ if name == "timm" else version(name)
    except PackageNotFoundError:
        here = "(not installed)"
    return f"{name} {here} (trained with {spec.packages.get(name, 'an unknown version')})"


def read_module(path: Path, spec: EncoderSpec) -> nn.Module:
    """Build an encoder and load its weights from a file: on the CPU in fp32, in evaluation mode, parameters frozen.

    Raises:
        InputError: the installed version of the library cannot build the architecture, or the weights do not fit it.
    """
    try:
        module = build_module(spec.library, spec.architecture, spec.arguments)
    except Exception as error:  # the type depends on the library's version and on what it does not know
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{spec.architecture} cannot be built by {library_versions(spec)}: {reason}; use the version that it was "
            "trained with, or train again with this version"
        ) from error
    try:
        module.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        reason = f"{path} does not fit {spec.architecture} of {library_versions(spec)}: {shorten(error)}"
        raise InputError(f"{reason}; train or bundle again") from error
    return module.requires_grad_(False).eval()


def make_encoder(module: nn.Module, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """Move a module to the devices.

    Raises:
        RuntimeError: a GPU has not enough memory for it and one photo.
    """
    # Weights are cast, because autocast is slow: on a CPU, open_clip under bf16 takes 3.6 times as long as fp32.
    module.to(devices[0], pick_dtype(devices[0], spec.precision), memory_format=torch.channels_last)
    encoder = Encoder(module, spec.preprocessing, spec.features, devices)
    if encoder.device.type != "cpu":
        encoder.try_one_photo()
    return encoder


def open_encoder(path: Path, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """`read_module`, then `make_encoder` on all devices; if memory runs out, on one of them; at last on the CPU."""
    if devices[0].type == "cpu":
        return make_encoder(read_module(path, spec), spec, devices)
    for choice in [devices, *([device] for device in devices if len(devices) > 1)]:
        module = read_module(path, spec)  # each time, because a failed move may leave some weights in half precision
        try:
            return make_encoder(module, spec, choice)
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        # Outside the except clause, because the traceback keeps the tensors alive.
        del module
        torch.cuda.empty_cache()
        print(f"out of memory: {spec.architecture} does not fit on {' and '.join(map(str, choice))}", flush=True)
    print("continuing on the CPU", flush=True)
    keep_freed_memory()
    return open_encoder(path, spec, [torch.device("cpu")])

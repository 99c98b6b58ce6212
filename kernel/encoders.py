"""Open the encoders: build the architecture, load the weights, move the module to the GPUs or the CPU.

The `EncoderSpec` in the manifest says how to build an encoder. Nothing is downloaded.
"""

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernel.forward import Encoder, is_out_of_memory
from kernel.inputs import InputError, call_libc, shorten
from kernel.manifest import EncoderSpec, Member
from kernel.pooling import set_pooling


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
        except Exception as error:  # a RuntimeError, or what torch raises where CUDA does not start
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
    call_libc("mallopt", mmap_max, 0)
    call_libc("mallopt", trim_threshold, -1)


def pick_dtype(device: torch.device, precision: str = "half") -> torch.dtype:
    """The dtype of an encoder's weights on a device.

    Args:
        precision: "half" is bf16 on GPUs that support it, fp16 on older ones (a T4's tensor cores have only fp16), and
            fp32 on a CPU. "full" is fp32 everywhere.
    """
    if device.type == "cpu" or precision == "full":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def build_module(library: str, architecture: str, arguments: dict, pool: str = "auto") -> nn.Module:
    """Build an encoder with random weights. Of an open_clip model, only the vision tower is built.

    Args:
        arguments: of the library. In those of open_clip, `trunk_size` is the input size of a transformer of timm in the
            tower, if it is not the size for which timm builds it; open_clip too sets it afterwards.
        pool: see EncoderSpec.
    """
    if library == "timm":
        module = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    else:
        # Imported only here, because most runs do not need it. open_clip has no public function that builds one tower.
        open_clip_model = importlib.import_module("open_clip.model")
        trunk_size = arguments.get("trunk_size")
        module = open_clip_model._build_vision_tower(**{k: v for k, v in arguments.items() if k != "trunk_size"})
        if trunk_size:
            module.trunk.set_input_size(trunk_size)
    return set_pooling(module, pool)


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


class SkipInitialWeights(TorchDispatchMode):
    """Computes no initial weights: those of a file replace them. Those of a large transformer would take seconds."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if args and isinstance(args[0], nn.Parameter) and operation.overloadpacket.__name__.endswith("_"):
            return args[0]  # an in-place operation
        return operation(*args, **(kwargs or {}))


def read_module(path: Path, spec: EncoderSpec, is_mapped: bool = False) -> nn.Module:
    """Build an encoder and load its weights from a file: on the CPU in fp32, in evaluation mode, parameters frozen.

    Args:
        is_mapped: leave the weights in the memory-mapped file, in its precision, for a module that moves to a GPU.

    Raises:
        InputError: the installed version of the library cannot build the architecture, or the weights do not fit it.
    """
    try:
        with SkipInitialWeights():
            module = build_module(spec.library, spec.architecture, spec.arguments, spec.pool)
    except Exception as error:  # the type depends on the library's version and on what it does not know
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{spec.architecture} cannot be built by {library_versions(spec)}: {reason}; use the version that it was "
            "trained with, or train again with this version"
        ) from error
    try:
        module.load_state_dict(load_file(path), strict=True, assign=is_mapped)
    except RuntimeError as error:
        reason = f"{path} does not fit {spec.architecture} of {library_versions(spec)}: {shorten(error)}"
        raise InputError(f"{reason}; train or bundle again") from error
    return module.requires_grad_(False).eval()


def fitting_dtype(module: nn.Module, device: torch.device, precision: str) -> torch.dtype:
    """`pick_dtype`, but fp32 for weights that are infinite in fp16.

    Embeddings do not always show them: an infinite running variance makes its channel constant, not infinite.
    """
    dtype, largest = pick_dtype(device, precision), torch.finfo(torch.float16).max
    weights = (value for value in module.state_dict().values() if value.is_floating_point() and value.numel())
    if dtype != torch.float16 or all(value.abs().max() <= largest for value in weights):
        return dtype
    print("weights of this encoder overflow in half precision: using full precision", flush=True)
    return torch.float32


def make_encoder(module: nn.Module, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """Move a module to the devices.

    Raises:
        RuntimeError: a GPU has not enough memory for it and one photo.
    """
    # Weights are cast, because autocast is slow: on a CPU, open_clip under bf16 takes 3.6 times as long as fp32.
    dtype = fitting_dtype(module, devices[0], spec.precision)
    module.to(devices[0], dtype, memory_format=torch.channels_last)
    encoder = Encoder(module, spec.preprocessing, spec.features, devices)
    if encoder.device.type != "cpu":
        encoder.warm_up()
    return encoder


def open_encoder(path: Path, spec: EncoderSpec, devices: Sequence[torch.device]) -> Encoder:
    """`read_module`, then `make_encoder` on all devices; if memory runs out, on one of them; at last on the CPU."""
    if devices[0].type == "cpu":
        return make_encoder(read_module(path, spec), spec, devices)
    for choice in [devices, *([device] for device in devices if len(devices) > 1)]:
        # Each time, because a failed move may leave some weights in half precision.
        module = read_module(path, spec, is_mapped=True)
        try:
            return make_encoder(module, spec, choice)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except clause, because the traceback keeps the tensors alive.
        del module
        torch.cuda.empty_cache()
        print(f"out of memory: {spec.architecture} does not fit on {' and '.join(map(str, choice))}", flush=True)
    print("continuing on the CPU", flush=True)
    keep_freed_memory()
    return open_encoder(path, spec, [torch.device("cpu")])

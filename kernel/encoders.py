"""Open the encoders: build each architecture, load its weights, put it on the best device.

An encoder is described by its entry in the manifest, and only by it; nothing is downloaded.
"""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from kernel.mounts import InputError, Weights


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the square that an encoder was trained on.

    Attributes:
        size: side of the square, pixels.
        mean, std: per channel, of values in 0..1.
        interpolation: a name of `PIL.Image.Resampling`, lower case.
        scale: the shorter side is resized to `size / scale` before the centre is cut out (timm's crop_pct).
        fit: "crop" keeps the aspect ratio and loses the margins, "squash" keeps all and loses the aspect ratio.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    scale: float
    fit: str


class Encoder:
    """Photos to embeddings.

    Attributes:
        module: maps (batch, 3, size, size) normalised pixels to (batch, features).
        features: length of an embedding.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, features: int, device: torch.device):
        self.module, self.preprocessing, self.features, self.device = module, preprocessing, features, device
        # Normalisation is folded into one multiplication and one addition of the uint8 pixels.
        mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        self._factor, self._offset = 1 / (255 * std), mean / std

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def normalise(self, photos: torch.Tensor) -> torch.Tensor:
        """(batch, 3, size, size) uint8 on any device -> the encoder's input, on its device and in its precision."""
        pixels = photos.to(self.device, non_blocking=True).float() * self._factor - self._offset
        return pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, size, size) normalised pixels -> (batch, features) float32, each row of length 1."""
        return nn.functional.normalize(self.module(pixels).float(), dim=1)


def pick_device() -> torch.device:
    """The GPU, if it can do a real operation; `is_available` is also true of cards that this torch cannot drive."""
    if torch.cuda.is_available():
        try:
            torch.ones(8, device="cuda").sum().item()
            return torch.device("cuda")
        except RuntimeError as error:
            print(f"the GPU fails a sum ({str(error).splitlines()[0]}): going on with the CPU", flush=True)
    return torch.device("cpu")


def half_precision(device: torch.device) -> torch.dtype:
    """The fastest type that keeps embeddings: a T4 has fp16 tensor cores and no bf16 ones, a CPU is exact."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def install_wheels(weights: Weights, packages: Path) -> None:
    """Make the libraries that Kaggle's image lacks importable, from the wheels that travel with the weights.

    They take precedence over installed ones, so that a rehearsal runs what Kaggle will run. `--no-deps` protects the
    image's own torch, and `--target` leaves the environment as it was.

    Args:
        packages: a folder of the kernel's own, on the import path from then on.
    """
    wheels = [str(weights.file(name)) for name in sorted(weights.manifest["files"]) if name.endswith(".whl")]
    if not wheels or str(packages) in sys.path:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--upgrade", "--target", str(packages), *wheels], check=True)
    sys.path.insert(0, str(packages))
    importlib.invalidate_caches()


def build_module(library: str, architecture: str, arguments: dict) -> nn.Module:
    """An encoder without its weights. For open_clip only the visual tower is built: the texts are never needed."""
    if library == "timm":
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    # Imported here since most runs never need it; open_clip has no public way to build the one tower.
    tower = importlib.import_module("open_clip.model")
    return tower._build_vision_tower(**arguments)


def read_preprocessing(values: dict) -> Preprocessing:
    """The manifest's preprocessing, with lists as tuples."""
    return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def open_encoder(weights: Weights, entry: dict, device: torch.device, packages: Path) -> Encoder:
    """Open one encoder of the manifest, frozen, in evaluation mode.

    Raises:
        InputError: its file is missing or damaged, or does not fit its architecture.
    """
    if entry["library"] != "timm":
        install_wheels(weights, packages)
    module = build_module(entry["library"], entry["architecture"], entry["arguments"])
    path = weights.file(entry["file"])
    try:
        module.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not fit {entry['architecture']}: {reason}; train or bundle again") from error
    module.requires_grad_(False).eval()
    # Cast, not autocast: open_clip under bf16 autocast is 3.6 times slower than fp32 on a CPU.
    module.to(device, half_precision(device), memory_format=torch.channels_last)
    return Encoder(module, read_preprocessing(entry["preprocessing"]), entry["features"], device)

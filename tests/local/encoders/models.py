"""Tiny models in the formats of timm and open_clip, and embeddings by the kernel and by the libraries themselves."""

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from kernel.encoders import build_module
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.photos import decode
from local.encoders.load import load_encoder

RESNET = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
# What trainers save, by its form.
CHECKPOINTS = {
    "without head": lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "arch": "a"},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "moving average": lambda state: {"state_dict": {key: 0 * state[key] for key in state}, "state_dict_ema": state},
    "options": lambda state: {"state_dict": state, "args": argparse.Namespace(model="a", lr=0.1)},
}


def randomise(module):
    """Give every weight and batch statistic a value that has an effect on the embedding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                is_factor = value.dim() == 1 and not name.endswith(("bias", "running_mean"))
                value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + (0.9 if is_factor else -0.1))
    return module.eval()


def write_timm(folder: Path, architecture: str = "test_resnet", arguments: dict | None = None, **preprocessing):
    """Write a folder in timm's format. Returns the model, including its head of five classes."""
    folder.mkdir(parents=True, exist_ok=True)
    module = randomise(timm.create_model(architecture, num_classes=5, **(arguments or {})))
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": {**RESNET, **preprocessing}}
    config |= {"model_args": arguments} if arguments is not None else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return module


def as_pair(folder: Path, stem: str) -> Path:
    """Rename the files of a folder in timm's format to a .json and a .safetensors. Returns their stem."""
    for name, suffix in (("config.json", ".json"), ("model.safetensors", ".safetensors")):
        (folder / name).rename(folder / f"{stem}{suffix}")
    return folder / stem


def write_clip(folder: Path, preprocessing: dict | None = None, suffix: str = ".safetensors", **changes) -> Path:
    """Write a folder in open_clip's format."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {**CLIP, **changes}
    state = randomise(open_clip.model.CLIP(**model)).state_dict()
    if suffix == ".safetensors":
        save_file(state, folder / "open_clip_model.safetensors")
    else:
        torch.save(state, folder / f"open_clip_pytorch_model{suffix}")
    config = {"model_cfg": model} | ({} if preprocessing is None else {"preprocess_cfg": preprocessing})
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def change_config(path: Path, **changes: object) -> None:
    """Replace some values of a configuration file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def embed(module, described, photos: list[Path]) -> torch.Tensor:
    """Embeddings by the kernel: (photos, features), L2-normalised."""
    encoder = Encoder(module.eval(), described.preprocessing, described.features, [torch.device("cpu")])
    pixels = torch.tensor(np.stack([decode(path, encoder.preprocessing) for path in photos])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return encoder.embed(pixels, [lambda pixels: pixels])[:, 0]


def embed_with_timm(module, config: dict, photos: list[Path]) -> torch.Tensor:
    """Embeddings by timm itself."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    with torch.inference_mode():
        features = module.forward_features(torch.stack([transform(Image.open(path)) for path in photos]))
        return normalize(module.forward_head(features, pre_logits=True), dim=1)


def embed_with_open_clip(folder: Path, photos: list[Path]) -> torch.Tensor:
    """Embeddings by open_clip itself."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(path)) for path in photos])
        return model.eval().encode_image(pixels, normalize=True)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal embeddings, up to small differences: the libraries resize with Pillow, the kernel with PyTorch."""
    assert found.shape == expected.shape
    errors = 1 - torch.cosine_similarity(found.double(), expected.double())
    between_photos = 1 - torch.cosine_similarity(expected.double(), expected.double().roll(1, dims=0))
    assert errors.max() < min(1e-5, between_photos.min() / 5000)


def assert_rebuilds(module, described, photos: list[Path]) -> None:
    """The description, as the manifest stores it, and the weights give the same encoder."""
    arguments = json.loads(json.dumps(described.arguments))
    rebuilt = build_module(described.library, described.architecture, arguments, described.pool)
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(embed(rebuilt, described, photos), embed(module, described, photos))


def refusal(spec: object, **options) -> str:
    """The message with which a SPEC is refused."""
    with pytest.raises(InputError) as refused:
        load_encoder(str(spec), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)

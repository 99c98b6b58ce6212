"""Encoders are rebuilt from their manifest entry alone, exactly, or refused."""

import pytest
import torch
from safetensors.torch import save_file

from kernel.encoders import build_module, open_encoder, pick_device, read_preprocessing
from kernel.mounts import InputError, Weights, sha256

PREPROCESSING = {"size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
ENTRY = {
    "library": "timm",
    "architecture": "test_resnet",
    "arguments": {},
    "features": 96,
    "file": "encoder.safetensors",
    "preprocessing": {**PREPROCESSING, "scale": 1.0, "fit": "crop"},
}


def saved(folder, module) -> Weights:
    save_file(module.state_dict(), folder / "encoder.safetensors")
    return Weights(folder, {"files": {"encoder.safetensors": sha256(folder / "encoder.safetensors")}})


def test_an_encoder_embeds_as_the_module_it_was_saved_from(tmp_path):
    module = build_module("timm", "test_resnet", {}).eval()
    encoder = open_encoder(saved(tmp_path, module), ENTRY, torch.device("cpu"), tmp_path / "packages")
    photos = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(PREPROCESSING[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = module((photos / 255 - mean) / std)
        found = encoder.embed(encoder.normalise(photos))
    assert found.shape == (3, expected.shape[1])
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert (torch.cosine_similarity(found, expected) > 0.99999).all()
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path):
    weights = saved(tmp_path, build_module("timm", "test_vit", {}))
    with pytest.raises(InputError, match="does not fit test_resnet") as error:
        open_encoder(weights, ENTRY, torch.device("cpu"), tmp_path / "packages")
    assert "\n" not in str(error.value)


def test_preprocessing_comes_back_from_json_as_it_was():
    found = read_preprocessing({**PREPROCESSING, "scale": 0.875, "fit": "squash"})
    assert (found.mean, found.std, found.scale, found.fit) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 0.875, "squash")


def test_the_device_is_one_that_works():
    assert torch.ones(2, device=pick_device()).sum().item() == 2

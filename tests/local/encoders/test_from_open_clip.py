"""An encoder in open_clip's format gives open_clip's embeddings, and its description rebuilds it.

python -m pytest tests/local/encoders/test_from_open_clip.py
"""

import json
import os
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from kernel.encoders import build_module
from local.encoders.load import load_encoder
from tests.local.encoders import models
from tests.local.encoders.models import CLIP, VISION, assert_rebuilds, assert_same, embed, refusal, write_clip

OF_TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 32}
BILINEAR = {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("preprocessing", "changes"),
    [
        ({"resize_mode": "shortest", "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6]}, {}),
        ({"resize_mode": "squash", **BILINEAR}, {"quick_gelu": True}),
        ({"interpolation": "random"}, {}),  # in training; evaluation is bicubic
        (None, {"vision_cfg": {**VISION, "pool_type": "avg", "mlp_ratio": 2.0}}),
        ({"std": [0.3, 0.2, 0.1]}, {"vision_cfg": {**OF_TIMM, "timm_model_pretrained": False}}),
    ],
    ids=["shorter side", "squash", "random interpolation", "defaults", "a tower of timm"],
)
def test_a_folder_gives_open_clips_embeddings(tmp_path, photos, preprocessing, changes):
    folder = write_clip(tmp_path / "clip", preprocessing, **changes)
    expected = models.embed_with_open_clip(folder, photos)
    if "timm_model_name" in changes.get("vision_cfg", {}):  # as it is published: the base weights are a download
        model = {**CLIP, "vision_cfg": {**OF_TIMM, "timm_model_pretrained": True}}
        models.change_config(folder / "open_clip_config.json", model_cfg=model)
    module, described = load_encoder(str(folder))
    assert_same(embed(module, described, photos), expected)
    assert_rebuilds(module, described, photos)
    assert (described.library, described.architecture, described.features) == ("open_clip", "clip", 24)
    assert described.packages["open_clip_torch"] == open_clip.__version__


def test_weights_of_another_image_size_are_interpolated_as_open_clip_does(tmp_path, photos):
    folder = write_clip(tmp_path / "clip")
    model = {**CLIP, "vision_cfg": {**VISION, "image_size": 48}}
    models.change_config(folder / "open_clip_config.json", model_cfg=model)
    module, described = load_encoder(str(folder))
    assert described.preprocessing.size == 48
    assert_same(embed(module, described, photos), models.embed_with_open_clip(folder, photos))


@pytest.mark.parametrize("form", ["state_dict", "module.", "both"])
@pytest.mark.parametrize("name", ["epoch_3.pt", "open_clip_pytorch_model.bin"])
def test_the_model_is_read_from_a_training_checkpoint(tmp_path, photos, form, name):
    folder = write_clip(tmp_path / "clip")
    expected = embed(*load_encoder(str(folder)), photos)
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(models.CHECKPOINTS[form](state), folder / name)
    assert_same(embed(*load_encoder(str(folder)), photos), expected)


def test_the_text_tower_is_left_out(tmp_path):
    folder, text = write_clip(tmp_path / "clip"), {"hf_model_name": "nobody/this-would-be-downloaded"}
    models.change_config(folder / "open_clip_config.json", model_cfg={**CLIP, "text_cfg": text})
    module, described = load_encoder(str(folder))
    assert not [name for name in module.state_dict() if "token_embedding" in name or name == "logit_scale"]
    assert set(described.arguments) == {"embed_dim", "vision_cfg", "quick_gelu"}


def test_of_a_coca_tower_the_vector_is_used_and_not_the_tokens(tmp_path, photos):
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    folder = write_clip(tmp_path / "coca", vision_cfg=vision)
    original = build_module("open_clip", "", {"embed_dim": CLIP["embed_dim"], "vision_cfg": vision}).eval()
    state = load_file(folder / "open_clip_model.safetensors")
    original.load_state_dict({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")})
    module, described = load_encoder(str(folder))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        pooled, tokens = original(pixels)
        assert tokens.ndim == 3
        assert torch.equal(module.eval()(pixels), pooled)
    assert_rebuilds(module, described, photos)


def test_a_tower_and_preprocessing_that_the_kernel_does_not_support_are_refused(tmp_path):
    unpooled = write_clip(tmp_path / "clip", vision_cfg={**VISION, "pool_type": "none"})
    assert "expected one vector" in refusal(unpooled)
    assert "resize_mode longest" in refusal(write_clip(tmp_path / "clip", {"resize_mode": "longest"}))


@pytest.mark.parametrize(
    ("name", "advice"),
    [("ViT-B-32/nosuchtag", "laion2b_s34b_b79k"), ("ViT-B-32", "laion2b_s34b_b79k"), ("None/openai", "list_models")],
)
def test_unknown_weights_are_refused_with_the_known_ones(name, advice):
    message = refusal(f"open_clip:{name}")
    assert message.startswith(f"open_clip has no {name}")
    assert advice in message


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "epoch_3.pt"])
def test_weights_of_another_architecture_are_refused_with_their_path(tmp_path, name):
    folder = write_clip(tmp_path / "clip", vision_cfg={**VISION, "width": 48})
    weights = folder / "open_clip_model.safetensors"
    shutil.copy(write_clip(tmp_path / "small") / weights.name, weights)
    if name != weights.name:
        torch.save({"state_dict": load_file(weights)}, folder / name)
        weights.unlink()
    assert refusal(folder).startswith(f"{folder / name} does not match {folder / 'open_clip_config.json'}: ")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["code", b"", b"<html>404</html>", "cut off", "a list"])
def test_a_bin_without_tensors_is_refused_with_its_path_and_runs_no_code(tmp_path, content):
    folder = write_clip(tmp_path / "clip", suffix=".bin")
    path = folder / "open_clip_pytorch_model.bin"
    if content == "code":
        torch.save({"visual.proj": Trap(tmp_path / "sprung")}, path)
    elif content == "a list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(path.read_bytes()[:-500] if content == "cut off" else content)
    assert refusal(folder).startswith(f"{path} cannot be read as weights: ")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "config", ["{", [], {}, {"model_cfg": {"embed_dim": 24}}, {"model_cfg": {"embed_dim": 24, "vision_cfg": {"a": 1}}}]
)
def test_a_wrong_configuration_is_refused_with_its_path(tmp_path, config):
    path = write_clip(tmp_path / "clip") / "open_clip_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    assert refusal(path.parent).startswith(str(path))

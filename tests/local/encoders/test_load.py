"""Every form of `--encoder` gives the embeddings that the library itself gives, and a description that rebuilds it.

python -m pytest tests/local/encoders/test_load.py
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from kernel.encoders import Encoder, build_module
from kernel.inputs import InputError
from kernel.manifest import EncoderSpec, Preprocessing, read_manifest
from kernel.photos import decode
from local.encoders.load import load_encoder, same_weights, take_larger
from tests.conftest import photo

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESNET = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Encoders this small are quickest on one thread, above all on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module: nn.Module) -> nn.Module:
    """Weights and batch statistics such that each of them shows in the embedding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                is_factor = value.dim() == 1 and not name.endswith(("bias", "running_mean"))
                value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + (0.9 if is_factor else -0.1))
    return module.eval()


def write_timm(
    weights: Path, config: Path, architecture: str = "test_resnet", arguments: dict | None = None, **preprocessing
) -> nn.Module:
    """Write weights and configuration as timm does; returns the model, its head of five classes included."""
    module = randomise(timm.create_model(architecture, num_classes=5, **(arguments or {})))
    for folder in (weights.parent, config.parent):
        folder.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), weights)
    description = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": {**RESNET, **preprocessing}}
    description |= {"model_args": arguments} if arguments is not None else {}
    config.write_text(json.dumps(description), encoding="utf-8")
    return module


def write_clip(folder: Path, preprocessing: dict | None = None, suffix: str = ".safetensors", **changes) -> Path:
    """Write a tiny open_clip model as the hub has it."""
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


def photos(folder: Path) -> list[Path]:
    sizes = ((90, 70), (50, 120), (64, 64))
    return [photo(folder / f"{seed}.png", seed, size) for seed, size in enumerate(sizes)]


def embed(module: nn.Module, described: EncoderSpec, paths: list[Path]) -> torch.Tensor:
    """Embeddings as the kernel makes them: (photos, features), rows of length 1."""
    encoder = Encoder(module.eval(), described.preprocessing, described.features, [torch.device("cpu")])
    pixels = torch.tensor(np.stack([decode(path, encoder.preprocessing) for path in paths])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return encoder.embed(pixels, [lambda photos: photos])[:, 0]


def embed_timm(module: nn.Module, config: dict, paths: list[Path]) -> torch.Tensor:
    """The same as timm itself makes them."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    with torch.inference_mode():
        features = module.forward_features(torch.stack([transform(Image.open(path)) for path in paths]))
        return nn.functional.normalize(module.forward_head(features, pre_logits=True), dim=1)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal embeddings, by what sets photos apart; timm and open_clip resize with Pillow, the kernel with PyTorch."""

    def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(one.double(), other.double())

    assert found.shape == expected.shape
    assert distances(found, expected).max() < 1e-5
    assert distances(found, expected).max() < distances(expected, expected.roll(1, dims=0)).min() / 5000


def assert_rebuilds(module: nn.Module, described: EncoderSpec, paths: list[Path]) -> None:
    """The manifest's description and the weights alone give the same encoder, as the kernel builds it."""
    rebuilt = build_module(described.library, described.architecture, json.loads(json.dumps(described.arguments)))
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(embed(rebuilt, described, paths), embed(module, described, paths))


def refusal(spec: object, **options) -> str:
    with pytest.raises(InputError) as refused:
        load_encoder(str(spec), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# A stem, and a folder of timm.


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_resnet", None),
        ("test_resnet", {}),
        ("test_resnet", {"act_layer": "gelu", "output_stride": 16}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_vit", {"img_size": 64, "class_token": False, "global_pool": "avg", "act_layer": "relu"}),
        ("test_convnext", {"head_hidden_size": 20}),
    ],
    ids=[
        "resnet",
        "resnet with no arguments",
        "resnet with arguments",
        "resnet that pools the maximum",
        "vit with arguments",
        "convnext with a head",
    ],
)
def test_a_stem_embeds_as_timm_does_with_the_arguments_that_it_was_made_with(
    tmp_path: Path, architecture: str, arguments: dict | None
) -> None:
    stem = tmp_path / "my.encoder v2"
    original = write_timm(Path(f"{stem}.safetensors"), Path(f"{stem}.json"), architecture, arguments)
    module, described = load_encoder(str(stem))
    paths = photos(tmp_path)
    expected = embed_timm(original, RESNET, paths)
    assert_same(embed(module, described, paths), expected)
    assert_rebuilds(module, described, paths)
    assert (described.library, described.architecture, described.features) == ("timm", architecture, expected.shape[1])
    assert described.packages == {"timm": timm.__version__}


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "center"},
        {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"},
        {},
    ],
    ids=["crop", "squash", "squash and crop", "timm's defaults"],
)
def test_photos_are_prepared_as_the_weights_were_evaluated(tmp_path: Path, preprocessing: dict) -> None:
    original = write_timm(tmp_path / "a.safetensors", tmp_path / "a.json", **preprocessing)
    module, described = load_encoder(str(tmp_path / "a"))
    paths = photos(tmp_path)
    assert_same(embed(module, described, paths), embed_timm(original, {**RESNET, **preprocessing}, paths))


def test_a_preparation_that_the_kernel_does_not_know_is_refused_and_not_replaced(tmp_path: Path) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json", crop_mode="border")
    assert "border" in refusal(tmp_path / "a")
    write_timm(tmp_path / "b.safetensors", tmp_path / "b.json", interpolation="lanczos")
    assert "interpolation lanczos" in refusal(tmp_path / "b")


def test_a_folder_of_timms_hub_embeds_as_timm_does(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    original = randomise(timm.create_model("test_resnet", num_classes=3, act_layer="gelu"))
    timm.models.save_for_hf(original, folder, model_args={"act_layer": "gelu"}, safe_serialization=True)
    assert (folder / "model.safetensors").is_file()
    module, described = load_encoder(str(folder))
    paths, config = photos(tmp_path), json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    assert_same(embed(module, described, paths), embed_timm(original, config, paths))
    own = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same(embed(module, described, paths), embed_timm(own.eval(), config, paths))
    assert_rebuilds(module, described, paths)


def test_a_folder_of_timms_hub_may_hold_a_bin_of_tensors(tmp_path: Path) -> None:
    original = randomise(timm.create_model("test_resnet", num_classes=3))
    timm.models.save_for_hf(original, tmp_path / "hub", safe_serialization=False)
    module, described = load_encoder(str(tmp_path / "hub"))
    paths = photos(tmp_path)
    assert_same(embed(module, described, paths), embed_timm(original, original.pretrained_cfg, paths))


def test_another_image_size_is_another_preparation_of_the_same_weights(tmp_path: Path) -> None:
    original = write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    module, described = load_encoder(str(tmp_path / "a"), image_size=96)
    paths = photos(tmp_path)
    assert described.preprocessing.size == 96
    assert_same(embed(module, described, paths), embed_timm(original, {**RESNET, "input_size": [3, 96, 96]}, paths))


@pytest.mark.parametrize(
    ("arguments", "preprocessing"),
    [
        (None, {"input_size": [3, 64, 64], "fixed_input_size": True}),
        (None, {"input_size": [3, 64, 64]}),  # that it is fixed is the architecture's
        ({"img_size": 64}, {"input_size": [3, 160, 160], "fixed_input_size": True}),
    ],
)
def test_a_transformer_tuned_at_another_size_is_built_at_that_size(
    tmp_path: Path, arguments: dict | None, preprocessing: dict
) -> None:
    folder = tmp_path / "vit"
    original = write_timm(folder / "model.safetensors", folder / "config.json", "test_vit", {"img_size": 64})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_args": arguments or {}, "pretrained_cfg": RESNET | preprocessing}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    module, described = load_encoder(str(folder))
    assert described.arguments == {"img_size": 64}
    assert described.preprocessing.size == 64
    paths = photos(tmp_path)
    assert_same(embed(module, described, paths), embed_timm(original, RESNET, paths))
    assert_rebuilds(module, described, paths)


@pytest.mark.parametrize("classes", [1000, 0, None])
def test_the_head_need_not_have_the_classes_of_the_configuration(tmp_path: Path, classes: int | None) -> None:
    original = write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")  # with a head of five classes
    config = json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) | {"num_classes": classes}
    (tmp_path / "a.json").write_text(json.dumps(config), encoding="utf-8")
    paths = photos(tmp_path)
    assert_same(embed(*load_encoder(str(tmp_path / "a")), paths), embed_timm(original, RESNET, paths))
    save_file({k: v for k, v in original.state_dict().items() if not k.startswith("fc.")}, tmp_path / "a.safetensors")
    assert_same(embed(*load_encoder(str(tmp_path / "a")), paths), embed_timm(original, RESNET, paths))


def test_a_configuration_of_one_table_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    original = write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5, **RESNET}))
    paths = photos(tmp_path)
    assert_same(embed(*load_encoder(str(tmp_path / "a")), paths), embed_timm(original, RESNET, paths))


# Checkpoints of a training.


def damaged(state: dict) -> dict:
    return {key: torch.zeros_like(value) for key, value in state.items()}


CHECKPOINTS = {
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "arch": "a"},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "moving average": lambda state: {"state_dict": damaged(state), "state_dict_ema": state},
    "options": lambda state: {"state_dict": state, "args": argparse.Namespace(model="a", lr=0.1)},
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_best.pth.tar", "last.pth"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_checkpoint_of_a_training_is_read_as_its_model(tmp_path: Path, checkpoint: Callable, name: str) -> None:
    folder = tmp_path / "timm"
    original = write_timm(folder / "model.safetensors", folder / "config.json")
    (folder / "model.safetensors").unlink()
    torch.save(checkpoint(original.state_dict()), folder / name)
    paths = photos(tmp_path)
    assert_same(embed(*load_encoder(str(folder)), paths), embed_timm(original, RESNET, paths))


@pytest.mark.parametrize("form", ["state_dict", "module.", "both"])
def test_a_checkpoint_of_open_clips_training_is_read_as_its_model(tmp_path: Path, form: str) -> None:
    paths = photos(tmp_path)
    expected = embed(*load_encoder(str(write_clip(tmp_path / "clip"))), paths)
    state = load_file(tmp_path / "clip" / "open_clip_model.safetensors")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    torch.save(CHECKPOINTS[form](state), tmp_path / "clip" / "epoch_3.pt")
    assert_same(embed(*load_encoder(str(tmp_path / "clip")), paths), expected)


# Towers that give more than one vector of a photo.


def test_of_a_coca_tower_the_vector_is_taken_and_not_the_tokens(tmp_path: Path) -> None:
    vision = {**CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
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
    assert_rebuilds(module, described, photos(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "arguments", "said"),
    [
        ("test_resnet", {"global_pool": ""}, "shape (1, 96, 2, 2)"),
        ("test_vit", {"img_size": 64, "global_pool": ""}, "shape (1, 17, 64)"),
        ("test_resnet", {"features_only": True}, "a list"),
    ],
)
def test_what_is_not_one_vector_of_a_photo_is_refused(
    tmp_path: Path, architecture: str, arguments: dict, said: str
) -> None:
    module = timm.create_model(architecture, num_classes=5, **arguments)
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    config = {"architecture": architecture, "num_classes": 5, "model_args": arguments, "pretrained_cfg": RESNET}
    (tmp_path / "a.json").write_text(json.dumps(config), encoding="utf-8")
    message = refusal(tmp_path / "a")
    assert said in message
    assert "expected one vector" in message


def test_a_tower_without_pooling_is_refused(tmp_path: Path) -> None:
    message = refusal(write_clip(tmp_path / "clip", vision_cfg={**CLIP["vision_cfg"], "pool_type": "none"}))
    assert "expected one vector" in message


# The view `larger`.


@pytest.mark.parametrize(
    ("architecture", "arguments", "larger"),
    [
        ("test_resnet", {}, 96),
        ("test_vit", {"img_size": 64}, 96),
        ("test_vit", {"img_size": 112, "patch_size": 14}, 140),
    ],
    ids=["a convolution", "a transformer", "patches of 14"],
)
def test_an_encoder_that_takes_larger_photos_is_the_same_at_its_own_size(
    tmp_path: Path, architecture: str, arguments: dict, larger: int
) -> None:
    size = arguments.get("img_size", 64)
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json", architecture, arguments, input_size=[3, size, size])
    module, described = load_encoder(str(tmp_path / "a"))
    taken, enlarged = take_larger(module, described)
    assert enlarged.preprocessing == replace(described.preprocessing, larger_size=larger)
    pixels = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(taken(pixels), module.eval()(pixels))

    arguments = json.loads(json.dumps(enlarged.arguments))  # as the kernel reads them
    rebuilt = build_module(enlarged.library, enlarged.architecture, arguments).eval()
    rebuilt.load_state_dict(taken.state_dict(), strict=True)
    pixels = torch.rand(2, 3, larger, larger)
    with torch.inference_mode():
        assert torch.equal(rebuilt(pixels), taken(pixels))


def test_an_encoder_of_one_size_refuses_the_larger_view_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the view larger: clip takes photos of") as error:
        take_larger(*load_encoder(str(write_clip(tmp_path / "clip"))))
    assert "\n" not in str(error.value)


# timm by name.


def test_a_timm_name_without_pretraining_has_the_seeds_weights_and_timms_preparation() -> None:
    torch.manual_seed(1)
    module, described = load_encoder("timm:test_resnet", pretrained=False, image_size=48)
    torch.manual_seed(1)
    expected = timm.create_model("test_resnet", num_classes=0)
    assert all(map(torch.equal, module.state_dict().values(), expected.state_dict().values()))
    size, config = described.preprocessing.size, timm.get_pretrained_cfg("test_resnet")
    assert (size, described.features) == (48, expected.num_features)
    assert load_encoder("timm:test_resnet", pretrained=False)[1].preprocessing.size == config.input_size[1]
    assert described.preprocessing.mean == config.mean
    assert described.preprocessing.crop_pct == config.crop_pct


def test_a_timm_name_with_a_tag_is_rebuilt_by_its_architecture(tmp_path: Path) -> None:
    module, described = load_encoder("timm:test_vit.r160_in1k", pretrained=False)
    assert described.architecture == "test_vit"
    assert_rebuilds(randomise(module), described, photos(tmp_path))


def test_an_unknown_timm_name_is_refused_with_some_that_there_are() -> None:
    message = refusal("timm:resnet10x", pretrained=False)
    assert "resnet10x" in message
    assert "resnet10t" in message
    assert "test_vit" in refusal("timm:test_vot", pretrained=False)


def test_unknown_weights_of_a_timm_name_are_refused() -> None:
    assert "test_resnet.nosuchtag" in refusal("timm:test_resnet.nosuchtag")


@pytest.mark.parametrize("size", [50, -5])
def test_an_image_size_that_the_architecture_cannot_take_is_refused(size: int) -> None:
    message = refusal("timm:test_vit", pretrained=False, image_size=size)
    assert f"image_size = {size}" in message
    assert "test_vit" in message


# open_clip.


CLIPS = {
    "shorter side": ({"resize_mode": "shortest", "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6]}, {}),
    "squash": (
        {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"quick_gelu": True},
    ),
    "open_clip's defaults": (None, {"vision_cfg": {**CLIP["vision_cfg"], "pool_type": "avg", "mlp_ratio": 2.0}}),
    "a tower of timm": (
        {"std": [0.3, 0.2, 0.1]},
        {
            "vision_cfg": {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": True,
                "timm_pool": "token",
                "timm_proj": "linear",
                "image_size": 32,
            }
        },
    ),
}


@pytest.mark.parametrize(("preprocessing", "changes"), CLIPS.values(), ids=CLIPS.keys())
def test_an_open_clip_folder_embeds_as_open_clip_does(
    tmp_path: Path, preprocessing: dict | None, changes: dict
) -> None:
    no_base = {"timm_model_pretrained": False} if "timm_model_name" in changes.get("vision_cfg", {}) else {}
    folder = tmp_path / "clip"
    written = {**changes, "vision_cfg": {**changes.get("vision_cfg", CLIP["vision_cfg"]), **no_base}}
    write_clip(folder, preprocessing, **written)
    original, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"] = {**CLIP, **changes}  # with its base weights on, which would be a download
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    module, described = load_encoder(str(folder))
    paths = photos(tmp_path)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(path)) for path in paths])
        expected = original.eval().encode_image(pixels, normalize=True)
    assert_same(embed(module, described, paths), expected)
    assert_rebuilds(module, described, paths)
    assert (described.library, described.architecture, described.features) == ("open_clip", "clip", 24)
    assert described.packages["open_clip_torch"] == open_clip.__version__


def test_an_open_clip_folder_may_hold_a_bin_of_tensors(tmp_path: Path) -> None:
    paths = photos(tmp_path)
    found, expected = (
        embed(*load_encoder(str(write_clip(tmp_path / suffix, suffix=suffix))), paths)
        for suffix in (".bin", ".safetensors")
    )
    assert_same(found, expected)


def test_the_texts_of_a_clip_are_left_behind(tmp_path: Path) -> None:
    module, described = load_encoder(str(write_clip(tmp_path / "clip")))
    assert not [name for name in module.state_dict() if "token_embedding" in name or name == "logit_scale"]
    assert "text_cfg" not in described.arguments


def test_a_resize_that_the_kernel_does_not_know_is_refused(tmp_path: Path) -> None:
    assert "resize_mode longest" in refusal(write_clip(tmp_path / "clip", {"resize_mode": "longest"}))


def test_an_interpolation_at_random_is_bicubic_once_trained_as_in_open_clip(tmp_path: Path) -> None:
    _, described = load_encoder(str(write_clip(tmp_path / "clip", {"interpolation": "random"})))
    assert described.preprocessing.interpolation == "bicubic"


def test_unknown_weights_of_open_clip_are_refused_with_those_that_there_are() -> None:
    message = refusal("open_clip:ViT-B-32/nosuchtag")
    assert "ViT-B-32/nosuchtag" in message
    assert "laion2b_s34b_b79k" in message
    assert "ViT-B-32" in refusal("open_clip:ViT-B-32")
    assert "list_models" in refusal("open_clip:NoSuchModel/openai")


# The hub.


class Hub(BaseHTTPRequestHandler):
    """The wire of the hub, as far as a download of one file uses it, over a folder OWNER/NAME/FILE."""

    root: Path
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        owner, name, *rest = self.path.strip("/").split("/")
        path = self.root / owner / name / rest[-1]
        if name.endswith("gated"):
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif rest[:2] != ["resolve", "main"] and rest[:2] != ["resolve", COMMIT]:
            self.answer(404, b"", {})
        elif not path.parent.is_dir():
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not path.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(root: Path, requests: list[str]) -> Iterator[str]:
    """A hub on the loopback, by its address."""
    handler = type("Served", (Hub,), {"root": root, "requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


PROBE = """
import json, sys
from safetensors.torch import save_file
from kernel.inputs import InputError
from kernel.manifest import to_json
from local.encoders.load import load_encoder

answers = {}
for number, spec in enumerate(sys.argv[2:]):
    try:
        module, described = load_encoder(spec)
        save_file(module.state_dict(), f"{sys.argv[1]}/{number}.safetensors")
        answers[spec] = {"entry": to_json(described), "weights": f"{number}.safetensors"}
    except InputError as error:
        answers[spec] = {"error": str(error)}
    except Exception as error:
        answers[spec] = {"defect": repr(error)}
with open(f"{sys.argv[1]}/answers.json", "w") as file:
    json.dump(answers, file)
"""
LIBRARIES = ("timm", "open_clip")
SERVED = ("hf-hub:owner/clip", "hf-hub:owner/clip-bin", "hf-hub:owner/resnet", "timm:hf-hub:owner/resnet")
UNSERVED = (
    "hf-hub:owner/none",
    "hf-hub:owner/gated",
    "hf-hub:owner/dinov3-gated",
    "hf-hub:owner/texts",
    "hf-hub:owner/transformers",
    "timm:hf-hub:owner/clip",
    "hf-hub:a/b/c",
    "hf-hub:",
)


def ask(out: Path, specs: Sequence[str], address: str, offline: bool = False) -> dict[str, dict]:
    """What a process of its own, which finds the hub's cache beside `out`, answers to each spec."""
    out.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(out.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_HUB_OFFLINE": str(int(offline)), "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": ""}
    start = [sys.executable, "-c", PROBE, str(out), *specs]
    done = subprocess.run(start, cwd=ROOT, env=kept | settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, dict], list[str]]:
    """What is served, what was saved, the answers by spec, and the requests; one process asks for all, as a user's."""
    root, out = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("out") / "online"
    write_clip(root / "owner" / "clip", {"resize_mode": "squash"})
    (root / "owner" / "clip" / "open_clip_pytorch_model.bin").write_bytes(b"never asked for")
    write_clip(root / "owner" / "clip-bin", suffix=".bin")
    folder = root / "owner" / "resnet"
    write_timm(folder / "model.safetensors", folder / "config.json", arguments={"act_layer": "gelu"})
    (root / "owner" / "texts").mkdir()
    (root / "owner" / "texts" / "README.md").write_text("no model", encoding="utf-8")
    (root / "owner" / "transformers").mkdir()
    (root / "owner" / "transformers" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    (root / "owner" / "transformers" / "model.safetensors").write_bytes(b"never asked for")
    requests: list[str] = []
    with serve(root, requests) as address:
        answers = ask(out, (*SERVED, *UNSERVED), address)
    return root, out, answers, requests


def spec_of(values: dict) -> EncoderSpec:
    """The description that an answer holds as JSON."""
    return EncoderSpec(**values | {"preprocessing": Preprocessing(**values["preprocessing"])})


@pytest.mark.parametrize("spec", SERVED)
def test_a_model_of_the_hub_is_that_of_its_folder(hub: tuple, spec: str, tmp_path: Path) -> None:
    root, out, answers, _ = hub
    assert "entry" in answers[spec], answers[spec]
    described, paths = spec_of(answers[spec]["entry"]), photos(tmp_path)
    expected = load_encoder(str(root / spec.removeprefix("timm:").removeprefix("hf-hub:")))
    module = build_module(described.library, described.architecture, described.arguments)
    module.load_state_dict(load_file(out / answers[spec]["weights"]))
    assert_same(embed(module, described, paths), embed(*expected, paths))


def test_what_was_fetched_once_is_loaded_from_the_cache_without_a_network(hub: tuple) -> None:
    out, answers = hub[1], hub[2]
    nowhere, offline = "http://127.0.0.1:9", out.parent / "offline"
    again = ask(offline, (*SERVED, "hf-hub:owner/other"), nowhere, offline=True)
    few = [next(spec for spec in SERVED if answers[spec]["entry"]["library"] == library) for library in LIBRARIES]
    unreachable = ask(out.parent / "unreachable", few, nowhere)  # whose every request the hub's client tries again
    for spec in SERVED:
        assert again[spec]["entry"] == answers[spec]["entry"]
        assert spec not in few or unreachable[spec]["entry"] == answers[spec]["entry"]
        first, second = (load_file(folder / answers[spec]["weights"]) for folder in (out, offline))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "fetch it once without HF_HUB_OFFLINE=1" in again["hf-hub:owner/other"]["error"]


def test_of_gated_weights_of_dinov3_the_copies_that_are_not_are_named(hub: tuple) -> None:
    assert "not gated: timm:vit_small_patch16_dinov3.lvd1689m" in hub[2]["hf-hub:owner/dinov3-gated"]["error"]
    assert "log in" in hub[2]["hf-hub:owner/gated"]["error"]


def test_of_a_repository_of_transformers_no_weights_are_fetched(hub: tuple) -> None:
    answer, fetched = hub[2]["hf-hub:owner/transformers"], hub[3]
    assert "the same weights are among timm:vit_base_patch16_siglip_224.webli" in answer["error"]
    assert not [request for request in fetched if "transformers" in request and "safetensors" in request]


def test_a_model_of_the_hub_is_called_by_its_name_and_not_by_its_commit(hub: tuple) -> None:
    answers = hub[2]
    assert answers["hf-hub:owner/resnet"]["entry"]["architecture"] == "test_resnet"
    assert "clip" in answers["hf-hub:owner/clip"]["entry"]["architecture"]


def test_of_the_hub_only_the_configuration_and_one_file_of_weights_is_fetched(hub: tuple) -> None:
    fetched = [request.rpartition("/")[2] for request in hub[3] if request.startswith("GET /owner/clip/")]
    assert sorted(set(fetched)) == ["open_clip_config.json", "open_clip_model.safetensors"]


@pytest.mark.parametrize("spec", UNSERVED)
def test_what_the_hub_does_not_give_is_refused_in_one_line_with_its_name(hub: tuple, spec: str) -> None:
    answer = hub[2][spec]
    assert set(answer) == {"error"}, answer
    assert spec in answer["error"]
    assert "\n" not in answer["error"]


# Configurations of transformers, which leave out what is their family's default.
SIGLIP2 = {"text_config": {"vocab_size": 256000}}
TRANSFORMERS = {
    "timm:vit_small_patch16_dinov3.lvd1689m": {"model_type": "dinov3_vit", "hidden_size": 384},
    "timm:vit_small_plus_patch16_dinov3.lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 384,
        "use_gated_mlp": True,
    },
    "timm:vit_huge_plus_patch16_dinov3.lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 1280,
        "use_gated_mlp": True,
    },
    "timm:vit_7b_patch16_dinov3.lvd1689m": {"model_type": "dinov3_vit", "hidden_size": 4096, "use_gated_mlp": True},
    "timm:convnext_tiny.dinov3_lvd1689m": {"model_type": "dinov3_convnext"},
    "timm:vit_large_patch14_dinov2.lvd142m": {"model_type": "dinov2", "hidden_size": 1024, "patch_size": 14},
    "timm:vit_giant_patch14_reg4_dinov2.lvd142m": {"model_type": "dinov2_with_registers", "hidden_size": 1536},
    "timm:vit_so400m_patch14_siglip_384.webli": {
        "model_type": "siglip",
        "vision_config": {"hidden_size": 1152, "image_size": 384, "patch_size": 14},
    },
    "timm:vit_base_patch16_siglip_224.v2_webli": {"model_type": "siglip", **SIGLIP2},
    "timm:vit_giantopt_patch16_siglip_384.v2_webli": {
        "model_type": "siglip",
        "vision_config": {"hidden_size": 1536, "image_size": 384},
        **SIGLIP2,
    },
    "timm:naflexvit_base_patch16_siglip.v2_webli": {"model_type": "siglip2"},
    "open_clip:ViT-B-32/openai": {"model_type": "clip"},
    "open_clip:ViT-L-14-336/openai": {
        "model_type": "clip",
        "vision_config": {"hidden_size": 1024, "image_size": 336, "patch_size": 14},
    },
    "timm:vit_base_patch16_224.augreg_in21k": {"model_type": "vit"},
    "timm:vit_large_patch16_224.mae": {"model_type": "vit_mae", "hidden_size": 1024},
    "timm:beit_base_patch16_224.in22k_ft_in22k": {"model_type": "beit"},
    "timm:deit_small_distilled_patch16_224.fb_in1k": {"model_type": "deit", "hidden_size": 384},
    "timm:convnext_base.fb_in22k": {"model_type": "convnext", "hidden_sizes": [128, 256], "depths": [3, 3, 27, 3]},
    "timm:convnextv2_nano.fcmae": {"model_type": "convnextv2", "hidden_sizes": [80, 160], "depths": [2, 2, 8, 2]},
    "timm:swin_tiny_patch4_window7_224.ms_in1k": {"model_type": "swin"},
    "timm:swinv2_tiny_window8_256.ms_in1k": {"model_type": "swinv2", "window_size": 8, "image_size": 256},
    "timm:resnet50.tv_in1k": {"model_type": "resnet"},
    "timm:hiera_tiny_224.mae": {"model_type": "hiera"},
}


@pytest.mark.parametrize(("name", "config"), TRANSFORMERS.items(), ids=TRANSFORMERS.keys())
def test_the_names_of_the_weights_of_a_transformers_repository_are_those_of_the_libraries(
    name: str, config: dict
) -> None:
    found = same_weights(config)
    assert name in found
    known = {f"timm:{name}" for name in timm.list_pretrained()}
    known |= {f"open_clip:{'/'.join(pair)}" for pair in open_clip.list_pretrained()}
    assert known.issuperset(found)


@pytest.mark.parametrize("family", ["clip", "convnext", "dinov3_vit", "siglip", "swin"])
@pytest.mark.parametrize("value", [None, [], [1], "a", {}, 1.5])
def test_a_strange_configuration_of_transformers_is_no_defect(family: str, value: object) -> None:
    keys = ("hidden_size", "image_size", "patch_size", "depths", "hidden_sizes", "window_size", "text_config")
    same_weights({"model_type": family, "vision_config": value, **dict.fromkeys(keys, value)})


@pytest.mark.parametrize("model_type", ["dinov3_vit", "siglip2", "bert", None, 5])
def test_a_folder_of_transformers_is_refused_with_what_to_take_instead(tmp_path: Path, model_type: object) -> None:
    config = {"model_type": model_type, "architectures": ["SomeModel"], "hidden_size": 384}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refusal(tmp_path)
    assert f"{tmp_path} is in the format of transformers (model_type {model_type})" in message
    assert ("timm:vit_small_patch16_dinov3.lvd1689m" in message) == (model_type == "dinov3_vit")
    assert ("not gated" in message) == (model_type == "dinov3_vit")
    assert "timm" in message


# What cannot be opened.


def test_random_weights_are_for_timms_names_alone(tmp_path: Path) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    for spec in (tmp_path / "a", write_clip(tmp_path / "clip"), "open_clip:ViT-B-32/openai", "hf-hub:owner/clip"):
        message = refusal(spec, pretrained=False)
        assert "pretrained = false" in message
        assert str(spec) in message


def test_a_form_that_is_unknown_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    for spec in ("resnet18", "hub:owner/clip", str(tmp_path / "nothing"), ""):
        message = refusal(spec)
        assert spec in message
    assert "timm:NAME" in refusal("resnet18")
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert "config.json" in message


@pytest.mark.parametrize("missing", [".json", ".safetensors"])
def test_half_a_pair_is_refused_with_what_is_wanted(tmp_path: Path, missing: str) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    (tmp_path / f"a{missing}").unlink()
    message = refusal(tmp_path / "a")
    assert str(tmp_path / "a") in message
    assert missing in message


def test_a_folder_without_weights_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    assert "open_clip_model.safetensors" in refusal(tmp_path / "clip")
    write_timm(tmp_path / "a.safetensors", tmp_path / "timm" / "config.json")
    assert "model.safetensors" in refusal(tmp_path / "timm")


def test_weights_of_another_architecture_are_refused_with_their_file(tmp_path: Path) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    write_timm(tmp_path / "b.safetensors", tmp_path / "a.json", "test_convnext")
    message = refusal(tmp_path / "a")
    assert str(tmp_path / "a.safetensors") in message
    assert "does not match" in message
    write_clip(tmp_path / "clip", vision_cfg={**CLIP["vision_cfg"], "width": 48})
    write_clip(tmp_path / "small")
    shutil.copy(tmp_path / "small" / "open_clip_model.safetensors", tmp_path / "clip")
    message = refusal(tmp_path / "clip")
    assert str(tmp_path / "clip") in message
    assert "does not match" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_damaged_safetensors_are_refused_with_their_path(tmp_path: Path, keep: int) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:keep])
    message = refusal(tmp_path / "a")
    assert str(tmp_path / "a.safetensors") in message
    assert "cannot be read" in message


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["code", b"", b"<html>404</html>", "cut off", "a list"])
def test_a_bin_that_holds_no_tensors_is_refused_with_its_path_and_runs_no_code(
    tmp_path: Path, content: str | bytes
) -> None:
    folder = write_clip(tmp_path / "clip", suffix=".bin")
    path = folder / "open_clip_pytorch_model.bin"
    if content == "code":
        torch.save({"visual.proj": Trap(tmp_path / "sprung")}, path)
    elif content == "cut off":
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "a list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(content)
    assert str(path if content != "a list" else folder) in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_architecture_is_refused_with_its_file(tmp_path: Path) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    description = {"architecture": "nosuchmodel", "num_classes": 5}
    (tmp_path / "a.json").write_text(json.dumps(description), encoding="utf-8")
    message = refusal(tmp_path / "a")
    assert "nosuchmodel" in message
    assert str(tmp_path / "a.safetensors") in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "architecture: test_resnet",
        "[]",
        '"test_resnet"',
        '{"num_classes": 5}',
        '{"architecture": "test_resnet", "num_classes": 5, "model_args": {"no_such_argument": 1}}',
        '{"architecture": "test_resnet", "num_classes": 5, "model_args": [1]}',
        '{"architecture": "test_resnet", "num_classes": "many"}',
    ],
)
def test_a_configuration_that_describes_no_timm_model_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    write_timm(tmp_path / "a.safetensors", tmp_path / "a.json")
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert str(tmp_path / "a.") in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_cfg": {"embed_dim": 24}}',
        '{"model_cfg": {"embed_dim": 24, "vision_cfg": {"no_such_argument": 1}}}',
    ],
)
def test_a_configuration_that_describes_no_open_clip_model_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    folder = write_clip(tmp_path / "clip")
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    assert str(folder) in refusal(folder)


def test_a_run_goes_on_learning_from_its_own_encoder(trained: Path, drawn) -> None:
    module, described = load_encoder(str(trained))
    weights = load_file(trained / "encoder.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    kept = read_manifest(trained / "manifest.json").members[0].encoder
    assert described.preprocessing == kept.preprocessing
    assert (described.file, described.packages, described.learnt_from) == ("", kept.packages, kept.learnt_from)
    with pytest.raises(InputError, match="was trained at 64"):
        load_encoder(str(trained), image_size=96)

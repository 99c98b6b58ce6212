"""Resolve `--encoder SPEC`: find the weights, build the module, and describe it as the manifest will.

The description is all that the kernel gets: from it and a safetensors file it rebuilds the same encoder offline.
"""

import difflib
import hashlib
import itertools
import json
import math
import pickle
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kernel.encoders import Preprocessing, build_module
from kernel.mounts import MANIFEST, InputError, sha256, shorten
from local.console import say

OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
LARGER = 1.25  # times the encoder's own size is what the view `larger` has at least
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_encoder(spec: str, pretrained: bool = True, image_size: int = 0) -> tuple[nn.Module, dict]:
    """An encoder in one of six forms, with its description.

    Args:
        spec: `hf-hub:OWNER/NAME`; `open_clip:ARCHITECTURE/PRETRAINED`; `timm:NAME`; the stem of a pair of
            .safetensors and .json; a folder in the hub's format, of open_clip or of timm; or a run, whose encoder goes
            on learning.
        pretrained: False leaves a `timm:NAME` with random weights.
        image_size: side of the input in pixels; 0 is the encoder's own.

    Returns:
        The module, (batch, 3, size, size) -> (batch, features), and its manifest entry without the weights file.

    Raises:
        InputError: the form is unknown, the weights are not to be had, or they do not fit the architecture.
    """
    kind, _, name = spec.partition(":")
    if kind == "timm":
        return _from_timm(name, pretrained, image_size)
    if not pretrained:
        raise InputError(f"pretrained = false with the encoder {spec}: random weights are for timm:NAME alone")
    if kind == "open_clip":
        _refuse_size(spec, image_size)
        return _from_open_clip(name)
    if kind == "hf-hub":
        return _from_folder(_download(name), image_size, name)
    path = Path(spec)
    if (path / MANIFEST).is_file():
        return _from_run(path, image_size)
    if path.is_dir():
        return _from_folder(path, image_size)
    pair = [path.with_name(path.name + suffix) for suffix in (".json", ".safetensors")]
    if all(file.is_file() for file in pair):
        return _timm_entry(_read_json(pair[0]), pair[1], image_size)
    raise InputError(
        f"no encoder {spec}: give hf-hub:OWNER/NAME, open_clip:ARCHITECTURE/PRETRAINED, timm:NAME, the stem of a "
        ".safetensors and a .json, a folder with open_clip_config.json or config.json, or a run"
    )


def weights_digest(spec: str) -> str:
    """SHA-256 of the files of an encoder that is given by its path; "" for one that is given by its name."""
    path = Path(spec)
    if (path / MANIFEST).is_file():
        try:
            manifest = _read_json(path / MANIFEST)
            entry = manifest["members"][0]["encoder"]
            said = json.dumps([entry, manifest["files"][entry["file"]]], sort_keys=True)
        except (InputError, KeyError, IndexError, TypeError):
            return ""  # it is not a run, as `load_encoder` will say
        return hashlib.sha256(said.encode()).hexdigest()
    names = ("open_clip_config.json", "config.json", *OPEN_CLIP_WEIGHTS, *TIMM_WEIGHTS)
    files = (
        [path / name for name in names] if path.is_dir() else [Path(spec + end) for end in (".json", ".safetensors")]
    )
    digests = [sha256(file) for file in files if file.is_file()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def take_larger(module: nn.Module, entry: dict) -> tuple[nn.Module, dict]:
    """The same encoder and its description, with the size of the view `larger`, found by trying.

    Convolutions take any multiple of their stride. Of timm's transformers, those do that can interpolate their position
    embeddings, which leaves the encoder's own size as it is.

    Raises:
        InputError: it takes photos of one size alone.
    """
    own = entry["preprocessing"]["size"]
    sizes = [math.ceil(LARGER * own / stride) * stride for stride in (32, 14)]
    for size, more in itertools.product(sizes, ({}, {"dynamic_img_size": True})):
        arguments = entry["arguments"] | more
        try:
            candidate = build_module(entry["library"], entry["architecture"], arguments) if more else module
            candidate.load_state_dict(module.state_dict())
            with torch.inference_mode():
                candidate.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, TypeError):
            continue
        return candidate, entry | {
            "arguments": arguments,
            "preprocessing": entry["preprocessing"] | {"larger": size},
        }
    raise InputError(f"the view larger: {entry['architecture']} takes photos of {own} pixels alone; leave the view out")


def _refuse_size(spec: str, image_size: int) -> None:
    if image_size:
        raise InputError(f"image_size = {image_size} with {spec}: an open_clip tower takes its own size; leave it at 0")


def _download(name: str) -> Path:
    """The folder in the hub's cache that holds the configuration and the weights of a model."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        for config, files in (("open_clip_config.json", OPEN_CLIP_WEIGHTS), ("config.json", TIMM_WEIGHTS)):
            try:
                folder = Path(hf_hub_download(name, config)).parent
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            for file in files:
                try:
                    hf_hub_download(name, file)
                    return folder
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError:
                    continue
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = shorten(error, 160)
        raise InputError(f"hf-hub:{name} cannot be fetched: {reason}; check the name and the network") from error
    raise InputError(f"hf-hub:{name} holds neither an open_clip nor a timm model: choose another")


def _from_folder(folder: Path, image_size: int, name: str = "") -> tuple[nn.Module, dict]:
    if (folder / "open_clip_config.json").is_file():
        _refuse_size(str(folder), image_size)
        config = _read_json(folder / "open_clip_config.json")
        try:
            model = config["model_cfg"]
            tower = {key: model[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in model}
            # The tower's own base weights would be downloaded only to be overwritten.
            tower["vision_cfg"] = {**tower["vision_cfg"], "timm_model_pretrained": False}
            module = build_module("open_clip", "", tower)
        except (KeyError, RuntimeError, TypeError) as error:
            raise InputError(f"{folder / 'open_clip_config.json'} builds no model: {error!r}; mend it") from error
        states = _read_weights(folder, OPEN_CLIP_WEIGHTS)
        visual = {key.removeprefix("visual."): value for key, value in states.items() if key.startswith("visual.")}
        _load(module, visual, folder)
        preprocessing = {"size": _image_size(module), **(config.get("preprocess_cfg") or {})}
        return module, _open_clip_entry(name or folder.name, tower, preprocessing)
    if (folder / "config.json").is_file():
        weights = next((folder / name for name in TIMM_WEIGHTS if (folder / name).is_file()), folder / TIMM_WEIGHTS[0])
        return _timm_entry(_read_json(folder / "config.json"), weights, image_size)
    raise InputError(f"{folder} holds neither open_clip_config.json nor config.json: give a folder in the hub's format")


def _from_run(folder: Path, image_size: int) -> tuple[nn.Module, dict]:
    try:
        entry = dict(_read_json(folder / MANIFEST)["members"][0]["encoder"])
        module = build_module(entry["library"], entry["architecture"], entry["arguments"])
        weights, _ = entry.pop("file"), entry.pop("precision")
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder / MANIFEST} is no run's: {error!r}; train it again") from error
    if image_size not in (0, entry["preprocessing"]["size"]):
        raise InputError(f"image_size = {image_size}: {folder} was trained at {entry['preprocessing']['size']}")
    _load(module, _read_weights(folder, (weights,)), folder)
    return module, entry | {"preprocessing": entry["preprocessing"] | {"larger": 0}}


def _from_open_clip(name: str) -> tuple[nn.Module, dict]:
    import open_clip

    architecture, _, tag = name.partition("/")
    if (architecture, tag) not in open_clip.list_pretrained():
        tags = (
            ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: open_clip.list_models() has all"
        )
        raise InputError(f"open_clip has no {architecture}/{tag}: the weights for {architecture} are {tags}")
    try:
        visual = open_clip.create_model(architecture, pretrained=tag, require_pretrained=True).visual
    except (OSError, RuntimeError) as error:
        reason = shorten(error, 160)
        raise InputError(f"open_clip:{name} cannot be loaded: {reason}; check the network") from error
    config = open_clip.get_model_config(architecture)
    # Some weights switch the activation on by their tag; the module knows what it became.
    quick = any(isinstance(layer, open_clip.transformer.QuickGELU) for layer in visual.modules())
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    tower = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": quick}
    return visual, _open_clip_entry(architecture, tower, visual.preprocess_cfg)


def _open_clip_entry(architecture: str, tower: dict, config: dict) -> dict:
    """The manifest entry of an open_clip tower; `config` has open_clip's preprocessing keys, some or all."""
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise InputError(f"{architecture} was trained with resize_mode {mode}: only shortest and squash are supported")
    size = config["size"]
    preprocessing = Preprocessing(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(config.get("mean", (0.48145466, 0.4578275, 0.40821073))),  # OpenAI's, which open_clip falls back to
        std=tuple(config.get("std", (0.26862954, 0.26130258, 0.27577711))),
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",  # also when "random"
        scale=1.0,
        fit="squash" if mode == "squash" else "crop",
    )
    return {
        "library": "open_clip",
        "architecture": architecture,
        "arguments": tower,
        "packages": {name: version(name) for name in ("open_clip_torch", "ftfy")},
        "features": tower["embed_dim"],
        "preprocessing": asdict(preprocessing),
    }


def _from_timm(name: str, pretrained: bool, image_size: int) -> tuple[nn.Module, dict]:
    if not timm.is_model(name.removeprefix("hf-hub:").partition(".")[0]):
        near = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.0))
        raise InputError(f"timm has no model {name}: the nearest are {near}")
    try:
        module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        reason = shorten(error, 160)
        raise InputError(f"timm:{name} cannot be loaded: {reason}; check the name and the network") from error
    return module, _describe_timm(module, name.partition(".")[0], {}, module.pretrained_cfg, image_size)


def _timm_entry(config: dict, weights: Path, image_size: int) -> tuple[nn.Module, dict]:
    """From timm's own configuration: architecture, num_classes, model_args, pretrained_cfg."""
    try:
        # timm records some arguments of its own twice; the head is not kept.
        arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
        architecture, classes = config["architecture"], config["num_classes"]
        module = timm.create_model(architecture, pretrained=False, num_classes=classes, **arguments)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"the configuration beside {weights} builds no timm model: {error!r}; mend it") from error
    _load(module, _read_weights(weights.parent, (weights.name,)), weights)
    module.reset_classifier(0)
    return module, _describe_timm(module, architecture, arguments, config.get("pretrained_cfg") or {}, image_size)


def _describe_timm(module: nn.Module, architecture: str, arguments: dict, config: dict, image_size: int) -> dict:
    overrides = {"input_size": (3, image_size, image_size)} if image_size else {}
    resolved = timm.data.resolve_data_config(overrides, pretrained_cfg=config, use_test_size=False)
    if resolved["crop_mode"] not in ("center", "squash"):
        raise InputError(f"{architecture} was evaluated with crop_mode {resolved['crop_mode']}: only center and squash")
    if resolved["interpolation"] not in ("bilinear", "bicubic"):
        raise InputError(
            f"{architecture} was evaluated with interpolation {resolved['interpolation']}: only bilinear and bicubic"
        )
    preprocessing = Preprocessing(
        size=resolved["input_size"][1],
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=resolved["interpolation"],
        scale=resolved["crop_pct"],
        fit="squash" if resolved.get("crop_mode") == "squash" else "crop",
    )
    size = preprocessing.size
    module.eval()
    try:
        with torch.inference_mode():
            features = module(torch.zeros(1, 3, size, size)).shape[1]
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"image_size = {size}: {architecture} takes no such photos ({error}); leave it at 0"
        ) from error
    return {
        "library": "timm",
        "architecture": architecture,
        "arguments": arguments,
        "packages": {"timm": version("timm")},
        "features": features,
        "preprocessing": asdict(preprocessing),
    }


def _image_size(module: nn.Module) -> int:
    size = module.image_size
    return size if isinstance(size, int) else size[0]


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: give the file that belongs to the weights")
    return value


def _read_weights(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} holds no weights: looked for {', '.join(names)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Some hub models come only as .bin; PyTorch's restricted reader takes tensors and runs no code.
        say(f"{path.name} is no safetensors: reading tensors alone")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        reason = shorten(error) if str(error).strip() else "it is empty"
        raise InputError(f"{path} cannot be read as weights: {reason}; download it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no named tensors: give another file")
    return state


def _load(module: nn.Module, state: dict[str, torch.Tensor], where: Path) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = shorten(error)
        raise InputError(
            f"{where} does not match its architecture: {reason}; give the file that belongs to it"
        ) from error

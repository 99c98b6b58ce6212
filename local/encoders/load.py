"""Resolve `--encoder SPEC`: find the weights, build the module, and describe it as the manifest will.

The description is all that the kernel gets: from it and a safetensors file it rebuilds the same encoder offline.
"""

import argparse
import difflib
import fnmatch
import hashlib
import itertools
import json
import math
import pickle
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kernel.encoders import build_module, is_out_of_memory
from kernel.inputs import InputError, sha256, shorten
from kernel.manifest import MANIFEST, EncoderSpec, Preprocessing, read_manifest, to_json
from local.base.console import say
from local.encoders.source import OPEN_CLIP, SUFFIXES, TIMM, WEIGHTS, find_source, refuse_size

LARGER = 1.25  # times the encoder's own size is what the view `larger` has at least


def load_encoder(spec: str, pretrained: bool = True, image_size: int = 0) -> tuple[nn.Module, EncoderSpec]:
    """An encoder in one of six forms, with its description.

    Args:
        spec: `hf-hub:OWNER/NAME`, with `@REVISION` if need be; `open_clip:ARCHITECTURE/PRETRAINED`; `timm:NAME`; the
            stem of a pair of .safetensors and .json; a folder in the hub's format, of open_clip or of timm, also as
            `local-dir:FOLDER`; or a run, whose encoder goes on learning. `timm:hf-hub:OWNER/NAME` and its like take
            the format of that library where a repository has both.
        pretrained: False leaves a `timm:NAME` with random weights.
        image_size: side of the input in pixels; 0 is the encoder's own.

    Returns:
        The module, (batch, 3, size, size) -> (batch, features), and its description, without the weights file.

    Raises:
        InputError: the form is unknown, the weights are not to be had, or they do not fit the architecture.
    """
    source = find_source(spec, pretrained, image_size)
    path = Path(source.name)
    if source.form == "timm":
        loaded = _from_timm(source.name, pretrained, image_size)
    elif source.form == "open_clip":
        loaded = _from_open_clip(source.name)
    elif source.form == "hub":
        folder = _download(spec, source.name, source.formats)
        loaded = _from_folder(folder, image_size, source.name.partition("@")[0], source.formats)
    elif source.form == "run":
        loaded = _from_run(path, image_size)
    elif source.form == "folder":
        loaded = _from_folder(path, image_size, formats=source.formats)
    else:
        pair = [path.with_name(path.name + suffix) for suffix in (".json", ".safetensors")]
        loaded = _from_timm_config(_read_json(pair[0]), pair[1], image_size)
    return _checked(spec, *loaded)


def _checked(name: str, module: nn.Module, spec: EncoderSpec) -> tuple[nn.Module, EncoderSpec]:
    """The same, with the length of an embedding; refused where a photo does not become one vector."""
    size = spec.preprocessing.size
    try:
        with torch.inference_mode():
            output = module.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{name} takes no photos of {size} pixels ({shorten(error)}): correct the input size in its configuration, "
            "or choose another encoder"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        shape = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"{name} makes {shape} of a photo, expected one vector, of shape (1, features): choose a model that pools "
            "its features"
        )
    return module, replace(spec, features=output.shape[1])


def weights_digest(spec: str) -> str:
    """SHA-256 of the files of an encoder that is given by its path; "" for one that is given by its name."""
    path = Path(spec.rpartition("local-dir:")[2])
    if (path / MANIFEST).is_file():
        try:
            manifest = read_manifest(path / MANIFEST)
        except InputError:
            return ""  # it is not a run, as `load_encoder` will say
        encoder = manifest.members[0].encoder
        said = json.dumps([to_json(encoder), manifest.files.get(encoder.file)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()
    if path.is_dir():
        files = [path / name for name in WEIGHTS] + [file for end in SUFFIXES for file in sorted(path.glob(f"*{end}"))]
    else:
        files = [path.with_name(path.name + end) for end in (".json", ".safetensors")]
    digests = [sha256(file) for file in files if file.is_file()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def take_larger(module: nn.Module, spec: EncoderSpec) -> tuple[nn.Module, EncoderSpec]:
    """The same encoder and its description, with the size of the view `larger`, found by trying.

    Convolutions take any multiple of their stride. Of timm's transformers, those do that can interpolate their position
    embeddings, which leaves the encoder's own size as it is.

    Raises:
        InputError: it takes photos of one size alone.
    """
    own = spec.preprocessing.size
    sizes = [math.ceil(LARGER * own / stride) * stride for stride in (32, 14)]
    for size, more in itertools.product(sizes, ({}, {"dynamic_img_size": True})):
        arguments = spec.arguments | more
        try:
            candidate = build_module(spec.library, spec.architecture, arguments) if more else module
            candidate.load_state_dict(module.state_dict())
            with torch.inference_mode():
                candidate.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, TypeError):
            continue
        preprocessing = replace(spec.preprocessing, larger_size=size)
        return candidate, replace(spec, arguments=arguments, preprocessing=preprocessing)
    raise InputError(f"the view larger: {spec.architecture} takes photos of {own} pixels alone; leave the view out")


def _download(spec: str, name: str, formats: tuple[str, ...]) -> Path:
    """The folder in the hub's cache that holds the configuration and the weights of a model.

    Without a network, and with HF_HUB_OFFLINE=1, it is what the cache holds.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        formats: of which libraries, the preferred one first.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, revision = name.partition("@")
    unreachable = None  # why a file that is not in the cache could not be asked for

    def fetch(file: str) -> Path | None:
        nonlocal unreachable
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except LocalEntryNotFoundError as error:  # another file may be in the cache all the same
            unreachable = error
        except EntryNotFoundError:
            pass
        return None

    try:
        for kind in formats:
            config = fetch(kind)
            if config is None:
                continue
            if kind == TIMM:
                _refuse_transformers(_read_json(config), f"{spec}")
            if any(fetch(file) for file in WEIGHTS[kind]):
                return config.parent
    except GatedRepoError as error:
        advice = "accept its terms on huggingface.co and log in with `hf auth login`"
        mirror = DINOV3 if "dinov3" in name else ""
        raise InputError(f"{spec} is gated: {advice}{mirror}") from error
    except (HfHubHTTPError, HFValidationError, RepositoryNotFoundError, OSError) as error:
        raise InputError(f"{spec} cannot be fetched: {shorten(error)}; check the name and the network") from error
    if unreachable and constants.HF_HUB_OFFLINE:
        raise InputError(f"{spec} is not in the cache: fetch it once without HF_HUB_OFFLINE=1")
    if unreachable:
        raise InputError(f"{spec} cannot be fetched: {shorten(unreachable)}; check the name and the network")
    raise InputError(f"{spec} holds no weights beside {' or '.join(formats)}: choose another")


# transformers' names of families of which timm or open_clip has the same weights, as patterns of their names.
DINOV3 = "; timm's copies of the DINOv3 weights are not gated: timm:vit_small_patch16_dinov3.lvd1689m and its like"
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1536: "giant", 4096: "7b"}
CLIPS = {(768, 32, 224): "B-32", (768, 16, 224): "B-16", (1024, 14, 224): "L-14", (1024, 14, 336): "L-14-336"}
FAMILIES = {
    "beit": "timm:beit*_{size}_patch{patch}_{image}.*",
    "convnext": "timm:convnext_{depths}.fb_*",
    "convnextv2": "timm:convnextv2_{depths}.*",
    "deit": "timm:deit_{size}_*patch{patch}_{image}.*",
    "dinov2": "timm:vit_{size}_patch{patch}_dinov2.*",
    "dinov2_with_registers": "timm:vit_{size}_patch{patch}_reg4_dinov2.*",
    "dinov3_convnext": "timm:convnext_{depths}.dinov3_*",
    "dinov3_vit": "timm:vit_{size}{plus}_patch{patch}_dinov3.{data}",
    "clip": "open_clip:ViT-{clip}/openai",
    "hiera": "timm:hiera_*_{image}.*",
    "resnet": "timm:resnet*.*",
    "siglip": "timm:vit_{size}*_patch{patch}_siglip_{image}.{webli}",
    "siglip2": "timm:naflexvit_{size}_patch{patch}_siglip.v2_webli",
    "swin": "timm:swin_*_window{window}_{image}.*",
    "swinv2": "timm:swinv2_*_window*{window}_*{image}.*",
    "vit": "timm:vit_{size}_patch{patch}_{image}.*",
    "vit_mae": "timm:vit_{size}_patch{patch}_{image}.mae",
}


def _refuse_transformers(config: dict, where: str) -> None:
    """Say which names hold the weights of a model in transformers' format.

    Raises:
        InputError: the configuration is in that format.
    """
    if "architecture" in config or not ("model_type" in config or "architectures" in config):
        return
    kind = str(config.get("model_type", "unknown"))
    names = same_weights(config, where)
    if names:
        advice = f"the same weights are among {', '.join(names[:4])}{' and others' * (len(names) > 4)}"
    elif kind in FAMILIES:
        advice = f"no name in timm {timm.__version__} or open_clip fits; a newer version may have the same weights"
    else:
        advice = "look for the same weights in timm.list_pretrained() and open_clip.list_pretrained()"
    mirror = DINOV3.partition(":")[0] if kind.startswith("dinov3") else ""
    raise InputError(f"{where} is in the format of transformers (model_type {kind}): {advice}{mirror}")


def same_weights(config: dict, where: str = "") -> list[str]:
    """Encoders by name that may hold the weights which a configuration of transformers describes.

    Args:
        where: its repository, whose name says what the configuration does not.
    """
    kind = str(config.get("model_type", "")).removesuffix("_vision_model")
    vision, text = (config.get(f"{part}_config") for part in ("vision", "text"))
    vision = vision if isinstance(vision, dict) else config

    def number(key: str, default: int, index: int = 0) -> object:
        """A value, or one of a list of values; transformers leaves out what is a family's default."""
        value = vision.get(key, default)
        value = value[index] if isinstance(value, list) and len(value) > index else value
        return value if isinstance(value, int) else default

    width, image = number("hidden_size", 768), number("image_size", 224)
    patch = number("patch_size", {"clip": 32, "dinov2": 14, "dinov2_with_registers": 14}.get(kind, 16))
    stage = (number("hidden_sizes", 96), number("depths", 9, 2))
    is_second = "siglip2" in where or (isinstance(text, dict) and text.get("vocab_size") == 256000)
    small = {(40, 6): "atto", (48, 6): "femto", (64, 6): "pico", (80, 8): "nano", (96, 9): "tiny", (96, 27): "small"}
    wide = {128: "base", 192: "large", 256: "xlarge", 352: "huge"}
    words = {
        "size": SIZES.get(width, "*") + "opt" * (kind == "siglip" and width == 1536),
        "patch": patch,
        "image": image,
        "plus": "_plus" * (width in (384, 1280) and bool(vision.get("use_gated_mlp"))),
        "data": "sat493m" if "sat493m" in where else "lvd1689m",
        "webli": "v2_webli" if is_second else "webli*",
        "window": number("window_size", 7),
        "depths": small.get(stage) or wide.get(stage[0], "*"),
        "clip": CLIPS.get((width, patch, image), "*"),
    }
    library, _, pattern = FAMILIES.get(kind, "").partition(":")
    if library == "timm":
        return [f"timm:{name}" for name in fnmatch.filter(timm.list_pretrained(), pattern.format(**words))]
    if library == "open_clip":
        import open_clip

        names = ["/".join(pair) for pair in open_clip.list_pretrained()]
        return [f"open_clip:{name}" for name in fnmatch.filter(names, pattern.format(**words)) if "quick" not in name]
    return []


def _from_folder(
    folder: Path, image_size: int, name: str = "", formats: tuple[str, ...] = tuple(WEIGHTS)
) -> tuple[nn.Module, EncoderSpec]:
    kind = next((kind for kind in formats if (folder / kind).is_file()), None)
    if kind is None:
        raise InputError(f"{folder} holds neither {' nor '.join(formats)}: give a folder in the hub's format")
    config = _read_json(folder / kind)
    if kind == TIMM:
        _refuse_transformers(config, f"hf-hub:{name}" if name else str(folder))
        return _from_timm_config(config, _find_weights(folder, kind), image_size)
    refuse_size(str(folder), image_size)
    try:
        model = config["model_cfg"]
        tower = _tower(model["embed_dim"], model["vision_cfg"], model.get("quick_gelu", False))
        module = build_module("open_clip", "", tower)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / kind} builds no model: {error!r}; correct it") from error
    state = _read_weights(_find_weights(folder, kind))
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    try:
        _load(module, visual, folder)
    except InputError:
        whole = _whole_open_clip(folder)
        if whole is None:
            raise
        _load(module, whole.visual.state_dict(), folder)
    preprocessing = (config.get("preprocess_cfg") or {}) | {"size": _image_size(module)}
    return module, _open_clip_spec(name or folder.name, tower, preprocessing)


def _tower(embed_dim: int, vision: dict, quick_gelu: bool) -> dict:
    """Arguments of an open_clip tower that gives one vector a photo, without the tokens that CoCa's text part reads.

    The tower's own base weights are left out: they would be downloaded only to be overwritten.
    """
    vision = {**vision, "timm_model_pretrained": False, "output_tokens": False}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": quick_gelu}


def _whole_open_clip(folder: Path) -> nn.Module | None:
    """The model with its text part as open_clip itself loads it, which converts some foreign weights."""
    import open_clip

    try:
        return open_clip.create_model(f"local-dir:{folder}", weights_only=True)
    except Exception:  # whatever the reason, the one that the tower alone gave is nearer
        return None


def _from_run(folder: Path, image_size: int) -> tuple[nn.Module, EncoderSpec]:
    spec = read_manifest(folder / MANIFEST).members[0].encoder
    if image_size not in (0, spec.preprocessing.size):
        own = spec.preprocessing.size
        raise InputError(f"image_size = {image_size}: {folder} was trained at {own} pixels; leave image_size at 0")
    try:
        module = build_module(spec.library, spec.architecture, spec.arguments)
    except Exception as error:  # each version of a library fails in its own way at what it does not know
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(f"{spec.architecture} of {folder} cannot be built ({reason}); train it again") from error
    _load(module, _read_weights(folder / spec.file), folder)
    return module, replace(spec, precision="half", preprocessing=replace(spec.preprocessing, larger_size=0), file="")


def _from_open_clip(name: str) -> tuple[nn.Module, EncoderSpec]:
    import open_clip

    architecture, _, tag = name.partition("/")
    if (architecture, tag) not in open_clip.list_pretrained():
        tags = (
            ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: open_clip.list_models() has all"
        )
        raise InputError(f"open_clip has no {architecture}/{tag}: the weights for {architecture} are {tags}")
    try:
        visual = open_clip.create_model(architecture, pretrained=tag, require_pretrained=True).visual
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"open_clip:{name} cannot be loaded: {shorten(error)}; check the network") from error
    config = open_clip.get_model_config(architecture)
    # Some weights switch the activation on by their tag; the module knows what it became.
    quick = any(isinstance(layer, open_clip.transformer.QuickGELU) for layer in visual.modules())
    tower = _tower(config["embed_dim"], config["vision_cfg"], quick)
    module = build_module("open_clip", "", tower)
    _load(module, visual.state_dict(), Path(name))
    return module, _open_clip_spec(architecture, tower, visual.preprocess_cfg)


def _open_clip_spec(architecture: str, tower: dict, config: dict) -> EncoderSpec:
    """The description of an open_clip tower; `config` has open_clip's preprocessing keys, some or all."""
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise InputError(f"{architecture} was trained with resize_mode {mode}: only shortest and squash are supported")
    size = config["size"]
    preprocessing = Preprocessing(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(config.get("mean", (0.48145466, 0.4578275, 0.40821073))),  # OpenAI's, which open_clip falls back to
        std=tuple(config.get("std", (0.26862954, 0.26130258, 0.27577711))),
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",  # also when "random"
        crop_pct=1.0,
        resize_mode="squash" if mode == "squash" else "crop",
    )
    packages = {name: version(name) for name in ("open_clip_torch", "ftfy")}
    return _spec("open_clip", architecture, tower, packages, preprocessing)


def _from_timm(name: str, pretrained: bool, image_size: int) -> tuple[nn.Module, EncoderSpec]:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.0))
        raise InputError(f"timm has no model {name}: the nearest are {near}")
    try:
        module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise InputError(f"timm:{name} cannot be loaded: {shorten(error)}; check the name and the network") from error
    arguments = _fixed_size(architecture, {}, module.pretrained_cfg)
    return module, _describe_timm(module, architecture, arguments, module.pretrained_cfg, image_size)


def _from_timm_config(config: dict, weights: Path, image_size: int) -> tuple[nn.Module, EncoderSpec]:
    """From timm's own configuration: architecture, num_classes, model_args, pretrained_cfg.

    The weights go through timm's own loader, which fits them to the architecture as it would those of its hub.
    """
    unusable = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
    state = _read_weights(weights)
    try:
        # timm records some arguments of its own twice; the head is not kept.
        arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
        architecture = config["architecture"]
        if not timm.is_model(architecture):
            raise KeyError(architecture)
        # Older files have all in one table.
        known = {field.name for field in fields(timm.models.PretrainedCfg)} - {"num_classes", "label_offset", "source"}
        source = {key: value for key, value in (config.get("pretrained_cfg") or config).items() if key in known}
        default = asdict(timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg())
        source = {key: default[key] for key in ("classifier", "fixed_input_size", "input_size")} | source
        if source["fixed_input_size"] and "img_size" in arguments:
            size = arguments["img_size"]
            source["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size)
        arguments |= _fixed_size(architecture, arguments, source)
        classes = _count_classes(state, source["classifier"], int(config.get("num_classes") or 0))
    except unusable as error:
        raise InputError(f"the configuration beside {weights} builds no timm model: {error!r}; correct it") from error
    model = {"model_name": architecture, "num_classes": classes, **arguments}
    try:
        cfg = source | {"state_dict": state, "num_classes": classes, "custom_load": False}
        module = timm.create_model(pretrained=True, pretrained_cfg=cfg, **model)
    except unusable as error:
        if is_out_of_memory(error):
            raise
        try:
            timm.create_model(pretrained=False, **model)
        except unusable as cause:
            raise InputError(
                f"the configuration beside {weights} builds no timm model: {cause!r}; correct it"
            ) from cause
        raise InputError(
            f"{weights} does not match its architecture: {shorten(error)}; give the file that belongs to it"
        ) from error
    del module.pretrained_cfg["state_dict"]  # as large as the model
    if classes:  # reset_classifier(0) would be nearer, but in some versions it sets another pooling
        state, module = module.state_dict(), build_module("timm", architecture, arguments)
        _load(module, {name: state[name] for name in module.state_dict() if name in state}, weights)
    return module, _describe_timm(module, architecture, arguments, source, image_size)


def _fixed_size(architecture: str, arguments: dict, source: dict) -> dict:
    """The argument by which the kernel, which has no pretrained_cfg, builds a model of fixed size as timm does."""
    is_free = arguments.get("dynamic_img_size") or not arguments.get("strict_img_size", True)
    size, default = list(source["input_size"])[-2:], timm.get_pretrained_cfg(architecture)
    if is_free or not source.get("fixed_input_size") or (default and size == list(default.input_size)[-2:]):
        return {}
    return {"img_size": size[0] if size[0] == size[1] else size} | arguments


def _count_classes(state: dict[str, torch.Tensor], classifier: str | tuple | None, otherwise: int) -> int:
    """Classes of the head that lies among the weights, whatever the configuration says; 0 where it was removed."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    heads = [len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state]
    return heads[0] if heads else 0 if names else otherwise


def _describe_timm(module: nn.Module, architecture: str, arguments: dict, config: dict, image_size: int) -> EncoderSpec:
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
        crop_pct=resolved["crop_pct"],
        resize_mode="squash" if resolved.get("crop_mode") == "squash" else "crop",
    )
    size = preprocessing.size
    if image_size:
        try:
            with torch.inference_mode():
                module.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError) as error:
            raise InputError(
                f"image_size = {size}: {architecture} takes no such photos ({shorten(error)}); leave it at 0"
            ) from error
    return _spec("timm", architecture, arguments, {"timm": version("timm")}, preprocessing)


def _spec(
    library: str, architecture: str, arguments: dict, packages: dict[str, str], preprocessing: Preprocessing
) -> EncoderSpec:
    """The description of an encoder whose embeddings are not measured yet and whose weights are not saved."""
    return EncoderSpec(
        library=library,
        architecture=architecture,
        arguments=arguments,
        packages=packages,
        preprocessing=preprocessing,
        features=0,
        precision="half",
        file="",
    )


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


def _find_weights(folder: Path, kind: str) -> Path:
    """The file of weights beside a configuration: by the hub's names, else the first of any name."""
    named = [folder / name for library in (kind, OPEN_CLIP, TIMM) for name in WEIGHTS[library]]
    others = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    path = next((path for path in (*named, *others) if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{folder} holds no weights: looked for {', '.join(WEIGHTS[kind])} and *{', *'.join(SUFFIXES)}"
        )
    return path


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors; of a checkpoint of a training those of the model, its moving average where it has one."""
    if not path.is_file():
        raise InputError(f"{path} is missing: give a folder that holds the weights")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # Some hub models come only as .bin; PyTorch's restricted reader takes tensors and runs no code.
            say(f"{path.name} is no safetensors: reading tensors alone")
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their options
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        reason = shorten(error) if str(error).strip() else "it is empty"
        raise InputError(f"{path} cannot be read as weights: {reason}; download it again") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds no named tensors: give another file")
    return timm.models.clean_state_dict(state)


def _load(module: nn.Module, state: dict[str, torch.Tensor], where: Path) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(
            f"{where} does not match its architecture: {shorten(error)}; give the file that belongs to it"
        ) from error

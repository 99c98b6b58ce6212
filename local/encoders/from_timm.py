"""Load an encoder with timm: by its name, or from a configuration and weights in timm's format."""

import difflib
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from torch import nn

from kernel.encoders import build_module
from kernel.forward import is_out_of_memory
from kernel.inputs import InputError, shorten
from kernel.manifest import EncoderSpec, Preprocessing
from local.base.files import read_json
from local.encoders.hub import read_weights_file
from local.encoders.source import refuse_unsupported
from local.encoders.variants import Variant, apply_variant, vary


def load_timm_name(name: str, pretrained: bool, variant: Variant) -> tuple[nn.Module, EncoderSpec]:
    """Load a model by timm's name, ARCHITECTURE or ARCHITECTURE.TAG, downloading the weights if necessary.

    Raises:
        InputError: timm has no such model, it has no such variant, or the weights cannot be downloaded.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.0))
        raise InputError(f"timm has no model {name}: the nearest are {near}")
    try:
        pretrained_cfg = asdict(timm.get_pretrained_cfg(name))
        described = _describe(architecture, _fixed_size(architecture, {}, pretrained_cfg), pretrained_cfg)
        varied = vary(described, variant)
        module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise InputError(f"timm:{name} cannot be loaded: {shorten(error)}; check the name and the network") from error
    return apply_variant(module, described, varied), varied


def load_timm_files(config_file: Path, weights: Path, variant: Variant) -> tuple[nn.Module, EncoderSpec]:
    """Load a model from timm's configuration (architecture, num_classes, model_args, pretrained_cfg) and weights.

    timm's own loader converts the weights as it does for its models on the hub. It is strict only if the number of
    classes is right, so the head is loaded too and then removed.

    Raises:
        InputError: timm does not have the architecture or the variant, or the weights are damaged or do not match it.
    """
    config, architecture = _read_timm_config(config_file)
    state = read_weights_file(weights)
    try:
        arguments, pretrained_cfg = _parse_timm_config(architecture, config)
        classes = _count_classes(state, pretrained_cfg["classifier"], int(config.get("num_classes") or 0))
        given = pretrained_cfg | {"state_dict": state, "num_classes": classes, "custom_load": False}
        module = timm.create_model(
            architecture, pretrained=True, pretrained_cfg=given, num_classes=classes, **arguments
        )
        module.pretrained_cfg.pop("state_dict", None)  # as large as the model
        if classes:  # reset_classifier(0) changes the pooling in some versions of timm
            trained, module = module.state_dict(), build_module("timm", architecture, arguments)
            module.load_state_dict({name: trained[name] for name in module.state_dict()})
    except Exception as error:  # the type depends on the version of timm and on what does not fit
        if is_out_of_memory(error):
            raise
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{weights} does not match {config_file}: {reason}; correct the configuration, or give the weights that "
            "belong to it"
        ) from error
    described = _describe(architecture, arguments, pretrained_cfg)
    varied = vary(described, variant)
    return apply_variant(module, described, varied), varied


def describe_timm_file(config_file: Path) -> EncoderSpec:
    """The description of the model of a timm configuration, without its weights.

    Raises:
        Exception: the configuration is wrong.
    """
    config, architecture = _read_timm_config(config_file)
    return _describe(architecture, *_parse_timm_config(architecture, config))


def _read_timm_config(path: Path) -> tuple[dict, str]:
    """A timm configuration and its architecture."""
    config = read_json(path)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise InputError(
            f"timm {timm.__version__} has no architecture {architecture!r} (in {path}): correct it, or install "
            "another version of timm"
        )
    return config, architecture


def _parse_timm_config(architecture: str, config: dict) -> tuple[dict, dict]:
    """The arguments and the `pretrained_cfg` of a timm configuration, completed for all supported versions of timm."""
    arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    known = {field.name for field in fields(timm.models.PretrainedCfg)} - {"num_classes", "label_offset", "source"}
    given = config.get("pretrained_cfg") or config  # older files have only one table
    default = asdict(timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg())
    pretrained_cfg = {key: default[key] for key in ("classifier", "fixed_input_size", "input_size")}
    pretrained_cfg |= {key: value for key, value in given.items() if key in known}
    if pretrained_cfg["fixed_input_size"] and "img_size" in arguments:
        size = arguments["img_size"]
        pretrained_cfg["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size)
    return arguments | _fixed_size(architecture, arguments, pretrained_cfg), pretrained_cfg


def _fixed_size(architecture: str, arguments: dict, pretrained_cfg: dict) -> dict:
    """`img_size`, if the kernel needs it: it builds a model of fixed size without the pretrained_cfg."""
    is_free = arguments.get("dynamic_img_size") or not arguments.get("strict_img_size", True)
    size, default = list(pretrained_cfg["input_size"])[-2:], timm.get_pretrained_cfg(architecture)
    if is_free or not pretrained_cfg.get("fixed_input_size") or (default and size == list(default.input_size)[-2:]):
        return {}
    return {"img_size": size[0] if size[0] == size[1] else size} | arguments


def _count_classes(state: dict[str, torch.Tensor], classifier: str | tuple | None, default: int) -> int:
    """The number of classes of the head in the weights, which may differ from the configuration's; 0 without a head."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    heads = [len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state]
    return heads[0] if heads else 0 if names else default


def _describe(architecture: str, arguments: dict, pretrained_cfg: dict) -> EncoderSpec:
    config = timm.data.resolve_data_config({}, pretrained_cfg=pretrained_cfg, use_test_size=False)
    refuse_unsupported(architecture, "crop_mode", config["crop_mode"], ("center", "squash"))
    refuse_unsupported(architecture, "interpolation", config["interpolation"], ("bilinear", "bicubic"))
    return EncoderSpec(
        library="timm",
        architecture=architecture,
        arguments=arguments,
        packages={"timm": version("timm")},
        preprocessing=Preprocessing(
            size=config["input_size"][1],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            resize_mode="squash" if config["crop_mode"] == "squash" else "crop",
        ),
        features=0,  # counted by `load_encoder`
        precision="half",
        file="",
    )

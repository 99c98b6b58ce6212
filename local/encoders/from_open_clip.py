"""Load the vision tower of an open_clip model: by its name, or from a configuration and weights in its format."""

import logging
from importlib.metadata import version
from pathlib import Path

import open_clip
from open_clip import transform
from torch import nn

from kernel.encoders import build_module
from kernel.forward import is_out_of_memory
from kernel.inputs import InputError, shorten
from kernel.manifest import EncoderSpec, Preprocessing
from local.base.files import read_json
from local.encoders.hub import read_weights_file
from local.encoders.source import refuse_unsupported
from local.encoders.variants import Variant, apply_variant, check_variant, vary


def load_open_clip_name(name: str, variant: Variant) -> tuple[nn.Module, EncoderSpec]:
    """Load the vision tower of ARCHITECTURE/PRETRAINED, downloading the weights if necessary.

    Raises:
        InputError: open_clip has no such weights or no such variant, or they cannot be downloaded.
    """
    architecture, _, tag = name.partition("/")
    if (architecture, tag) not in open_clip.list_pretrained():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        known = f"the weights for {architecture} are {tags}" if tags else "see open_clip.list_models()"
        raise InputError(f"open_clip has no {name}: {known}")
    config = open_clip.get_model_config(architecture)
    arguments = _tower_arguments(config, False)
    check_variant(lambda: _describe(architecture, arguments, _preprocess_cfg(config, {})), variant)
    try:
        visual = open_clip.create_model(architecture, pretrained=tag, require_pretrained=True).visual
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"open_clip:{name} cannot be loaded: {shorten(error)}; check the network") from error
    # Some weights change the activation; only the module shows which it is.
    quick_gelu = any(isinstance(layer, open_clip.transformer.QuickGELU) for layer in visual.modules())
    arguments = _tower_arguments(config, quick_gelu)
    module = build_module("open_clip", "", arguments)
    module.load_state_dict(visual.state_dict())
    described = _describe(architecture, arguments, visual.preprocess_cfg)
    varied = vary(described, variant)
    return apply_variant(module, described, varied), varied


def load_open_clip_files(
    config_file: Path, weights: Path, name: str, variant: Variant
) -> tuple[nn.Module, EncoderSpec]:
    """Load the vision tower from a configuration (model_cfg, preprocess_cfg) and weights.

    The text tower is not built, because some text towers would be downloaded.

    Raises:
        InputError: the configuration builds no model or no such variant, or the weights are damaged or do not match it.
    """
    config = read_json(config_file)
    try:
        model_cfg = config["model_cfg"]
        arguments = _tower_arguments(model_cfg, model_cfg.get("quick_gelu", False))
        module = build_module("open_clip", "", arguments)
        preprocess_cfg = _preprocess_cfg(model_cfg, config.get("preprocess_cfg") or {})
    except Exception as error:  # the type depends on what is wrong
        raise InputError(f"{config_file} builds no open_clip model: {_reason(error)}; correct it") from error
    state = read_weights_file(weights)
    try:
        tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        try:
            module.load_state_dict(tower)
        except RuntimeError:
            module.load_state_dict(load_both_towers(config_file.parent, weights).visual.state_dict())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{weights} does not match {config_file}: {_reason(error)}; give the weights that belong to it"
        ) from error
    described = _describe(name, arguments, preprocess_cfg)
    varied = vary(described, variant)
    return apply_variant(module, described, varied), varied


def describe_open_clip_file(config_file: Path, name: str) -> EncoderSpec:
    """The description of the vision tower of an open_clip configuration, without its weights.

    Raises:
        Exception: the configuration is wrong.
    """
    config = read_json(config_file)
    model_cfg = config["model_cfg"]
    arguments = _tower_arguments(model_cfg, model_cfg.get("quick_gelu", False))
    return _describe(name, arguments, _preprocess_cfg(model_cfg, config.get("preprocess_cfg") or {}))


def _preprocess_cfg(model_cfg: dict, given: dict) -> dict:
    """open_clip's preprocessing, which has the size of the model."""
    preprocess_cfg = transform.merge_preprocess_dict(transform.PreprocessCfg(), given)
    return preprocess_cfg | {"size": model_cfg["vision_cfg"].get("image_size", 224)}


def load_both_towers(folder: Path, weights: Path) -> nn.Module:
    """A whole model, whose weights open_clip converts if they have another format or input size.

    Args:
        folder: with the configuration.

    Raises:
        Exception: the configuration or the weights are wrong, or a text tower needs a library that is not installed.
    """
    logging.disable(logging.WARNING)  # open_clip warns of random weights, before they are loaded
    try:
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    finally:
        logging.disable(logging.NOTSET)
    open_clip.load_checkpoint(model, str(weights), weights_only=True)
    return model


def _tower_arguments(model_cfg: dict, quick_gelu: bool) -> dict:
    """Arguments with which the kernel builds the vision tower.

    They exclude base weights, which would be downloaded only to be overwritten, and the tokens that CoCa's tower
    returns for its text decoder.
    """
    vision = {**model_cfg["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    return {"embed_dim": model_cfg["embed_dim"], "vision_cfg": vision, "quick_gelu": quick_gelu}


def _describe(architecture: str, arguments: dict, preprocess_cfg: dict) -> EncoderSpec:
    size, resize_mode = preprocess_cfg["size"], preprocess_cfg["resize_mode"]
    refuse_unsupported(architecture, "resize_mode", resize_mode, ("shortest", "squash"))
    return EncoderSpec(
        library="open_clip",
        architecture=architecture,
        arguments=arguments,
        packages={name: version(name) for name in ("open_clip_torch", "ftfy")},
        preprocessing=Preprocessing(
            size=size if isinstance(size, int) else size[0],
            mean=tuple(preprocess_cfg["mean"]),
            std=tuple(preprocess_cfg["std"]),
            # "random" is for training; open_clip then evaluates with bicubic.
            interpolation="bilinear" if preprocess_cfg["interpolation"] == "bilinear" else "bicubic",
            crop_pct=1.0,
            resize_mode="squash" if resize_mode == "squash" else "crop",
        ),
        features=0,  # counted by `load_encoder`
        precision="half",
        file="",
    )


def _reason(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}")

"""Load the encoder of `--encoder SPEC` and describe it as the manifest will.

From that description and the weights, the kernel rebuilds the same encoder offline.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernel.encoders import build_module, read_module
from kernel.forward import is_out_of_memory
from kernel.inputs import InputError, sha256, shorten
from kernel.manifest import MANIFEST, EncoderSpec, read_manifest, to_json
from kernel.views import CROP, CROPS, VIEWS
from local.encoders.from_timm import describe_timm_file, load_timm_files, load_timm_name
from local.encoders.hub import download, find_readable_format, find_weights_file
from local.encoders.source import SUFFIXES, TIMM, WEIGHTS, find_source
from local.encoders.variants import Variant, apply_variant, check_variant, vary
from local.recipes.settings import EncoderSettings

LARGER = 1.25  # the view `larger` has at least this factor of the encoder's own size


def load_encoder(
    spec: str, pretrained: bool = True, image_size: int = 0, pool: str = "auto"
) -> tuple[nn.Module, EncoderSpec]:
    """Load an encoder with its description.

    Args:
        spec: one of six forms. `hf-hub:OWNER/NAME`, optionally with `@REVISION`; `open_clip:ARCHITECTURE/PRETRAINED`;
            `timm:NAME`; the stem of a .safetensors and a .json; a folder in the hub's format (of open_clip or timm),
            also as `local-dir:FOLDER`; or a run, to continue with its encoder. If a repository or folder has both
            formats, `timm:hf-hub:OWNER/NAME` and the like choose one.
        pretrained: False gives `timm:NAME` random weights.
        image_size: side of the input in pixels; 0 is the encoder's own.
        pool: "token", "avg" or "token+avg" of an encoder that has a class token and patches; see `Variant` for "auto"
            and "stages".

    Returns:
        The module, which maps (batch, 3, size, size) to (batch, features), and its description, in which `file` is
        empty.

    Raises:
        InputError: the form is unknown, the weights cannot be found or do not fit the architecture, or the encoder does
            not accept the size or the pooling.
    """
    source, variant = find_source(spec, pretrained), Variant(spec, image_size, pool)
    path = Path(source.name)
    if source.form == "timm":
        module, described = load_timm_name(source.name, pretrained, variant)
    elif source.form == "open_clip":
        from local.encoders.from_open_clip import load_open_clip_name

        module, described = load_open_clip_name(source.name, variant)
    elif source.form == "hub":
        folder = download(spec, source.name, source.formats, partial(_check_config, variant=variant))
        module, described = _load_folder(folder, source.formats, variant, source.name.partition("@")[0])
    elif source.form == "run":
        module, described = _load_run(path, variant)
    elif source.form == "folder":
        module, described = _load_folder(path, source.formats, variant)
    else:
        pair = [path.with_name(path.name + suffix) for suffix in (".json", ".safetensors")]
        module, described = load_timm_files(*pair, variant)
    return module, replace(described, features=_count_features(spec, module, described.preprocessing.size, image_size))


def _count_features(name: str, module: nn.Module, size: int, image_size: int) -> int:
    """The length of the module's embedding of a photo; an InputError if it does not return one vector per photo."""
    try:
        with torch.inference_mode():
            output = module.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{name} does not accept photos of {size} pixels ({shorten(error)})"
        if image_size:
            raise InputError(f"image_size = {image_size}: {reason}; leave it at 0") from error
        raise InputError(f"{reason}: correct the input size in its configuration, or choose another encoder") from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"{name} returns {found} for a photo, expected one vector, of shape (1, features): choose a model that "
            "pools its features"
        )
    return output.shape[1]


def weights_digest(settings: EncoderSettings) -> str:
    """SHA-256 over the files of a recipe's encoders that are given by a path; "" if one is given by a name."""
    digests = [_files_digest(one.name) for one in settings.each]
    if len(digests) == 1 or not all(digests):
        return digests[0] if len(digests) == 1 else ""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _files_digest(spec: str) -> str:
    path = Path(spec.rpartition("local-dir:")[2])
    if (path / MANIFEST).is_file():
        try:
            manifest = read_manifest(path / MANIFEST)
        except InputError:
            return ""  # `load_encoder` reports it
        encoders = manifest.members[0].encoders
        text = json.dumps([[to_json(one), manifest.files.get(one.file)] for one in encoders], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
    if path.is_dir():
        files = [path / name for name in WEIGHTS] + [file for end in SUFFIXES for file in sorted(path.glob(f"*{end}"))]
    else:
        files = [path.with_name(path.name + end) for end in (".json", ".safetensors")]
    digests = [sha256(file) for file in files if file.is_file()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def size_for_views(module: nn.Module, spec: EncoderSpec, views: Sequence[str]) -> tuple[nn.Module, EncoderSpec]:
    """The same encoder with photos decoded as large as some views, keys of `kernel.views.VIEWS`, need them.

    Raises:
        InputError: see `enable_larger_view`.
    """
    if "larger" in views:
        module, spec = enable_larger_view(module, spec)
    if any(VIEWS[view] in CROPS for view in views):
        preprocessing = replace(spec.preprocessing, cropped_size=round(spec.preprocessing.size / CROP))
        spec = replace(spec, preprocessing=preprocessing)
    return module, spec


def enable_larger_view(module: nn.Module, spec: EncoderSpec) -> tuple[nn.Module, EncoderSpec]:
    """The same encoder with an input size for the view `larger`, the first that it accepts.

    Convolutional networks accept multiples of their stride. Those of timm's transformers that can interpolate their
    position embeddings accept multiples of their patch size; at their own size they give the same embeddings.

    Raises:
        InputError: the encoder only accepts its own size.
    """
    size = spec.preprocessing.size
    sizes = [math.ceil(LARGER * size / stride) * stride for stride in (32, 14)]
    for larger, changes in itertools.product(sizes, ({}, {"dynamic_img_size": True})):
        arguments = spec.arguments | changes
        try:
            candidate = build_module(spec.library, spec.architecture, arguments, spec.pool) if changes else module
            candidate.load_state_dict(module.state_dict())
            with torch.inference_mode():
                candidate.eval()(torch.zeros(1, 3, larger, larger))
        except (AssertionError, RuntimeError, TypeError):
            continue
        preprocessing = replace(spec.preprocessing, larger_size=larger)
        return candidate, replace(spec, arguments=arguments, preprocessing=preprocessing)
    raise InputError(f"the view larger: {spec.architecture} only accepts photos of {size} pixels; remove the view")


def _load_folder(
    folder: Path, formats: tuple[str, ...], variant: Variant, name: str = ""
) -> tuple[nn.Module, EncoderSpec]:
    kind = find_readable_format(folder, formats)
    weights = find_weights_file(folder, kind)
    _check_config(folder / kind, variant)
    if kind == TIMM:
        return load_timm_files(folder / kind, weights, variant)
    from local.encoders.from_open_clip import load_open_clip_files

    return load_open_clip_files(folder / kind, weights, name or folder.name, variant)


def _check_config(config_file: Path, variant: Variant) -> None:
    """`check_variant` by a configuration file alone."""

    def describe() -> EncoderSpec:
        if config_file.name == TIMM:
            return describe_timm_file(config_file)
        from local.encoders.from_open_clip import describe_open_clip_file

        return describe_open_clip_file(config_file, "")

    check_variant(describe, variant)


def _load_run(folder: Path, variant: Variant) -> tuple[nn.Module, EncoderSpec]:
    encoders = read_manifest(folder / MANIFEST).members[0].encoders
    if len(encoders) > 1:
        raise InputError(f"{folder} has {len(encoders)} encoders: give those of its recipe, each by its own name")
    [spec] = encoders
    if not (folder / spec.file).is_file():
        raise InputError(f"{folder / spec.file} is missing: train again")
    varied = vary(spec, variant)
    module = apply_variant(read_module(folder / spec.file, spec), spec, varied).requires_grad_(True)
    preprocessing = replace(varied.preprocessing, larger_size=0, cropped_size=0)
    return module, replace(varied, precision="half", preprocessing=preprocessing, file="")

"""Give an encoder another input size or another pooling than the library gives it.

Whether an encoder accepts them is tried without its weights, on the meta device, which computes shapes alone: in a
moment for an encoder of any size, and before anything is downloaded.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import timm
import torch
from torch import nn

from kernel.encoders import build_module
from kernel.inputs import InputError
from kernel.manifest import EncoderSpec
from kernel.pooling import set_pooling


@dataclass(frozen=True)
class Variant:
    """What is changed of an encoder.

    Attributes:
        name: of the encoder, for messages.
        image_size: side of the input in pixels; 0 is the encoder's own.
        pool: see EncoderSpec. "auto" keeps the encoder's own, but takes the class token of a DINOv3, which timm leaves
            out (https://github.com/huggingface/pytorch-image-models/issues/2681). So does "stages" for an encoder
            without such stages.
    """

    name: str
    image_size: int = 0
    pool: str = "auto"


def vary(spec: EncoderSpec, variant: Variant) -> EncoderSpec:
    """The description of a variant of an encoder.

    Raises:
        InputError: the encoder does not accept the size, or does not have both a class token and patches.
    """
    size, pool = variant.image_size, variant.pool
    if size not in (0, spec.preprocessing.size):
        arguments = find_arguments(spec, variant.name, size)
        spec = replace(spec, arguments=arguments, preprocessing=replace(spec.preprocessing, size=size))
    if pool == "stages" and has_stages(spec):
        return replace(spec, pool=pool)
    if pool in ("auto", "stages"):
        is_dinov3 = spec.library == "timm" and "dinov3" in spec.architecture and "global_pool" not in spec.arguments
        return replace(spec, pool="token") if is_dinov3 and spec.pool == "auto" else spec
    try:
        count_features(replace(spec, pool=pool), spec.preprocessing.size)
    except Exception as error:  # its type depends on the architecture
        raise InputError(
            f"pool = {pool}: {variant.name} does not have both a class token and patches; leave it at auto"
        ) from error
    return replace(spec, pool=pool)


def has_stages(spec: EncoderSpec) -> bool:
    """Whether an encoder of timm has stages of feature maps that become smaller, as convolutional networks have."""
    try:
        return spec.library == "timm" and count_features(replace(spec, pool="stages"), spec.preprocessing.size) > 0
    except Exception:  # its type depends on the architecture
        return False


def pooled_parts(spec: EncoderSpec) -> dict[str, int]:
    """The features of each of an encoder's poolings, by their name in `pool_part`; of a single one without a name."""
    if spec.pool == "token+avg":
        return {"token": spec.features // 2, "avg": spec.features // 2}
    if spec.pool == "stages":
        final = count_features(replace(spec, pool="auto"), spec.preprocessing.size)
        return {"final": final, "stages": spec.features - final}
    return {"": spec.features}


def check_variant(describe: Callable[[], EncoderSpec], variant: Variant) -> None:
    """Refuse before the weights are loaded what `vary` would refuse after that.

    Args:
        describe: describes the encoder without its weights. What is wrong with that is ignored, since loading reports
            it.
    """
    if not variant.image_size and variant.pool == "auto":
        return
    try:
        described = describe()
        build_blank(described)
    except Exception:
        return
    vary(described, variant)


def apply_variant(module: nn.Module, before: EncoderSpec, after: EncoderSpec) -> nn.Module:
    """The encoder that `after` describes, made of the one that `before` describes. It may be the same object."""
    sized = resample(module, before, after)
    return sized if sized is module and after.pool == before.pool else set_pooling(sized, after.pool)


def find_arguments(spec: EncoderSpec, name: str, size: int) -> dict:
    """The arguments with which the library builds an encoder that accepts photos of another size.

    Raises:
        InputError: it accepts none of that size, or timm cannot resample its position embeddings.
    """
    own = build_blank(spec)
    patch, start = patch_size(own), f"image_size = {size}: {name} does not accept photos of {size} pixels"
    if size % patch:
        near = " or ".join(str(near) for near in (size // patch * patch, -(-size // patch) * patch) if near > 0)
        raise InputError(f"{start}: expected a multiple of its patch size, {patch}, such as {near}")
    for arguments in candidate_arguments(spec, own, size):
        try:
            with meta_device():
                embed_blank(resample(own, spec, replace(spec, arguments=arguments)).eval(), size)
        except Exception:  # its type depends on the architecture
            own = build_blank(spec)  # it may be half resampled
            continue
        return arguments
    raise InputError(f"{start}: only its own size, {spec.preprocessing.size}; leave it at 0")


def candidate_arguments(spec: EncoderSpec, own: nn.Module, size: int) -> list[dict]:
    """Arguments that may suit another size, the best first.

    Args:
        own: the encoder at its own size, without its weights.
    """
    if spec.library == "open_clip":
        sized = spec.arguments | {"vision_cfg": {**spec.arguments["vision_cfg"], "image_size": size}}
        has_trunk_size = hasattr(getattr(own, "trunk", None), "set_input_size")
        return [*[sized | {"trunk_size": size}] * has_trunk_size, sized]
    sized = spec.arguments | {"img_size": size}
    if not own.pretrained_cfg.get("fixed_input_size"):
        return [spec.arguments, sized]
    # CrossViT accepts photos of any size, but shrinks them to the size that it was built for.
    return [sized] if hasattr(own, "img_size_scaled") else [sized, spec.arguments]


def resample(module: nn.Module, before: EncoderSpec, after: EncoderSpec) -> nn.Module:
    """Build the encoder that `after` describes, with the weights of the one that `before` describes.

    Position embeddings are resampled by the functions of the libraries. The module may be changed too.

    Raises:
        Exception: the library cannot resample them.
    """
    if after.arguments == before.arguments:
        return module
    if after.library == "timm":
        # timm converts the weights as it does when it loads them for an `img_size`. It is strict if the number of
        # classes is right.
        given = {"state_dict": module.state_dict(), "num_classes": 0, "label_offset": 0, "custom_load": False}
        sized = timm.create_model(
            after.architecture,
            pretrained=True,
            pretrained_cfg={**module.pretrained_cfg, **given},
            num_classes=0,
            **after.arguments,
        )
        sized.pretrained_cfg.pop("state_dict", None)  # as large as the model
        return sized
    sized = build_module(after.library, after.architecture, after.arguments)
    if "trunk_size" in after.arguments:
        module.trunk.set_input_size(after.arguments["trunk_size"])
    state = {f"visual.{name}": value for name, value in module.state_dict().items()}
    resize_positions(state, sized)
    sized.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    return sized


def resize_positions(state: dict[str, torch.Tensor], tower: nn.Module) -> None:
    """Resample open_clip's position embeddings in place, for the grid of another vision tower."""
    from open_clip.model import resize_pos_embed

    resize_pos_embed(state, SimpleNamespace(visual=tower))


def count_features(spec: EncoderSpec, size: int) -> int:
    """The length of the embedding of a photo of some size, found without weights.

    Raises:
        ValueError: the encoder does not return one vector per photo.
        Exception: it does not accept the size, or cannot be built.
    """
    return embed_blank(build_blank(spec), size).shape[1]


def embed_blank(module: nn.Module, size: int) -> torch.Tensor:
    """The embedding of one photo by an encoder without weights, (1, features); raises what `count_features` does."""
    with meta_device(), torch.inference_mode():
        output = module(torch.zeros(1, 3, size, size))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise ValueError("it does not return one vector per photo")
    return output


def build_blank(spec: EncoderSpec) -> nn.Module:
    """An encoder without weights, in evaluation mode."""
    with meta_device():
        return build_module(spec.library, spec.architecture, spec.arguments, spec.pool).eval()


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Within it, tensors have shapes but no values, and no random number is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def patch_size(module: nn.Module) -> int:
    """The side of a patch in pixels; 1 for an encoder that does not cut a photo into patches."""
    module = getattr(module, "trunk", module)
    embed = getattr(module, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):
        return embed.feat_ratio()
    stem = getattr(embed or getattr(module, "embeds", None), "proj", getattr(module, "conv1", None))
    if isinstance(stem, nn.Conv2d) and stem.kernel_size == stem.stride:
        return max(stem.stride)
    return 1

"""Pool the features of an encoder: the class token, the mean of the patches, or the means of several stages."""

from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn

STAGES = 2  # of an encoder whose feature maps become smaller, that are pooled beside its final features


class TokenPool(nn.Module):
    """Pools the tokens of a vision transformer: its class token, the mean of its patches, or both.

    Args:
        pool: "token", "avg" or "token+avg".
        prefix: number of tokens before the patches; the class token is the first.
    """

    def __init__(self, pool: str, prefix: int):
        super().__init__()
        self.pool, self.prefix = pool, prefix

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool (batch, tokens, width) to (batch, 1 or 2, width)."""
        if tokens.ndim != 3 or tokens.shape[1] <= self.prefix:
            raise ValueError(f"expected a class token and patches, got {tuple(tokens.shape)}")
        pooled = {"token": tokens[:, 0], "avg": tokens[:, self.prefix :].mean(dim=1)}
        return torch.stack([pooled[name] for name in self.pool.split("+")], dim=1)

    def extra_repr(self) -> str:
        # Embeddings are cached by what str(module) says, so that it names the length of the parts.
        return f"{self.pool}, prefix={self.prefix}{', unit length' if '+' in self.pool else ''}"


class StagePool(nn.Module):
    """Concatenates the features of an encoder with the means of the feature maps of its last STAGES stages.

    The last layers know the classes of their training, those before them know shapes and textures, of which another
    domain has others.
    """

    def forward(self, features: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(batch, features) and feature maps (batch, channels, height, width) to (batch, all features)."""
        return concatenate_parts([features, *(each.mean(dim=(2, 3)) for each in maps)])


def concatenate_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(batch, features) of each part to (batch, all features).

    Each part has length 1, because otherwise the longest alone would count.
    """
    return torch.cat([nn.functional.normalize(part.float(), dim=1) for part in parts], dim=1)


def set_pooling(module: nn.Module, pool: str) -> nn.Module:
    """Replace the pooling of an encoder. What comes after it, a norm or a projection, stays the library's.

    The module keeps the names of its weights, because only its methods are replaced.

    Args:
        pool: as in EncoderSpec; "auto" changes nothing.

    Raises:
        ValueError: it does not have stages, or not both a class token and patches.
    """
    if pool == "auto":
        return module
    if pool == "stages":
        sizes = [stage["reduction"] for stage in getattr(module, "feature_info", ())[-STAGES:]]
        if len(set(sizes)) < STAGES or not hasattr(module, "forward_intermediates"):
            raise ValueError("it does not have stages of feature maps that become smaller")
        module.stage_pool = StagePool()
        module.forward = MethodType(_pool_stages, module)
        return module
    transformer = getattr(module, "trunk", module)  # of timm, inside an open_clip tower
    is_timm = hasattr(transformer, "forward_head")
    token = getattr(transformer, "cls_token" if is_timm else "class_embedding", None)
    prefix = getattr(transformer, "num_prefix_tokens", 0) if is_timm else 1
    if token is None or not prefix or (not is_timm and transformer.attn_pool is not None):
        raise ValueError("it does not have a class token and patches")
    transformer.token_pool = TokenPool(pool, prefix)
    # Bound methods, so that a copy of the module gets its own.
    if is_timm:
        transformer.forward_head = MethodType(_pool_in_timm, transformer)
    else:
        transformer._global_pool = MethodType(_pool_in_open_clip, transformer)
    module.register_forward_hook(_concatenate)
    return module


def _pool_stages(encoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    final, maps = encoder.forward_intermediates(pixels, indices=STAGES)
    return encoder.stage_pool(encoder.forward_head(final), maps)


def _pool_in_timm(transformer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    pooled = transformer.token_pool(tokens)
    return transformer.head(transformer.fc_norm(pooled) if hasattr(transformer, "fc_norm") else pooled)


def _pool_in_open_clip(transformer: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return transformer.token_pool(tokens), tokens[:, 1:]


def _concatenate(module: nn.Module, inputs: tuple, pooled: torch.Tensor) -> torch.Tensor:
    parts = pooled.unbind(dim=1)
    return parts[0] if len(parts) == 1 else concatenate_parts(parts)

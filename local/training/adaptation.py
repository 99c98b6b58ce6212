"""Which parameters of an encoder are trained, at which learning rates, and its weights before and after."""

import math

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.utils import parametrize

from local.recipes.settings import OptimSettings


def unfreeze(module: nn.Module, groups: int) -> list[nn.Parameter]:
    """Train the last groups of layers, or all for -1, and freeze the rest.

    Returns:
        The trainable parameters.
    """
    if groups < 0:
        module.requires_grad_(True)
    elif hasattr(module, "lock"):  # open_clip's towers
        module.requires_grad_(True)
        module.lock(unlocked_groups=groups, freeze_bn_stats=False)
    else:
        layers = group_parameters(module, module.group_matcher(coarse=False))
        trainable = {name for layer in sorted(layers)[-groups:] for name in layers[layer]} if groups else set()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trainable)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class LowRankUpdate(nn.Module):
    """W -> W + up @ down, where only up and down are trained (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Args:
        weight: (features out, ...); the dimensions after the first are flattened into one.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel(), device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # so that training starts at W
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank_updates(module: nn.Module, rank: int) -> None:
    """Train a low-rank update of every trainable matrix in its place, and freeze all else.

    Matrices are the weights of linear layers, attention, and convolutions without groups, if larger than the rank.
    """
    trainable = [
        (layer, name)
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and getattr(layer, "groups", 1) == 1
        for name, weight in layer.named_parameters(recurse=False)
        if weight.requires_grad and weight.ndim > 1 and min(len(weight), weight[0].numel()) > rank
    ]
    module.requires_grad_(False)
    for layer, name in trainable:
        parametrize.register_parametrization(layer, name, LowRankUpdate(getattr(layer, name), rank))


def group_by_layer(module: nn.Module, optim: OptimSettings) -> list[dict]:
    """The trainable parameters of an encoder as groups; each layer down, the learning rate is times `layer_decay`."""
    if hasattr(getattr(module, "transformer", None), "resblocks"):  # open_clip's towers, described as timm's are
        blocks = [(r"^transformer\.resblocks\.(\d+)", None), (r"^(?:ln_post|proj)", (99999,))]
        module.group_matcher = lambda coarse: {
            "stem": r"^(?:conv1|class_embedding|positional|ln_pre)",
            "blocks": blocks,
        }
    groups = param_groups_layer_decay(module, optim.weight_decay, layer_decay=optim.layer_decay)
    return [{**group, "lr": optim.learning_rate * group.pop("lr_scale")} for group in groups if group["params"]]


def set_training_mode(module: nn.Module, pretrained: bool) -> None:
    """Training mode, in which a pretrained encoder keeps its batch statistics: a few shots would make them worse."""
    module.train()
    if pretrained:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights under their names before training; low-rank updates are added to their weights."""
    own = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for path, layer in module.named_modules(remove_duplicate=False):  # a layer may have two names
        if parametrize.is_parametrized(layer):
            own |= {f"{path}.{name}": getattr(layer, name) for name in layer.parametrizations}
    return {name: value.detach().clone() for name, value in own.items()}


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """All that training may change: the trainable parameters and the buffers."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}

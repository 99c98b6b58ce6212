"""What of an encoder learns, how fast, and how what it learnt is mixed with what it was."""

import math

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.utils import parametrize

from local.recipes.settings import OptimSettings


def unfreeze(module: nn.Module, groups: int) -> list[nn.Parameter]:
    """Let the last groups of layers learn, all for -1, and freeze the rest.

    Returns:
        The parameters that learn.
    """
    if groups < 0:
        module.requires_grad_(True)
    elif hasattr(module, "lock"):  # open_clip's towers
        module.requires_grad_(True)
        module.lock(unlocked_groups=groups, freeze_bn_stats=False)
    else:
        layers = group_parameters(module, module.group_matcher(coarse=False))
        learning = {name for layer in sorted(layers)[-groups:] for name in layers[layer]} if groups else set()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in learning)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class LowRank(nn.Module):
    """W -> W + up @ down, of which up and down alone learn (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Args:
        weight: (features out, ...), a matrix once all but the first dimension are one.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel(), device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # so that training starts at W
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(module: nn.Module, rank: int) -> None:
    """Let every matrix that learns do so by a low-rank addition, and freeze all else.

    Matrices are those of linear layers, of attention, and of convolutions over all channels, when larger than the rank.
    """
    learning = [
        (layer, name)
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and getattr(layer, "groups", 1) == 1
        for name, weight in layer.named_parameters(recurse=False)
        if weight.requires_grad and weight.ndim > 1 and min(len(weight), weight[0].numel()) > rank
    ]
    module.requires_grad_(False)
    for layer, name in learning:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), rank))


def group_by_layer(module: nn.Module, optim: OptimSettings) -> list[dict]:
    """What learns of an encoder as parameter groups, the learning rate smaller by `layer_decay` from layer to layer."""
    if hasattr(getattr(module, "transformer", None), "resblocks"):  # open_clip's transformers, in timm's terms
        blocks = [(r"^transformer\.resblocks\.(\d+)", None), (r"^(?:ln_post|proj)", (99999,))]
        module.group_matcher = lambda coarse: {
            "stem": r"^(?:conv1|class_embedding|positional|ln_pre)",
            "blocks": blocks,
        }
    groups = param_groups_layer_decay(module, optim.weight_decay, layer_decay=optim.layer_decay)
    return [{**group, "lr": optim.learning_rate * group.pop("lr_scale")} for group in groups if group["params"]]


def set_training(module: nn.Module, pretrained: bool) -> None:
    """Training mode; a pretrained encoder's batch statistics stay, since a few shots would only blur them."""
    module.train()
    if pretrained:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


def interpolate(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], share: float) -> dict:
    """Weights on the line between two encoders, which are often better than either and forget less.

    WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
    """
    return {
        name: value.lerp(after[name], share) if value.is_floating_point() else after[name] if share else value
        for name, value in before.items()
    }


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights in memory, under their own names; low-rank additions are added to theirs."""
    own = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for path, layer in module.named_modules(remove_duplicate=False):  # a layer may have two names
        if parametrize.is_parametrized(layer):
            own |= {f"{path}.{name}": getattr(layer, name) for name in layer.parametrizations}
    return {name: value.detach().clone() for name, value in own.items()}


def learning_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What training may change: the parameters that learn, and the buffers; not what is frozen and known already."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}

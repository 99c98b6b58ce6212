"""An optimizer with its learning-rate schedule, loss scaling and gradient clipping, by timm and torch."""

from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kernel.encoders import pick_dtype
from local.recipes.settings import OptimSettings

MOMENTUM = 0.9  # of SGD


class Optimization:
    """How the parameters of one phase of a training are updated.

    Args:
        groups: parameter groups, each with its `lr` and `weight_decay`.
        steps: optimizer steps of the phase, which the schedule covers.
        larger_is_better: whether a larger monitored score is better; decides when there is a plateau.
        scores: of the epochs of this phase that are trained already, for a plateau.
    """

    def __init__(
        self,
        groups: list[dict],
        settings: OptimSettings,
        steps: int,
        device: torch.device,
        larger_is_better: bool = True,
        scores: Sequence[float] = (),
    ):
        self.grad_clip_norm = settings.grad_clip_norm
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        momentum = {"momentum": MOMENTUM} if settings.optimizer == "sgd" else {}
        self.optimizer = create_optimizer_v2(
            groups, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay, **momentum
        )
        self.schedule: Scheduler | ReduceLROnPlateau
        if settings.schedule == "plateau":
            mode = "max" if larger_is_better else "min"
            self.schedule = ReduceLROnPlateau(self.optimizer, mode, settings.plateau_factor, settings.plateau_patience)
        else:
            self.schedule = make_step_schedule(self.optimizer, settings, steps)
        for score in scores:
            self.end_epoch(score)
        uses_fp16 = device.type == "cuda" and pick_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16)

    @property
    def learning_rate(self) -> float:
        """The largest present learning rate of the parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss."""
        self.scaler.scale(loss).backward()

    def step(self, number: int) -> None:
        """Update the parameters by the gradient, as the `number`-th step of the phase, counted from 1."""
        if isinstance(self.schedule, Scheduler):
            self.schedule.step_update(number)
        self.scaler.unscale_(self.optimizer)
        if self.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.grad_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def end_epoch(self, score: float) -> None:
        """Reduce the learning rate where the score has reached a plateau if that is the recipe's schedule."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(score)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, such as its moments, as named tensors; the learning rates are the schedule's."""
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if value is not None
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up the state that `tensors` gave."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def make_step_schedule(optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int) -> Scheduler:
    """A warmup, then a constant learning rate or a cosine down to 0, over so many optimizer steps."""
    warmup = round(steps * settings.warmup)
    common = {"warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
    if settings.schedule == "constant":
        return StepLRScheduler(optimizer, steps, decay_rate=1.0, **common)
    return CosineLRScheduler(optimizer, max(1, steps - warmup), **common)

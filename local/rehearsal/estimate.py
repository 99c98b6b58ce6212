"""How long the bundle would take on Kaggle's two T4: an estimate from the number of operations of its encoders."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernel.budget import MARGIN
from kernel.encoders import build_module
from kernel.manifest import Manifest, Member
from kernel.progress import clock_time
from local.base.console import counted

CARDS = 2
# Operations per second of one T4 in a vision transformer: an assumption, about a quarter of its peak of 65e12 in half
# precision, and half of that of 8e12 in full precision.
SPEED = {"half": 15e12, "full": 4e12}
DECODED = 800.0  # photos per second that its four CPUs decode; two cores here decoded 844 of 500 pixels


def estimate_on_t4(manifest: Manifest, photos: int, limit: float) -> str:
    """One line: how long the photos take in all views, or how many of the views there would be time for.

    Args:
        limit: of the kernel, seconds.
    """
    costs = [(seconds_per_view(member), len(member.views)) for member in manifest.members]
    seconds = sum(photos * max(1 / DECODED, each * views) for each, views in costs)
    views = " + ".join(str(views) for _, views in costs)
    said = f"{counted(photos, 'photo')} in {views} views would take about {clock_time(seconds)}"
    budget = limit * (1 - MARGIN)
    if seconds > budget:
        said += f", of which there is time for {budget / seconds:.0%}"
    return f"on Kaggle's two T4 (estimated): {said}; the limit is {clock_time(limit)}"


def seconds_per_view(member: Member) -> float:
    """Estimated seconds for one view of one photo on both cards."""
    seconds = 0.0
    for spec in member.encoders:
        module = build_module(spec.library, spec.architecture, spec.arguments, spec.pool)
        seconds += count_operations(module, spec.preprocessing.size) / (CARDS * SPEED[spec.precision])
    return seconds


def count_operations(module: nn.Module, size: int) -> int:
    """Multiplications and additions of a forward pass of one photo, those of convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()

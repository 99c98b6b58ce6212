"""How much of a training is kept: the weights before and after it, interpolated as validation finds best (WiSE-FT)."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from local.base.console import counted
from local.base.metrics import paired_gain
from local.training.evaluation import MONITOR_NAMES, Evaluation

MIX_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the trained weights; 0 keeps the encoder as it was


def interpolate_weights(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], mix_ratio: float
) -> dict[str, torch.Tensor]:
    """(1 - mix_ratio) * before + mix_ratio * after, for every weight.

    Such an encoder is often better than either, and forgets less than the trained one: WiSE-FT (Wortsman et al. 2022,
    https://arxiv.org/abs/2109.01903).
    """
    return {
        name: value.lerp(after[name], mix_ratio) if value.is_floating_point() else after[name] if mix_ratio else value
        for name, value in before.items()
    }


def choose_mix_ratio(evaluations: Sequence[Evaluation]) -> float:
    """The best of MIX_RATIOS if its gain over the encoder before training exceeds its paired standard error, else 0.

    So chance on a small validation set does not pass for learning: the one-standard-error rule of Breiman et al. 1984.

    Args:
        evaluations: one for each of MIX_RATIOS.
    """
    best, gain, error = best_mixture(evaluations)
    return MIX_RATIOS[best] if gain > error else 0.0


def best_mixture(evaluations: Sequence[Evaluation]) -> tuple[int, float, float]:
    """Of the mix ratios above 0: the index of the best, its mean gain over the encoder before training, and the error.

    The gain is that of the mean recall. Its standard error is infinite for a single observation.
    """
    recalls = [evaluation.mean_recall for evaluation in evaluations]
    best = 1 + int(np.argmax([recall.mean() for recall in recalls[1:]]))
    return best, *paired_gain(recalls[best], recalls[0])


def describe_choice(evaluations: Sequence[Evaluation], mix_ratio: float, epoch: int) -> str:
    """Why an epoch's weights are kept in this ratio, or the encoder stays as it was."""
    best, gain, error = best_mixture(evaluations)
    measure = f"{MONITOR_NAMES['recalls']} over {counted(len(evaluations[0].hits), 'validation observation')}"
    mixture = f"{MIX_RATIOS[best]:.0%} of the weights of epoch {epoch}"
    if mix_ratio:
        return f"kept: {mixture}, which gains {gain:+.3f} ± {error:.3f} over the encoder before training in {measure}"
    if gain <= 0:
        gain = round(gain, 3) + 0.0  # not -0.000
        why = f"no mixture with epoch {epoch} is better; the best, {MIX_RATIOS[best]:.0%}, gains {gain:+.3f}"
    elif math.isinf(error):
        why = f"{mixture} gain {gain:+.3f}, without a standard error to compare it with,"
    else:
        why = f"{mixture} gain {gain:+.3f} ± {error:.3f}, no more than the standard error,"
    return f"kept: the encoder before training, unchanged: {why} in {measure}"

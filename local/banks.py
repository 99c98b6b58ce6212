"""Fit banks: from the embeddings of a reference to what the kernel matches against. In float64, on the CPU."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kernel.bank import Bank


def fit_centroids(embeddings: torch.Tensor, class_ids: np.ndarray, classes: Sequence[str], centre: bool) -> Bank:
    """A prototype per class: the mean of its observations' embeddings, each an observation one voice.

    Prototypical networks' class means (Snell et al. 2017, https://arxiv.org/abs/1703.05175), compared by cosine.

    Args:
        embeddings: (observations, features), rows of length 1, or zero for an observation without a readable photo.
        class_ids: (observations,) of the reference.
        classes: all class ids, in the order of the bank.
        centre: whether to subtract the mean embedding first.
    """
    values = embeddings.double()
    seen = values.norm(dim=1) > 0
    mean = values[seen].mean(dim=0) if centre else torch.zeros(values.shape[1], dtype=torch.float64)
    moved = nn.functional.normalize(values - mean, dim=1) * seen[:, None]
    prototypes = nn.functional.normalize(class_means(moved, class_ids, classes), dim=1)
    # A class none of whose photos could be read scores below every other.
    empty = prototypes.norm(dim=1) == 0
    return Bank(mean.float(), prototypes.float(), torch.where(empty, -2.0, 0.0))


def class_means(values: torch.Tensor, class_ids: np.ndarray, classes: Sequence[str]) -> torch.Tensor:
    """The sum over each class divided by its count: (observations, features) -> (classes, features)."""
    place = {class_id: index for index, class_id in enumerate(classes)}
    index = torch.tensor([place[class_id] for class_id in class_ids])
    counts = torch.bincount(index, minlength=len(classes)).clamp(min=1)
    return torch.zeros(len(classes), values.shape[1], dtype=values.dtype).index_add_(0, index, values) / counts[:, None]


def commonest_classes(class_ids: np.ndarray, classes: Sequence[str], count: int = 10) -> list[str]:
    """The classes with the most observations, in order; what to answer when no photo speaks."""
    counts = Counter(class_ids)
    return sorted(classes, key=lambda class_id: -counts[class_id])[:count]

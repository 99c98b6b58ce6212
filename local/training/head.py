"""The head that an encoder is trained with: a bank whose prototypes and layers may learn, and its loss.

Logits are the bank's own formula, so that what is trained is what is matched.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from kernel.bank import Bank, Layer
from local.banks.estimators import NEVER
from local.recipes.settings import TrainSettings


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a single row, the rest of an epoch, by the statistics that it has."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            return super().forward(rows)
        return nn.functional.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Head(nn.Module):
    """Photo embeddings -> log-probabilities of observations, and the loss of them.

    With fixed prototypes this is the prototypical network (Snell et al. 2017, https://arxiv.org/abs/1703.05175) with
    the class means of the whole reference; the squared distance d of unit vectors is 2 - 2 cos, so that
    -d / temperature and cos * 2 / temperature have the same softmax.

    Args:
        centre: (features,) subtracted from observation embeddings.
        prototypes: (classes, features), fixed where they are, or where learning starts; a hidden layer has its own.
        sizes: (classes,) observations of each class.
        ranks: per coarser rank (classes,) int, the group of each class; None where the competition names none.
        pooling: over an observation's photos, "mean" or "max".
    """

    def __init__(
        self,
        centre: torch.Tensor,
        prototypes: torch.Tensor,
        sizes: np.ndarray,
        train: TrainSettings,
        ranks: Sequence[np.ndarray | None] = (),
        pooling: str = "mean",
    ):
        super().__init__()
        self.settings, self.scale, self.pooling = train, 2 / train.temperature, pooling
        self.register_buffer("centre", centre.float())
        classes, features = prototypes.shape
        layers = [nn.Dropout(train.dropout)]
        if train.hidden_features:
            layers += [nn.Linear(features, train.hidden_features), nn.ReLU(), RowNorm(train.hidden_features)]
            layers += [nn.Dropout(train.hidden_dropout)]
            prototypes = torch.randn(classes, train.hidden_features)
        self.layers = nn.Sequential(*layers)
        is_learned = train.prototypes == "learned"
        self.prototypes = nn.Parameter(normalize(prototypes.float(), dim=1), requires_grad=is_learned)
        self.layers.requires_grad_(is_learned)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float32))
        weights = self.sizes.clamp(min=1) ** -train.class_weight_exponent
        self.register_buffer("weights", weights / weights.mean())
        self.ranks = []
        for place, (weight, groups) in enumerate(zip(train.rank_weights, ranks, strict=bool(train.rank_weights))):
            if weight and groups is not None:
                members = nn.functional.one_hot(torch.tensor(np.unique(groups, return_inverse=True)[1]))
                self.register_buffer(f"members{place}", members.float())
                self.ranks.append((weight, f"members{place}"))

    def forward(
        self, embeddings: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss.

        Args:
            embeddings: (photos, features) of length 1.
            owners: (photos,) 0 to observations - 1.
            targets: (observations, classes), rows that sum to 1; more than one entry where photos were mixed.
            asked: (observations,) bool; in an episode the others make the prototypes.
        """
        pooled = self.space(self.pool(embeddings, owners, len(targets)))
        if self.settings.prototypes == "episodic":
            return self.episode(pooled, targets, asked)
        weights = targets @ self.weights
        smoothed = targets.lerp(torch.full_like(targets, 1 / targets.shape[1]), self.settings.label_smoothing)
        losses, total = self.losses(self.logits(pooled, targets).log_softmax(dim=1), smoothed)
        return (losses * weights).sum() / (weights.sum() * total)

    def losses(self, log_probabilities: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(observations,) cross-entropies summed over the ranks by weight, and the sum of the weights.

        The probability of a group is the sum over its classes: ranks cannot contradict each other.
        """
        losses, total = -(targets * log_probabilities).sum(dim=1), 1.0
        for weight, name in self.ranks:
            groups = getattr(self, name)
            of_groups = (log_probabilities.exp() @ groups).clamp(min=1e-12).log()
            losses, total = losses - weight * ((targets @ groups) * of_groups).sum(dim=1), total + weight
        return losses, total

    def pool(self, embeddings: torch.Tensor, owners: torch.Tensor, observations: int) -> torch.Tensor:
        """(photos, features) -> (observations, features), as `kernel.embeddings.Pool`, but for gradients."""
        if self.pooling == "mean":
            return embeddings.new_zeros(observations, embeddings.shape[1]).index_add(0, owners, embeddings)
        lowest = embeddings.new_full((observations, embeddings.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, owners[:, None].expand_as(embeddings), embeddings, "amax")

    def space(self, pooled: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> the prototypes' space, of length 1."""
        return normalize(self.layers(normalize(pooled, dim=1) - self.centre), dim=1)

    def logits(self, spaced: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(observations, classes), the true class's reduced by the margin of ArcFace (Deng et al. 2019, https://arxiv.org/abs/1801.07698)."""
        cosines = spaced @ normalize(self.prototypes, dim=1).T
        if self.settings.arcface_margin:
            angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
            cosines = (angles + self.settings.arcface_margin * targets).clamp(max=torch.pi).cos()
        return self.scale * cosines

    def episode(self, spaced: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """The loss of an episode: those asked against the means of the others, class by class."""
        present = (targets[~asked].sum(dim=0) > 0).nonzero()[:, 0]
        prototypes = normalize(targets[~asked][:, present].T @ spaced[~asked], dim=1)
        logits = self.scale * spaced[asked] @ prototypes.T
        smoothing = self.settings.label_smoothing
        return nn.functional.cross_entropy(logits, targets[asked][:, present], label_smoothing=smoothing)

    @torch.no_grad()
    def bank(self) -> Bank:
        """The head as the kernel applies it."""
        head = copy.deepcopy(self).cpu().requires_grad_(False)
        layers = [Layer(torch.eye(len(head.centre)), -head.centre, torch.tensor(0.0))]
        if self.settings.hidden_features:
            _, linear, _, norm, _ = head.layers
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            layers.append(Layer(linear.weight.T, linear.bias, torch.tensor(1.0)))
            layers.append(Layer(factor.diag(), norm.bias - norm.running_mean * factor, torch.tensor(0.0)))
        return Bank(
            layers=tuple(layers),
            prototypes=normalize(head.prototypes, dim=1),
            prototype_labels=torch.arange(len(head.sizes)),
            counts=head.sizes,
            bias=torch.where(head.sizes > 0, 0.0, NEVER),
            logit_scale=torch.tensor(float(self.scale)),
            mixture_weight=torch.tensor(1.0),
            transduction=torch.tensor(0.0),
        )

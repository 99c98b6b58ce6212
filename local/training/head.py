"""The head that an encoder is trained with, and its losses.

A head is a bank whose prototypes and layers may be trained: its logits are the formula of `kernel.bank`, so that
training optimizes what the kernel computes.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from kernel.bank import Bank, Layer
from kernel.encoders import pick_dtype
from kernel.forward import Encoder
from local.banks.estimators import ABSENT
from local.recipes.settings import TrainSettings


class TrainingTask(nn.Module):
    """Photos -> loss: encoder and head as one module, for DistributedDataParallel."""

    def __init__(self, encoder: Encoder, head: "Head"):
        super().__init__()
        self.module, self.head, self.embed = encoder.module, head, encoder.forward

    def forward(
        self,
        pixels: torch.Tensor,
        observation_index: torch.Tensor,
        targets: torch.Tensor,
        query_mask: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss of normalised photos, (photos, 3, size, size); for the other arguments see `Head.forward`."""
        device = pixels.device
        with torch.autocast(device.type, pick_dtype(device), enabled=device.type == "cuda"):
            embeddings = self.embed(pixels, self.module)
        return self.head(embeddings, observation_index, targets, query_mask)


class Head(nn.Module):
    """Photo embeddings -> the loss of observations.

    With fixed prototypes it is a prototypical network (Snell et al. 2017, https://arxiv.org/abs/1703.05175) whose
    prototypes are the class means of all training observations. The squared distance d of unit vectors is 2 - 2 cos,
    so -d / temperature and cos * 2 / temperature have the same softmax.

    Args:
        centre: (features,) subtracted from observation embeddings.
        prototypes: (classes, features). Where they are learned, the start; with a hidden layer the start is random.
        class_counts: (classes,) training observations of each class.
        rank_groups: for each coarser taxonomic rank (classes,) int, the group of each class; None where the competition
            does not name the rank.
        pooling: of an observation's photos, "mean" or "max".
    """

    def __init__(
        self,
        centre: torch.Tensor,
        prototypes: torch.Tensor,
        class_counts: np.ndarray,
        settings: TrainSettings,
        rank_groups: Sequence[np.ndarray | None] = (),
        pooling: str = "mean",
    ):
        super().__init__()
        self.settings, self.logit_scale, self.pooling = settings, 2 / settings.temperature, pooling
        self.register_buffer("centre", centre.float())
        classes, features = prototypes.shape
        layers = [nn.Dropout(settings.dropout)]
        if settings.hidden_features:
            layers += [nn.Linear(features, settings.hidden_features), nn.ReLU()]
            layers += [SingleRowBatchNorm1d(settings.hidden_features), nn.Dropout(settings.hidden_dropout)]
            prototypes = torch.randn(classes, settings.hidden_features)
        self.layers = nn.Sequential(*layers)
        is_learned = settings.prototypes == "learned"
        self.prototypes = nn.Parameter(normalize(prototypes.float(), dim=1), requires_grad=is_learned)
        self.layers.requires_grad_(is_learned)
        self.register_buffer("class_counts", torch.tensor(class_counts, dtype=torch.float32))
        weights = self.class_counts.clamp(min=1) ** -settings.class_weight_exponent
        self.register_buffer("class_weights", weights / weights.mean())
        self.rank_losses: list[tuple[float, str]] = []  # (weight, name of the buffer with the rank's groups)
        ranks = zip(settings.rank_weights, rank_groups, strict=bool(settings.rank_weights))
        for index, (weight, groups) in enumerate(ranks):
            if weight and groups is not None:
                self.register_buffer(
                    f"groups{index}", one_hot(torch.tensor(np.unique(groups, return_inverse=True)[1])).float()
                )
                self.rank_losses.append((weight, f"groups{index}"))

    def forward(
        self,
        embeddings: torch.Tensor,
        observation_index: torch.Tensor,
        targets: torch.Tensor,
        query_mask: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss, a scalar.

        Args:
            embeddings: (photos, features), rows of length 1.
            observation_index: (photos,) 0 to observations - 1.
            targets: (observations, classes), rows that sum to 1; with several entries where photos were mixed.
            query_mask: (observations,) bool; false for the support set of an episode.
        """
        projected = self.project(self.pool(embeddings, observation_index, len(targets)))
        if self.settings.prototypes == "episodic":
            return self.episode_loss(projected, targets, query_mask)
        weights = targets @ self.class_weights
        smoothed = targets.lerp(torch.full_like(targets, 1 / targets.shape[1]), self.settings.label_smoothing)
        losses = self.rank_cross_entropy(self.logits(projected, targets).log_softmax(dim=1), smoothed)
        total_rank_weight = 1 + sum(weight for weight, _ in self.rank_losses)
        return (losses * weights).sum() / (weights.sum() * total_rank_weight)

    def pool(self, embeddings: torch.Tensor, observation_index: torch.Tensor, observations: int) -> torch.Tensor:
        """(photos, features) -> (observations, features): `kernel.embeddings.Pool`, with gradients."""
        if self.pooling == "mean":
            return embeddings.new_zeros(observations, embeddings.shape[1]).index_add(0, observation_index, embeddings)
        lowest = embeddings.new_full((observations, embeddings.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, observation_index[:, None].expand_as(embeddings), embeddings, "amax")

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> (observations, features of the prototypes), rows of length 1."""
        return normalize(self.layers(normalize(pooled, dim=1) - self.centre), dim=1)

    def logits(self, projected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(observations, classes).

        The angle to the true class is widened by the margin of ArcFace (Deng et al. 2019,
        https://arxiv.org/abs/1801.07698).
        """
        cosines = projected @ normalize(self.prototypes, dim=1).T
        if self.settings.arcface_margin:
            angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
            cosines = (angles + self.settings.arcface_margin * targets).clamp(max=torch.pi).cos()
        return self.logit_scale * cosines

    def rank_cross_entropy(self, log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(observations,) the cross-entropy of the class, plus those of coarser ranks times their weights.

        The probability of a group is the sum over its classes, so ranks cannot contradict each other.
        """
        losses = -(targets * log_probabilities).sum(dim=1)
        for weight, name in self.rank_losses:
            groups = getattr(self, name)
            of_groups = (log_probabilities.exp() @ groups).clamp(min=1e-12).log()
            losses = losses - weight * ((targets @ groups) * of_groups).sum(dim=1)
        return losses

    def episode_loss(self, projected: torch.Tensor, targets: torch.Tensor, query_mask: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of an episode's queries, with the class means of its support set as prototypes."""
        support = targets[~query_mask]
        present = (support.sum(dim=0) > 0).nonzero()[:, 0]
        prototypes = normalize(support[:, present].T @ projected[~query_mask], dim=1)
        logits = self.logit_scale * projected[query_mask] @ prototypes.T
        smoothing = self.settings.label_smoothing
        return cross_entropy(logits, targets[query_mask][:, present], label_smoothing=smoothing)

    @torch.no_grad()
    def bank(self) -> Bank:
        """The head as a bank of the kernel, on the CPU."""
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
            prototype_labels=torch.arange(len(head.class_counts)),
            counts=head.class_counts,
            bias=torch.where(head.class_counts > 0, 0.0, ABSENT),
            logit_scale=torch.tensor(float(self.logit_scale)),
            mixture_weight=torch.tensor(1.0),
            transduction=torch.tensor(0.0),
        )


class SingleRowBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation that normalises a batch of one row, the rest of an epoch, by the running statistics."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            return super().forward(rows)
        return nn.functional.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

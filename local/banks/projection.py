"""An ensemble of small networks on frozen embeddings, like the one that won FungiCLEF 2025: minutes on a CPU.

`ProjectionEnsemble` is used like the estimators of `local.banks.estimators`; its members are banks of the kernel.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from kernel.bank import Bank, Layer, apply_layers
from local.banks.estimators import ABSENT, ClassMeans, Whitening, centre, make_bank, pool
from local.banks.folds import make_folds
from local.base.metrics import hits_of, mean_recall, paired_gain
from local.data.observations import Taxonomy

EVALUATIONS = 6  # of the members on their held-out observations, during training
SEED_STRIDE = 1000  # so that the members of two ensembles have different seeds


class ProjectionEnsemble:
    """Networks that pull the photos of a class together and push classes apart, starting from a linear transform.

    Every member holds out other observations, one in five and never the only one of a class, and starts from a
    transform fitted without them. It is trained with two losses at one temperature: cross-entropy of the cosines to a
    learned vector per class, initialised with the class mean, and the supervised contrastive loss within the batch.
    Their weights are learned too (Kendall et al. 2018, https://arxiv.org/abs/1705.07115).
    Each observation of a batch is sampled twice: a random mean of its photos and views, plus the difference between a
    photo of another class and the mean of that class. So classes of one photo get the variation of classes with many,
    and the network cannot memorise the few.

    With a few observations per class a linear whitening is hard to beat. All members are therefore stopped at the same
    step, the best one on their held-out observations. If training does not gain more than one standard error there, or
    nothing can be held out, they stay as they started.

    Args:
        whitening: exponent of the transform in whose space training begins; 0 only centres.
        members: networks, whose probabilities are averaged.
        hidden: units of a network's one hidden layer.
        width: output features, at most those of the embeddings.
        epochs, steps: training takes this many epochs, but at least so many batches.
        batch_size: observations in a batch.
        draws: photos in random views whose mean is a sample; many make it similar to the mean of all, which the kernel
            uses.
        variation: factor of the difference that is added to a sample.
        temperature: of both losses.
        dropout: of hidden units.
        learning_rate, weight_decay: of AdamW; the rate rises over a tenth of the steps and falls as a cosine.
        genus, family: of `ClassMeans`, for the prototypes.

    Attributes:
        banks_: one per member, each with a prototype per class made of all observations by the trained network.
        steps_: the step at which the members were stopped.
        mean_recalls_: by step, the mean of Recall@1, 5 and 10 on the held-out observations.
    """

    def __init__(
        self,
        whitening: float = 0.75,
        members: int = 5,
        hidden: int = 2048,
        width: int = 768,
        epochs: int = 8,
        steps: int = 60,
        batch_size: int = 256,
        draws: int = 16,
        variation: float = 1.0,
        temperature: float = 0.1,
        dropout: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        genus: float = 0.0,
        family: float = 0.0,
        seed: int = 0,
    ):
        self.whitening, self.members, self.hidden, self.width, self.seed = whitening, members, hidden, width, seed
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.draws, self.variation = draws, variation
        self.temperature, self.dropout = temperature, dropout
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.genus, self.family = genus, family

    def fit(
        self,
        embeddings: np.ndarray,
        observations: np.ndarray,
        labels: np.ndarray,
        taxonomy: Taxonomy,
        pooled: np.ndarray | None = None,
    ):
        """Fit on a reference set.

        Args:
            embeddings, observations, labels, taxonomy: see `Whitening.fit`.
            pooled: (observations, features) as the kernel will see them; None: the mean of all views.
        """
        pooled = pool(embeddings, observations) if pooled is None else pooled
        reference = ReferenceSet.of(embeddings, observations, labels, taxonomy, pooled)
        everything = np.ones(len(reference.labels), dtype=bool)
        folds = make_folds(reference.labels.numpy(), self.seed) or [(everything, ~everything)]
        steps = max(self.steps, math.ceil(self.epochs * len(reference.labels) / self.batch_size))
        members = [
            ProjectionMember(self, reference, *folds[number % len(folds)], steps, seed=self.seed * SEED_STRIDE + number)
            for number in range(self.members)
        ]
        evaluated = np.unique(np.linspace(0, steps, EVALUATIONS + 1).round().astype(int)).tolist()
        recalls, self.mean_recalls_ = {}, {}
        for before, step in zip([0, *evaluated], evaluated, strict=False):
            for member in members:
                member.train(step - before)
            recalls[step] = np.concatenate([member.held_out_recall() for member in members])
            self.mean_recalls_[step] = float(recalls[step].mean()) if recalls[step].size else float("nan")
            improves = step > 0 and self.mean_recalls_[step] > self.mean_recalls_[self.steps_]
            gain, error = paired_gain(recalls[step], recalls[0])
            if step == 0 or (improves and gain > error):
                self.steps_ = step
                states = [deepcopy(member.network.state_dict()) for member in members]
        for member, state in zip(members, states, strict=True):
            member.network.load_state_dict(state)
        weight = torch.tensor(1 / self.members)
        self.banks_ = [replace(member.bank(), mixture_weight=weight) for member in members]
        return self


@dataclass(frozen=True)
class ReferenceSet:
    """A reference set in single precision, sorted by observation.

    Attributes:
        photos: (photos, views, features).
        observations: (photos,) index of the observation of each photo.
        first, photo_counts: (observations,) index of the first photo of each observation, and their number.
        labels: (observations,) index of the class of each.
        pooled: (observations, features), as the kernel sees them.
        taxonomy: of the classes.
    """

    photos: torch.Tensor
    observations: torch.Tensor
    first: torch.Tensor
    photo_counts: torch.Tensor
    labels: torch.Tensor
    pooled: torch.Tensor
    taxonomy: Taxonomy

    @classmethod
    def of(cls, embeddings, observations, labels, taxonomy, pooled) -> "ReferenceSet":
        """See `ProjectionEnsemble.fit`."""
        order = np.argsort(observations, kind="stable")
        counts = torch.tensor(np.bincount(observations))
        return cls(
            photos=torch.from_numpy(np.asarray(embeddings, dtype=np.float32)[order]),
            observations=torch.tensor(observations[order]),
            first=counts.cumsum(0) - counts,
            photo_counts=counts,
            labels=torch.tensor(labels[np.unique(observations, return_index=True)[1]]),
            pooled=torch.tensor(pooled, dtype=torch.float32),
            taxonomy=taxonomy,
        )


class Projection(nn.Module):
    """normalize(x @ skip + relu(x @ inner + bias) @ outer + bias): one hidden layer beside a linear map.

    It starts as the linear map alone, onto the principal directions of its input.

    Args:
        values: (observations, features), for the principal directions.
    """

    def __init__(self, values: torch.Tensor, hidden: int, width: int, generator: torch.Generator):
        super().__init__()
        features, width = values.shape[1], min(width, values.shape[1])
        directions = torch.linalg.eigh((values.T @ values).double()).eigenvectors.flip(1)[:, :width]
        self.register_buffer("skip", directions.float().contiguous())
        self.inner = nn.Parameter(torch.randn(features, hidden, generator=generator) * (2 / features) ** 0.5)
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(hidden, width))
        self.outer_bias = nn.Parameter(torch.zeros(width))

    def forward(self, values: torch.Tensor, dropout: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, features) -> (rows, width) of length 1; `dropout` multiplies the hidden units, (rows, hidden)."""
        active = torch.addmm(self.inner_bias, values, self.inner).relu()
        active = active if dropout is None else active * dropout
        return normalize(torch.addmm(self.outer_bias, active, self.outer) + values @ self.skip, dim=1)

    def layers(self) -> list[Layer]:
        """The network as the kernel's layers: x = relu(x) - relu(-x) takes the linear map through the hidden layer."""
        if not self.outer.any():  # untrained
            return [Layer(self.skip.clone(), self.outer_bias.detach().clone(), torch.tensor(0.0))]
        identity = torch.eye(len(self.skip))
        inner = torch.cat([self.inner.detach(), identity, -identity], dim=1)
        inner_bias = torch.cat([self.inner_bias.detach(), torch.zeros(2 * len(identity))])
        outer = torch.cat([self.outer.detach(), self.skip, -self.skip])
        return [
            Layer(inner, inner_bias, torch.tensor(1.0)),
            Layer(outer, self.outer_bias.detach().clone(), torch.tensor(0.0)),
        ]


class ProjectionMember:
    """One network in training.

    Args:
        kept, held_out: (observations,) bool, those for training and those for evaluation.
        steps: of the whole training, for the learning rate schedule.
    """

    def __init__(
        self,
        settings: ProjectionEnsemble,
        reference: ReferenceSet,
        kept: np.ndarray,
        held_out: np.ndarray,
        steps: int,
        seed: int,
    ):
        self.settings, self.reference = settings, reference
        self.kept, self.held_out = torch.tensor(np.flatnonzero(kept)), torch.tensor(np.flatnonzero(held_out))
        self.generator = torch.Generator().manual_seed(seed)
        self.start = fit_start(settings.whitening, reference, kept)
        self.values = apply_layers(self.start, reference.pooled)
        self.network = Projection(self.values[self.kept], settings.hidden, settings.width, self.generator)
        self.class_vectors = self.prototypes(self.kept).requires_grad_()
        sizes = torch.bincount(reference.labels[self.kept], minlength=len(self.class_vectors))
        self.bias = torch.where(sizes > 0, 0.0, ABSENT)
        self.donors, self.class_means = self.find_donors()
        self.log_variances = torch.zeros(2, requires_grad=True)  # of the two losses
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.network.parameters()), "weight_decay": settings.weight_decay},
                # Only the directions of the class vectors matter.
                {"params": [self.class_vectors, self.log_variances], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, total_steps=steps + 1, pct_start=0.1
        )
        self.queue = self.kept[:0]

    def find_donors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Photos whose variation is added to others, and the mean of the photos of each class.

        Returns:
            (donors,) indices of the photos whose class has several, or of all if none has, and (classes, features).
        """
        reference = self.reference
        photos = torch.isin(reference.observations, self.kept)
        labels = reference.labels[reference.observations]
        sizes = torch.bincount(labels[photos], minlength=len(self.bias))
        totals = torch.zeros(len(sizes), reference.photos.shape[2])
        totals.index_add_(0, labels[photos], reference.photos[photos].mean(dim=1))
        several = photos & (sizes[labels] > 1)
        donors = torch.nonzero(several if several.any() else photos)[:, 0]
        return donors, totals / sizes.clamp_min(1)[:, None]

    def sample(self, observations: torch.Tensor) -> torch.Tensor:
        """Random samples of observations, (rows,) -> (rows, features) after the layers of the start."""
        reference, generator = self.reference, self.generator
        rows, draws, views = len(observations), self.settings.draws, reference.photos.shape[1]
        offset = torch.rand(rows, draws, generator=generator) * reference.photo_counts[observations, None]
        photo = reference.first[observations, None] + offset.long()
        drawn = reference.photos[photo, torch.randint(views, (rows, draws), generator=generator)]
        weights = -torch.rand(rows, draws, generator=generator).clamp_min(1e-9).log()  # uniform on the simplex
        mixed = normalize(torch.einsum("rd,rdf->rf", weights, drawn), dim=1)
        donor = self.donors[torch.randint(len(self.donors), (rows,), generator=generator)]
        given = reference.photos[donor, torch.randint(views, (rows,), generator=generator)]
        difference = given - self.class_means[reference.labels[reference.observations[donor]]]
        return apply_layers(self.start, normalize(mixed + self.settings.variation * difference, dim=1))

    def loss(self, observations: torch.Tensor) -> torch.Tensor:
        """The loss of two samples of each observation of a batch, (batch,)."""
        settings = self.settings
        observations = observations.repeat(2)
        labels = self.reference.labels[observations]
        kept_units = torch.rand(len(observations), settings.hidden, generator=self.generator) >= settings.dropout
        projected = self.network(self.sample(observations), kept_units / (1 - settings.dropout))
        logits = projected @ normalize(self.class_vectors, dim=1).T / settings.temperature + self.bias
        losses = torch.stack([cross_entropy(logits, labels), contrastive_loss(projected, labels, settings.temperature)])
        return ((-self.log_variances).exp() * losses + self.log_variances).sum()

    def train(self, steps: int) -> None:
        """Train on this many more batches."""
        size = min(self.settings.batch_size, len(self.kept))
        for _ in range(steps):
            if len(self.queue) < size:
                shuffled = self.kept[torch.randperm(len(self.kept), generator=self.generator)]
                self.queue = torch.cat([self.queue, shuffled])
            batch, self.queue = self.queue[:size], self.queue[size:]
            self.optimizer.zero_grad()
            self.loss(batch).backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def prototypes(self, observations: torch.Tensor) -> torch.Tensor:
        """(classes, width) class means of some observations, by the network as it is now."""
        return torch.tensor(self.matcher(observations).prototypes_, dtype=torch.float32)

    @torch.no_grad()
    def matcher(self, observations: torch.Tensor) -> ClassMeans:
        """Class means of some observations after the network."""
        projected = self.network(self.values[observations]).double().numpy()
        labels = self.reference.labels[observations].numpy()
        return ClassMeans(self.settings.genus, self.settings.family).fit(projected, labels, self.reference.taxonomy)

    @torch.no_grad()
    def held_out_recall(self) -> np.ndarray:
        """(held-out observations,) `mean_recall` of each, with class means of the others."""
        scores = self.network(self.values[self.held_out]) @ self.prototypes(self.kept).T + self.bias
        own = scores.gather(1, self.reference.labels[self.held_out, None])
        return mean_recall(hits_of((scores > own).sum(dim=1).numpy()))

    def bank(self) -> Bank:
        """The bank for the kernel, with prototypes of all observations."""
        matcher = self.matcher(torch.arange(len(self.reference.labels)))
        return make_bank([*self.start, *self.network.layers()], matcher, 1 / self.settings.temperature)


def fit_start(whitening: float, reference: ReferenceSet, kept: np.ndarray) -> list[Layer]:
    """The layers of a transform fitted on a member's observations; their outputs are centred, of mean length 1."""
    photos = kept[reference.observations.numpy()]
    observations = (np.cumsum(kept) - 1)[reference.observations.numpy()[photos]]
    embeddings, labels = reference.photos.numpy()[photos], reference.labels.numpy()[kept][observations]
    mean = pool(embeddings, observations).mean(axis=0)
    [first] = Whitening().fit(embeddings, labels).layers(whitening, mean) if whitening else centre(mean)
    values = apply_layers([first], reference.pooled[torch.tensor(kept)])
    mean = values.mean(dim=0)
    length = (values - mean).norm(dim=1).mean().clamp_min(1e-9)
    return [replace(first, weight=first.weight / length, bias=(first.bias - mean) / length)]


def contrastive_loss(projected: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, https://arxiv.org/abs/2004.11362).

    Args:
        projected: (rows, width), rows of length 1.
        labels: (rows,), each at least twice; rows with equal labels are positives.
    """
    itself = torch.eye(len(projected), dtype=torch.bool)
    similarities = (projected @ projected.T / temperature).masked_fill(itself, ABSENT)
    positives = (labels[:, None] == labels) & ~itself
    return -((similarities.log_softmax(dim=1) * positives).sum(dim=1) / positives.sum(dim=1)).mean()

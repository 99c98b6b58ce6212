"""An ensemble of small networks on frozen embeddings, like the one that won FungiCLEF 2025: minutes on a CPU.

`ProjectionEnsemble` has the manners of the estimators in banks.py; its members are banks that the kernel reads.
"""

import math
from copy import copy, deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from kernel.bank import Bank, Layer, apply_layers
from local.banks.estimators import NEVER, ClassMeans, Whitening, make_bank, pool
from local.banks.folds import make_folds
from local.base.metrics import GUESSES, paired_gain
from local.data.taxonomy import Taxonomy

MARKS = 6  # how often the members are judged on what they left out
SEEDS = 1000  # apart, so that the members of two ensembles share none


class ProjectionEnsemble:
    """Networks that pull the photos of a class together and push classes apart, starting from a linear transform.

    Every member leaves out observations of its own, one in five and never a class's last, and has its own start,
    fitted without them. It learns by two losses at one temperature: cross-entropy of cosines to a learnt vector per
    class, which starts at the class's mean, and the supervised contrastive loss between the samples of a batch. Each
    observation of a batch is sampled twice: a random mean of its photos and views, moved as some photo of another class
    differs from the mean of its own. This lends the variation of classes with many photos to those with one, and
    keeps the network from learning the few by heart.

    On a few observations per class a linear whitening is hard to beat. All members are therefore stopped at the same
    step, where the observations they left out are recognised best, and at none, unless training gains more than one
    standard error there: they are then an ensemble of their starts. So they are too where nothing can be left out.

    Args:
        start: an unfitted transform of banks.py, in whose space training begins; `Whitening(0.75)` unless given.
        members: networks, whose probabilities are averaged.
        hidden: units of a network's one hidden layer.
        width: features in which cosines are taken, at most those of the embeddings.
        epochs, steps: training sees every observation so many times, and takes at least so many batches.
        batch_size: observations in a batch.
        draws: photos in random views whose mean is a sample; many make it like the mean of all, which the kernel sees.
        variation: how far a sample is moved, in differences of a photo from the mean of its class.
        temperature: of both losses.
        contrast: weight of the contrastive loss.
        dropout: of hidden units.
        learning_rate, weight_decay: AdamW's; the rate rises over a tenth of the steps and falls as a cosine.
        genus, family: as in `ClassMeans`, for the prototypes.

    Attributes:
        banks_: one per member, each with a prototype per class made of all observations by the trained network.
        steps_: after how many steps the members were stopped.
        worth_: by step, the mean of recalls at 1, 5 and 10 of the observations that members left out.
    """

    def __init__(
        self,
        start=None,
        members: int = 5,
        hidden: int = 2048,
        width: int = 768,
        epochs: int = 8,
        steps: int = 60,
        batch_size: int = 256,
        draws: int = 16,
        variation: float = 1.0,
        temperature: float = 0.1,
        contrast: float = 1.0,
        dropout: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        genus: float = 0.0,
        family: float = 0.0,
        seed: int = 0,
    ):
        self.start = Whitening(0.75) if start is None else start
        self.members, self.hidden, self.width, self.seed = members, hidden, width, seed
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.draws, self.variation = draws, variation
        self.temperature, self.contrast, self.dropout = temperature, contrast, dropout
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.genus, self.family = genus, family

    def fit(
        self,
        embeddings: np.ndarray,
        observations: np.ndarray,
        classes: np.ndarray,
        taxonomy: Taxonomy,
        pooled: np.ndarray | None = None,
    ):
        """Learn from a reference.

        Args:
            embeddings, observations, classes, taxonomy: as `Whitening.fit`.
            pooled: (observations, features) as the kernel will see them, if not in all views of `embeddings`.
        """
        pooled = pool(embeddings, observations) if pooled is None else pooled
        reference = Reference.of(embeddings, observations, classes, taxonomy, pooled)
        everything = np.ones(len(reference.classes), dtype=bool)
        folds = make_folds(reference.classes.numpy(), self.seed) or [(everything, ~everything)]
        steps = max(self.steps, math.ceil(self.epochs * len(reference.classes) / self.batch_size))
        members = [
            Member(self, reference, *folds[number % len(folds)], steps, seed=self.seed * SEEDS + number)
            for number in range(self.members)
        ]
        marks = np.unique(np.linspace(0, steps, MARKS + 1).round().astype(int)).tolist()
        worth, self.worth_ = {}, {}
        for before, mark in zip([0, *marks], marks, strict=False):
            for member in members:
                member.advance(mark - before)
            worth[mark] = torch.cat([member.held_out_worth() for member in members]).numpy()
            self.worth_[mark] = float(worth[mark].mean()) if worth[mark].size else float("nan")
            improves = mark > 0 and self.worth_[mark] > self.worth_[self.steps_]
            if mark == 0 or (improves and surely_better(worth[mark], worth[0])):
                self.steps_ = mark
                states = [deepcopy(member.network.state_dict()) for member in members]
        for member, state in zip(members, states, strict=True):
            member.network.load_state_dict(state)
        # A tensor each: safetensors refuses shared ones.
        self.banks_ = [replace(member.bank(), mixture_weight=torch.tensor(1 / self.members)) for member in members]
        return self


def surely_better(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether the gain on the same observations is above one standard error; fewer than two are no evidence."""
    gain, error = paired_gain(new, old)
    return gain > error


@dataclass(frozen=True)
class Reference:
    """A reference in single precision, the photos of an observation side by side.

    Attributes:
        photos: (photos, views, features).
        observations: (photos,) the observation of each.
        first, photo_counts: (observations,) where an observation's photos begin, and how many they are.
        classes: (observations,).
        pooled: (observations, features), as the kernel sees them.
        taxonomy: of the classes.
    """

    photos: torch.Tensor
    observations: torch.Tensor
    first: torch.Tensor
    photo_counts: torch.Tensor
    classes: torch.Tensor
    pooled: torch.Tensor
    taxonomy: Taxonomy

    @classmethod
    def of(cls, embeddings, observations, classes, taxonomy, pooled) -> "Reference":
        """See `ProjectionEnsemble.fit`."""
        order = np.argsort(observations, kind="stable")
        counts = torch.tensor(np.bincount(observations))
        return cls(
            photos=torch.from_numpy(np.asarray(embeddings, dtype=np.float32)[order]),
            observations=torch.tensor(observations[order]),
            first=counts.cumsum(0) - counts,
            photo_counts=counts,
            classes=torch.tensor(classes[np.unique(observations, return_index=True)[1]]),
            pooled=torch.tensor(pooled, dtype=torch.float32),
            taxonomy=taxonomy,
        )


class Projection(nn.Module):
    """unit(x @ skip + relu(x @ inner + bias) @ outer + bias): one hidden layer beside a linear map.

    It begins as the linear map alone, onto the principal directions of the space that it is given.

    Args:
        space: (observations, features).
    """

    def __init__(self, space: torch.Tensor, hidden: int, width: int, generator: torch.Generator):
        super().__init__()
        features, width = space.shape[1], min(width, space.shape[1])
        directions = torch.linalg.eigh((space.T @ space).double()).eigenvectors.flip(1)[:, :width]
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
        """The same as the kernel's layers: x = relu(x) - relu(-x) carries the linear map past the rectifier."""
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


class Member:
    """One network in training.

    Args:
        kept, held: (observations,) bool, those that it learns from and those that it leaves out.
        steps: of the whole training, for the learning rate's schedule.
    """

    def __init__(
        self,
        settings: ProjectionEnsemble,
        reference: Reference,
        kept: np.ndarray,
        held: np.ndarray,
        steps: int,
        seed: int,
    ):
        self.settings, self.reference = settings, reference
        self.kept, self.held = torch.tensor(np.flatnonzero(kept)), torch.tensor(np.flatnonzero(held))
        self.generator = torch.Generator().manual_seed(seed)
        self.start = fit_start(settings.start, reference, kept)
        self.space = apply_layers(self.start, reference.pooled)
        self.network = Projection(self.space[self.kept], settings.hidden, settings.width, self.generator)
        self.columns = self.prototypes(self.kept).requires_grad_()
        classes = reference.classes[self.kept]
        self.absent = torch.where(torch.bincount(classes, minlength=len(self.columns)) > 0, 0.0, NEVER)
        self.donors, self.class_means = self.find_donors()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.network.parameters()), "weight_decay": settings.weight_decay},
                {"params": [self.columns], "weight_decay": 0.0},  # only their directions matter
            ],
            lr=settings.learning_rate,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, total_steps=steps + 1, pct_start=0.1
        )
        self.queue = self.kept[:0]

    def find_donors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Photos whose class has several, or all where none has, (donors,), and the mean of each class's photos."""
        reference = self.reference
        photos = torch.isin(reference.observations, self.kept)
        classes = reference.classes[reference.observations]
        sizes = torch.bincount(classes[photos], minlength=len(self.absent))
        totals = torch.zeros(len(sizes), reference.photos.shape[2])
        totals.index_add_(0, classes[photos], reference.photos[photos].mean(dim=1))
        several = photos & (sizes[classes] > 1)
        donors = torch.nonzero(several if several.any() else photos)[:, 0]
        return donors, totals / sizes.clamp_min(1)[:, None]

    def sample(self, observations: torch.Tensor) -> torch.Tensor:
        """Random embeddings of observations, (rows,) -> (rows, features) in the space of the start."""
        reference, generator = self.reference, self.generator
        rows, draws, views = len(observations), self.settings.draws, reference.photos.shape[1]
        offset = torch.rand(rows, draws, generator=generator) * reference.photo_counts[observations, None]
        photo = reference.first[observations, None] + offset.long()
        drawn = reference.photos[photo, torch.randint(views, (rows, draws), generator=generator)]
        weights = -torch.rand(rows, draws, generator=generator).clamp_min(1e-9).log()  # uniform on the simplex
        mixed = normalize(torch.einsum("rd,rdf->rf", weights, drawn), dim=1)
        donor = self.donors[torch.randint(len(self.donors), (rows,), generator=generator)]
        given = reference.photos[donor, torch.randint(views, (rows,), generator=generator)]
        difference = given - self.class_means[reference.classes[reference.observations[donor]]]
        return apply_layers(self.start, normalize(mixed + self.settings.variation * difference, dim=1))

    def loss(self, observations: torch.Tensor) -> torch.Tensor:
        """Of two samples of each observation of a batch, (batch,)."""
        settings = self.settings
        observations = observations.repeat(2)
        classes = self.reference.classes[observations]
        survive = torch.rand(len(observations), settings.hidden, generator=self.generator) >= settings.dropout
        projected = self.network(self.sample(observations), survive / (1 - settings.dropout))
        logits = projected @ normalize(self.columns, dim=1).T / settings.temperature + self.absent
        return cross_entropy(logits, classes) + settings.contrast * contrastive_loss(
            projected, classes, settings.temperature
        )

    def advance(self, steps: int) -> None:
        """Train on so many batches more."""
        size = min(self.settings.batch_size, len(self.kept))
        for _ in range(steps):
            if len(self.queue) < size:
                again = self.kept[torch.randperm(len(self.kept), generator=self.generator)]
                self.queue = torch.cat([self.queue, again])
            batch, self.queue = self.queue[:size], self.queue[size:]
            self.optimizer.zero_grad()
            self.loss(batch).backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def prototypes(self, observations: torch.Tensor) -> torch.Tensor:
        """(classes, width), as the network now makes them of some observations."""
        return torch.tensor(self.matcher(observations).prototypes_, dtype=torch.float32)

    @torch.no_grad()
    def matcher(self, observations: torch.Tensor) -> ClassMeans:
        """Class means in the network's space."""
        projected = self.network(self.space[observations]).double().numpy()
        classes = self.reference.classes[observations].numpy()
        matcher = ClassMeans(self.settings.genus, self.settings.family)
        return matcher.fit(projected, np.arange(len(classes)), classes, self.reference.taxonomy)

    @torch.no_grad()
    def held_out_worth(self) -> torch.Tensor:
        """(held observations,): the mean of recalls, told by the class means of those kept."""
        scores = self.network(self.space[self.held]) @ self.prototypes(self.kept).T + self.absent
        own = scores.gather(1, self.reference.classes[self.held, None])
        places = (scores > own).sum(dim=1)
        return torch.stack([(places < count).double() for count in GUESSES]).mean(dim=0)

    def bank(self) -> Bank:
        """What the kernel needs, with prototypes of all observations."""
        matcher = self.matcher(torch.arange(len(self.reference.classes)))
        return make_bank([*self.start, *self.network.layers()], matcher, 1 / self.settings.temperature)


def fit_start(start, reference: Reference, kept: np.ndarray) -> list[Layer]:
    """The layers of a transform that has seen only what a member keeps; centred, and of length 1 on average."""
    photos = kept[reference.observations.numpy()]
    observations = (np.cumsum(kept) - 1)[reference.observations.numpy()[photos]]
    classes = reference.classes.numpy()[kept][observations]
    fitted = copy(start).fit(reference.photos.numpy()[photos], observations, classes, reference.taxonomy)
    *before, last = fitted.layers_
    space = apply_layers(fitted.layers_, reference.pooled[torch.tensor(kept)])
    mean = space.mean(dim=0)
    length = (space - mean).norm(dim=1).mean().clamp_min(1e-9)
    return [*before, replace(last, weight=last.weight / length, bias=(last.bias - mean) / length)]


def contrastive_loss(projected: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, https://arxiv.org/abs/2004.11362).

    Args:
        projected: (rows, width) of length 1.
        labels: (rows,), each at least twice; equal ones are positives.
    """
    itself = torch.eye(len(projected), dtype=torch.bool)
    similarities = (projected @ projected.T / temperature).masked_fill(itself, NEVER)
    positives = (labels[:, None] == labels) & ~itself
    return -((similarities.log_softmax(dim=1) * positives).sum(dim=1) / positives.sum(dim=1)).mean()

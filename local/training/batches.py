"""What training sees, step by step: which observations, in what order, and how their photos are varied.

Every random draw is a function of the seed, the epoch and the place in it, and of nothing that came before. So a run
that was interrupted goes on exactly as it would have, whatever the number of workers.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset
from torchvision.transforms import v2

from kernel.manifest import Preprocessing
from kernel.observations import Observation
from kernel.photos import read_photo, shorter_side
from local.recipes.settings import AugmentSettings, TrainSettings

ERASED = (0.02, 0.1)  # of a photo's area


@dataclass(frozen=True)
class Draw:
    """One observation of a step.

    Attributes:
        index: of the observation.
        is_asked: false for the support of an episode.
        seed: of its photos and their augmentation.
    """

    index: int
    is_asked: bool
    seed: int


@dataclass(frozen=True)
class Batch:
    """The photos of a step.

    Attributes:
        photos: (photos, 3, size, size) uint8.
        owners: (photos,) place in `index` of each photo's observation.
        index: (observations,).
        asked: (observations,) bool.
    """

    photos: torch.Tensor
    owners: torch.Tensor
    index: torch.Tensor
    asked: torch.Tensor

    def pin_memory(self) -> "Batch":
        """The same, where a GPU can fetch the photos by itself; a DataLoader asks for it by this name."""
        return replace(self, photos=self.photos.pin_memory())


class Draws:
    """The steps of an epoch, as lists of draws.

    Args:
        classes: (observations,) of each.
        share: (rank, world): of every batch this process sees each `world`-th, so that all of them together see what
            one alone would.
    """

    def __init__(self, classes: np.ndarray, train: TrainSettings, share: tuple[int, int] = (0, 1)):
        self.classes, self.train, self.share, self.epoch, self.first = classes, train, share, 1, 0
        self.is_episodic = train.prototypes == "episodic"
        self.size = train.ways * (train.support + train.queries) if self.is_episodic else train.batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.classes) / self.size)

    def start(self, epoch: int, first: int = 0) -> "Draws":
        """The next iteration is of this epoch, from this batch on."""
        self.epoch, self.first = epoch, first
        return self

    def __iter__(self) -> Iterator[list[Draw]]:
        rank, world = self.share
        batches = self._episodes() if self.is_episodic else self._shuffled()
        for number, batch in enumerate(batches):
            if number >= self.first:
                draws = [
                    Draw(int(index), bool(asked), seed_of(self.train.seed, self.epoch, number, place))
                    for place, (index, asked) in enumerate(batch)
                ]
                # Every process has a part in every step, since they wait for each other.
                yield draws if self.is_episodic else draws[rank::world] or draws[:1]

    def _shuffled(self) -> Iterator[list[tuple[int, bool]]]:
        """Every observation once; with `balance` as often as its class asks for, in as many draws."""
        rng, balance = np.random.default_rng((self.train.seed, self.epoch)), self.train.balance
        order = rng.permutation(len(self.classes))
        if balance:
            chances = np.bincount(self.classes)[self.classes] ** -float(balance)
            order = rng.choice(len(self.classes), len(self.classes), p=chances / chances.sum())
        for first in range(0, len(order), self.size):
            yield [(index, True) for index in order[first : first + self.size]]

    def _episodes(self) -> Iterator[list[tuple[int, bool]]]:
        """Some classes, of each a few observations that make its prototype and a few that are asked.

        A class of fewer keeps one at least to be asked; a class of one observation only makes the others' episode
        harder. An episode without a question is drawn again.
        """
        train, (rank, world) = self.train, self.share
        members = [np.flatnonzero(self.classes == index) for index in np.unique(self.classes)]
        for number in range(len(self)):
            # Each process has episodes of its own: half of one would be another task.
            rng = np.random.default_rng((train.seed, self.epoch, number * world + rank))
            episode: list[tuple[int, bool]] = []
            while not any(asked for _, asked in episode):
                episode = []
                for place in rng.permutation(len(members))[: train.ways]:
                    own = rng.permutation(members[place])
                    support = min(train.support, max(1, len(own) - 1))
                    episode += [(index, False) for index in own[:support]]
                    episode += [(index, True) for index in own[support : support + train.queries]]
            yield episode


class Photos(Dataset):
    """Augmented photos by draw: Draw -> ((photos, 3, size, size) uint8, the draw).

    Args:
        observations: each with at least one readable photo.
        limit: of photos of one observation, drawn at random.
    """

    def __init__(
        self, observations: Sequence[Observation], preprocessing: Preprocessing, augment: AugmentSettings, limit: int
    ):
        self.observations, self.limit = observations, limit
        self.decoded, self.size = shorter_side(preprocessing), preprocessing.size
        self.augment = augmentation(preprocessing, augment)

    def __len__(self) -> int:
        return len(self.observations)

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, Draw]:
        seed_all(draw.seed)
        photos = self.observations[draw.index].photos
        views: list[torch.Tensor] = []
        for place in torch.randperm(len(photos)).tolist():
            try:
                views.append(self.augment(read_photo(photos[place], self.decoded)))
            except Exception:  # as wide as the kernel's own guard; the evaluation has counted it by its cause
                continue
            if len(views) == self.limit:
                break
        return torch.stack(views) if views else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8), draw


def augmentation(preprocessing: Preprocessing, augment: AugmentSettings) -> v2.Compose:
    """A photo -> (3, size, size) uint8, randomly varied."""
    interpolation = v2.InterpolationMode[preprocessing.interpolation.upper()]
    fill = [round(255 * value) for value in preprocessing.mean]
    jitter, side = augment.colour_jitter, preprocessing.size
    steps = [
        v2.RandomResizedCrop(side, scale=(augment.crop_scale, 1.0), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(0.5 if augment.flip else 0.0),
    ]
    if augment.rand_augment:
        policy = f"rand-m{augment.rand_augment}-n2-mstd0.5-inc1"
        steps.append(rand_augment_transform(policy, {"img_mean": tuple(fill)}))
    if augment.rotate or augment.translate:
        zoom = (1 - augment.translate, 1 + augment.translate)
        moves = {"translate": (augment.translate,) * 2, "scale": zoom} if augment.translate else {}
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(augment.rotate, interpolation=bilinear, fill=fill, **moves))
    return v2.Compose([*steps, v2.ColorJitter(jitter, jitter, jitter, augment.hue), v2.PILToTensor()])


def collate(items: Sequence[tuple[torch.Tensor, Draw]]) -> Batch:
    """Photos of several observations in one batch; an observation without a photo is left out."""
    items = [(photos, draw) for photos, draw in items if len(photos)] or list(items[:1])
    sizes = torch.tensor([len(photos) for photos, _ in items])
    return Batch(
        photos=torch.cat([photos for photos, _ in items]),
        owners=torch.repeat_interleave(torch.arange(len(items)), sizes),
        index=torch.tensor([draw.index for _, draw in items]),
        asked=torch.tensor([draw.is_asked for _, draw in items]),
    )


class Mixing:
    """What is done to a batch on the device: rectangles erased, photos mixed with their targets, as timm does both."""

    def __init__(self, classes: int, augment: AugmentSettings, device: torch.device):
        self.erase = RandomErasing(augment.erase, *ERASED, mode="pixel", device=device.type) if augment.erase else None
        self.mix = None
        if augment.mixup or augment.cutmix:
            self.mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=classes)
        self.classes = classes

    def __call__(self, pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(photos, 3, size, size), (observations,) int -> the same of pixels, (observations, classes) targets."""
        if self.erase:
            self.erase(pixels)
        if self.mix and len(pixels) > 1:
            even = len(pixels) // 2 * 2  # it pairs the first with the last
            mixed, soft = self.mix(pixels[:even], targets[:even])
            rest = torch.nn.functional.one_hot(targets[even:], self.classes)
            return torch.cat([mixed, pixels[even:]]), torch.cat([soft, rest.to(soft)])
        return pixels, torch.nn.functional.one_hot(targets, self.classes).float()


def seed_of(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed every generator that an augmentation or a layer may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

"""What training sees, batch by batch: which observations, in what order, and how their photos are augmented.

Every random draw depends on the seed, the epoch and its position in the epoch alone. So a training that was interrupted
continues exactly as it would have, with any number of workers.
"""

import math
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import get_temp_dir

import numpy as np
import torch
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kernel.inputs import InputError
from kernel.loader import count_cores, end_with_parent
from kernel.manifest import Preprocessing
from kernel.observations import Observation
from kernel.photos import read_photo, shorter_side
from local.recipes.settings import AugmentSettings, TrainSettings

MAX_SOCKET_FOLDER = 107 - len("/listener-xxxxxxxx")  # bytes of its path, by Linux's limit for that of a socket
ERASED_AREA = (0.02, 0.1)  # fraction of a photo's area


@dataclass(frozen=True)
class Sample:
    """One observation of a batch.

    Attributes:
        index: of the observation in the training set.
        is_query: false for the support set of an episode.
        seed: of the choice of its photos and of their augmentation.
    """

    index: int
    is_query: bool
    seed: int


@dataclass(frozen=True)
class Batch:
    """The photos of a batch of observations.

    Attributes:
        photos: (photos, 3, size, size) uint8.
        observation_index: (photos,) the row of `indices` that each photo belongs to.
        indices: (observations,) of the observations in the training set.
        query_mask: (observations,) bool; false for the support set of an episode.
    """

    photos: torch.Tensor
    observation_index: torch.Tensor
    indices: torch.Tensor
    query_mask: torch.Tensor

    def pin_memory(self) -> "Batch":
        """The same with pinned photos; a DataLoader calls it by this name."""
        return replace(self, photos=self.photos.pin_memory())


class ObservationBatchSampler:
    """The batches of an epoch, as lists of samples.

    Args:
        labels: (observations,) the class index of each.
        rank: each process gets every `world_size`-th observation of each batch, from this one on; together they see
            what one process alone would.
    """

    def __init__(self, labels: np.ndarray, settings: TrainSettings, rank: int = 0, world_size: int = 1):
        self.labels, self.settings, self.rank, self.world_size = labels, settings, rank, world_size
        self.epoch, self.start_batch = 1, 0
        self.is_episodic = settings.prototypes == "episodic"
        episode = settings.ways * (settings.support + settings.queries)
        self.batch_size = episode if self.is_episodic else settings.batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size) if self.is_episodic else len(self._starts())

    def set_epoch(self, epoch: int, start_batch: int = 0) -> "ObservationBatchSampler":
        """Make the next iteration that of this epoch, from this batch on. Returns itself."""
        self.epoch, self.start_batch = epoch, start_batch
        return self

    def __iter__(self) -> Iterator[list[Sample]]:
        batches = self._episodes() if self.is_episodic else self._shuffled()
        for number, batch in enumerate(batches):
            if number < self.start_batch:
                continue
            samples = [
                Sample(int(index), bool(is_query), derive_seed(self.settings.seed, self.epoch, number, position))
                for position, (index, is_query) in enumerate(batch)
            ]
            # No rank's part may be empty, since the others would wait for its gradient.
            yield samples if self.is_episodic else samples[self.rank :: self.world_size] or samples[:1]

    def _shuffled(self) -> Iterator[list[tuple[int, bool]]]:
        """Every observation once; with `balance` as many draws, with replacement, weighted by the class's size."""
        rng, balance = np.random.default_rng((self.settings.seed, self.epoch)), self.settings.balance
        order = rng.permutation(len(self.labels))
        if balance:
            weights = np.bincount(self.labels)[self.labels] ** -float(balance)
            order = rng.choice(len(self.labels), len(self.labels), p=weights / weights.sum())
        starts = self._starts()
        for first, end in zip(starts, [*starts[1:], len(order)], strict=True):
            yield [(index, True) for index in order[first:end]]

    def _starts(self) -> range:
        """Where the batches of an epoch start: none at the last observation alone, but in batches of one.

        It is joined to the batch before it, since batch normalisation cannot train on a single photo.
        """
        joined = 1 if 1 < self.batch_size < len(self.labels) else 0
        return range(0, len(self.labels) - joined, self.batch_size)

    def _episodes(self) -> Iterator[list[tuple[int, bool]]]:
        """Episodes of up to `ways` classes, each with up to `support` and `queries` observations.

        A class of few observations keeps at least one for the queries. A class of one observation has no query, and its
        prototype only makes the episode harder. An episode without any query is drawn again.
        """
        settings = self.settings
        members = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        for number in range(len(self)):
            # Each rank has episodes of its own: half of one would be another task.
            rng = np.random.default_rng((settings.seed, self.epoch, number * self.world_size + self.rank))
            episode: list[tuple[int, bool]] = []
            while not any(is_query for _, is_query in episode):
                episode = []
                for label in rng.permutation(len(members))[: settings.ways]:
                    own = rng.permutation(members[label])
                    support = min(settings.support, max(1, len(own) - 1))
                    episode += [(index, False) for index in own[:support]]
                    episode += [(index, True) for index in own[support : support + settings.queries]]
            yield episode


class PhotoDataset(Dataset):
    """The augmented photos of a sample: Sample -> ((photos, 3, size, size) uint8, the sample).

    Args:
        observations: each with at least one readable photo.
        max_photos: of one observation, drawn at random.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        preprocessing: Preprocessing,
        augment: AugmentSettings,
        max_photos: int,
    ):
        self.observations, self.max_photos = observations, max_photos
        self.decoded, self.size = shorter_side(preprocessing), preprocessing.size
        self.augment = make_augmentation(preprocessing, augment)

    def __len__(self) -> int:
        return len(self.observations)

    def __getitem__(self, sample: Sample) -> tuple[torch.Tensor, Sample]:
        seed_everything(sample.seed)
        photos = self.observations[sample.index].photos
        augmented: list[torch.Tensor] = []
        for index in torch.randperm(len(photos)).tolist():
            try:
                augmented.append(self.augment(read_photo(photos[index], self.decoded)))
            except Exception:  # as wide as the kernel's own guard; the evaluation has counted the photo with its cause
                continue
            if len(augmented) == self.max_photos:
                break
        return torch.stack(augmented) if augmented else torch.zeros(0, 3, self.size, self.size).byte(), sample


def make_loader(dataset: PhotoDataset, sampler: ObservationBatchSampler, device: torch.device) -> DataLoader:
    """Batches of photos, loaded by worker processes that live as long as the loader.

    Raises:
        InputError: the name of the folder of temporary files is too long; the first batch would be waited for forever.
    """
    if sys.platform == "linux" and len(os.fsencode(get_temp_dir())) > MAX_SOCKET_FOLDER:
        raise InputError(f"{tempfile.gettempdir()} is too long a name for temporary files: set TMPDIR to a shorter one")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=count_cores(),
        # From Python 3.14 on the default is a server, which would outlive a training that is killed.
        multiprocessing_context="fork" if hasattr(os, "fork") and sys.platform == "linux" else None,
        worker_init_fn=set_up_worker,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that it draws nothing from the global one
    )


def set_up_worker(worker: int) -> None:
    """Let a worker live until the training ends, and no longer. torch would notice a kill only once it has started."""
    if sys.platform == "linux":
        end_with_parent(multiprocessing.parent_process().pid)


def make_augmentation(preprocessing: Preprocessing, augment: AugmentSettings) -> v2.Compose:
    """A photo -> (3, size, size) uint8, varied at random."""
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


def collate(items: Sequence[tuple[torch.Tensor, Sample]]) -> Batch:
    """The photos of several observations as one batch, without observations that have no readable photo."""
    items = [(photos, sample) for photos, sample in items if len(photos)] or list(items[:1])
    counts = torch.tensor([len(photos) for photos, _ in items])
    return Batch(
        photos=torch.cat([photos for photos, _ in items]),
        observation_index=torch.repeat_interleave(torch.arange(len(items)), counts),
        indices=torch.tensor([sample.index for _, sample in items]),
        query_mask=torch.tensor([sample.is_query for _, sample in items]),
    )


class BatchAugmentation:
    """The augmentation of a batch on its device: random erasing, mixup and CutMix, all by timm."""

    def __init__(self, classes: int, augment: AugmentSettings, device: torch.device):
        self.classes, self.erase, self.mix = classes, None, None
        if augment.erase:
            self.erase = RandomErasing(augment.erase, *ERASED_AREA, mode="pixel", device=device.type)
        if augment.mixup or augment.cutmix:
            self.mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=classes)

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(photos, 3, size, size), (photos,) int -> the same of pixels, (photos, classes) targets."""
        if self.erase:
            self.erase(pixels)
        if self.mix and len(pixels) > 1:
            even = len(pixels) // 2 * 2  # timm mixes pairs
            mixed, targets = self.mix(pixels[:even], labels[:even])
            rest = torch.nn.functional.one_hot(labels[even:], self.classes)
            return torch.cat([mixed, pixels[even:]]), torch.cat([targets, rest.to(targets)])
        return pixels, torch.nn.functional.one_hot(labels, self.classes).float()


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed every generator that an augmentation or a layer may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

"""Test-time views, made on the device from one decode, and the embeddings of observations averaged over them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from kernel.budget import Budget
from kernel.encoders import Encoder
from kernel.observations import Observation
from kernel.photos import decode_all

# Each maps (batch, 3, size, size) to the same shape. Order of worth: a budget keeps a prefix.
VIEWS = {
    "plain": lambda photos: photos,
    "hflip": lambda photos: photos.flip(-1),
}
POOLINGS = ("mean", "max")


@dataclass
class Embeddings:
    """What an encoder made of a list of observations.

    Attributes:
        values: (observations, features) float32, each row of length 1, or zero where no photo was seen.
        photos: (observations,) photos that went into each row.
        failures: photos that could not be read, by cause.
        late: observations left out because the budget was spent.
    """

    values: torch.Tensor
    photos: torch.Tensor
    failures: Counter = field(default_factory=Counter)
    late: int = 0

    @property
    def seen(self) -> torch.Tensor:
        """(observations,) bool: which rows hold an embedding."""
        return self.photos > 0


@torch.inference_mode()
def embed_photos(encoder: Encoder, photos: torch.Tensor, views: Sequence[str]) -> torch.Tensor:
    """The mean over views of L2-normalised embeddings: (batch, 3, size, size) uint8 -> (batch, features) on the CPU."""
    pixels = encoder.normalise(photos)
    return (sum(encoder.embed(VIEWS[view](pixels)) for view in views) / len(views)).cpu()


def embed_observations(
    encoder: Encoder,
    observations: Sequence[Observation],
    views: Sequence[str],
    pooling: str = "mean",
    budget: Budget | None = None,
    progress: str = "",
) -> Embeddings:
    """Embed every observation: photos averaged over views, then pooled over the observation, then normalised.

    Args:
        views: keys of VIEWS.
        pooling: over an observation's photos, "mean" or element-wise "max".
        budget: when it is spent, observations that are not complete are left out. None is no limit.
        progress: what to call the work in a line every tenth of the way; empty is silent.
    """
    start = 0.0 if pooling == "mean" else -torch.inf
    totals = torch.full((len(observations), encoder.features), start)
    counts = torch.zeros(len(observations), dtype=torch.long)
    failures, late = Counter(), 0
    total, done, said = sum(len(observation.photos) for observation in observations), 0, 0
    for owners, batch in _batches(encoder, observations, failures):
        if budget and budget.is_spent():
            # The batch may begin in the middle of an observation; half an observation would not be comparable.
            first = owners[0]
            counts[first:], late = 0, len(observations) - first
            break
        embedded, index = embed_photos(encoder, batch, views), torch.tensor(owners)
        if pooling == "mean":
            totals.index_add_(0, index, embedded)
        else:
            totals.scatter_reduce_(0, index[:, None].expand_as(embedded), embedded, "amax")
        counts.index_add_(0, index, torch.ones_like(index))
        done += len(owners)
        if progress and done * 10 // total > said:
            said = done * 10 // total
            print(f"{progress}: {done} of {total} photos", flush=True)
    # A mean and a sum have the same direction, so the sum is all that the mean needs.
    values = nn.functional.normalize(totals.where(counts[:, None] > 0, torch.zeros(())), dim=1)
    return Embeddings(values, counts, failures, late)


def _batches(
    encoder: Encoder, observations: Sequence[Observation], failures: Counter
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Readable photos in order, as (index of the observation of each, (batch, 3, size, size) uint8)."""
    size = 32 if encoder.device.type == "cpu" else 128
    photos = [(index, path) for index, observation in enumerate(observations) for path in observation.photos]
    owners: list[int] = []
    batch: list[np.ndarray] = []
    decoded = decode_all((path for _, path in photos), encoder.preprocessing)
    for (owner, _), photo in zip(photos, decoded, strict=True):
        if isinstance(photo, str):
            failures[photo] += 1
            continue
        owners.append(owner)
        batch.append(photo)
        if len(batch) == size:
            yield owners, torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
            owners, batch = [], []
    if batch:
        yield owners, torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)

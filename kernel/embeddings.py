"""From photos to observation embeddings, in batches and within the budget.

The embedding of an observation is the mean over its photos and their views of L2-normalised embeddings. When memory
runs out, the batch is halved. Several GPUs share each batch. In the scored rerun, an error costs only the observations
that are not embedded yet: they keep the fallback prediction.
"""

import math
import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from kernel.budget import MARGIN, UNLIMITED, Budget, Pace
from kernel.encoders import Encoder
from kernel.observations import Observation
from kernel.photos import decode_all
from kernel.progress import Progress
from kernel.views import VIEWS

T = TypeVar("T")
FIRST_BATCH = 8  # photos by which the time is planned; few, since on a slow machine the first pass is the slowest
PREFETCHED = 2  # batches that are decoded ahead, at most


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a list of observations, by one encoder.

    Attributes:
        values: (observations, features) float32, each row of length 1, or zero where no photo was embedded.
        photos: (observations,) number of photos in each row.
        unreadable: path and cause of every photo that could not be read.
        late: number of observations left out because the budget was spent, or because of an error.
        views: number of photos by the number of their views.
    """

    values: torch.Tensor
    photos: torch.Tensor
    unreadable: list[tuple[Path, str]]
    late: int
    views: Counter

    @property
    def failures(self) -> Counter:
        """Number of photos that could not be read, by cause."""
        return Counter(cause for _, cause in self.unreadable)

    @property
    def has_embedding(self) -> torch.Tensor:
        """(observations,) bool: which rows are not zero."""
        return self.photos > 0


@dataclass(frozen=True)
class Limits:
    """What embedding may cost, and what happens when it costs more.

    Attributes:
        budget: when it is spent, observations that are not complete are left out.
        fraction: of the remaining time, for which the views are planned; the rest is for other encoders.
        is_optional: stop immediately when there is no time for even one view of every photo.
        tolerates_errors: an error after the first batch costs the observations to come, and those before it are kept.
    """

    budget: Budget = UNLIMITED
    fraction: float = 1.0
    is_optional: bool = False
    tolerates_errors: bool = False


class Pool:
    """Combines photo embeddings by observation. Its memory grows with the observations, not with the photos.

    Args:
        pooling: "mean", or element-wise "max".
    """

    def __init__(self, observations: int, features: int, pooling: str):
        self.pooling = pooling
        self.totals = torch.full((observations, features), 0.0 if pooling == "mean" else -torch.inf)
        self.counts = torch.zeros(observations, dtype=torch.long)

    def add(self, indices: Sequence[int], embedded: torch.Tensor) -> None:
        """Add (photos, features) to the observations of these indices, one per photo."""
        index = torch.tensor(indices)
        if self.pooling == "mean":
            self.totals.index_add_(0, index, embedded)
        else:
            self.totals.scatter_reduce_(0, index[:, None].expand_as(embedded), embedded, "amax")
        self.counts.index_add_(0, index, torch.ones_like(index))

    def drop_from(self, first: int) -> int:
        """Drop the observations from `first` on, since some of their photos are missing. Returns how many."""
        self.counts[first:] = 0
        return len(self.counts) - first

    def values(self) -> torch.Tensor:
        """(observations, features), rows of length 1. A sum has the direction of the mean, so it is not divided."""
        return nn.functional.normalize(self.totals.where(self.counts[:, None] > 0, torch.zeros(())), dim=1)


def embed_observations(
    encoder: Encoder,
    observations: Sequence[Observation],
    views: Sequence[str],
    pooling: str = "mean",
    limits: Limits | None = None,
    name: str = "",
) -> Embeddings:
    """Embed every observation: photos averaged over views, then pooled over the observation, then normalised.

    Args:
        views: keys of VIEWS, the most useful first. When time is short, photos get the first of them.
        pooling: over an observation's photos, "mean" or element-wise "max".
        limits: None sets none.
        name: of the encoder, for the plan and for the progress in the log; empty prints neither.
    """
    limits, unreadable = limits or Limits(), []
    budget = limits.budget
    batches = load_batches(encoder, observations, unreadable, budget.remaining)
    # Beside a GPU decoding runs ahead. On a CPU it would take the cores from the forward pass.
    overlaps = encoder.device.type != "cpu"
    if overlaps:
        batches = prefetch(batches, budget.remaining)
    total = sum(len(observation.photos) for observation in observations)
    pool, pace = Pool(len(observations), encoder.features, pooling), Pace(overlaps)
    # `incomplete` is the first observation of which photos may be missing.
    photos_by_views, done, incomplete = Counter(), 0, 0
    requested = budget.elapsed()
    deadline = requested + budget.remaining() * limits.fraction
    try:
        with Progress(name, total, "photo") as progress:
            for indices, photos in batches:
                arrived = budget.elapsed()
                if not done and 0 < budget.remaining() < math.inf:
                    pace.record(len(indices), 1, arrived - requested, time_one_view(encoder, photos, views[0], budget))
                    if name:
                        print_plan(name, total, len(views), deadline, pace, budget)
                    if limits.is_optional and pace.seconds(total, 1) > budget.remaining():
                        break
                # One batch more than there is, so that a last batch that is slow costs views and not photos.
                rest = total - done - len(unreadable) + len(indices)
                count = pace.affordable_views(rest, len(views), deadline - budget.elapsed())
                incomplete = indices[0]
                if budget.remaining() <= max(0, pace.seconds(len(indices), count)):
                    break
                start = budget.elapsed()
                embedded = encoder.embed(photos, [VIEWS[view] for view in views[:count]])
                pool.add(indices, embedded.mean(dim=1))
                incomplete = indices[-1]
                if done:
                    pace.record(len(indices), count, arrived - requested, budget.elapsed() - start)
                requested = budget.elapsed()
                photos_by_views[count] += len(indices)
                done += len(indices)
                progress.advance(len(indices), f"{count} of {len(views)} views")
    except Exception:
        if not (limits.tolerates_errors and done):
            raise
        traceback.print_exc()
    finally:
        batches.close()
    late = pool.drop_from(incomplete) if done + len(unreadable) < total else 0
    return Embeddings(pool.values(), pool.counts, unreadable, late, photos_by_views)


def time_one_view(encoder: Encoder, photos: torch.Tensor, view: str, budget: Budget) -> float:
    """Seconds that one view of a batch takes. A first pass is not timed, since it also sets the libraries up."""
    encoder.embed(photos, [VIEWS[view]])
    start = budget.elapsed()
    encoder.embed(photos, [VIEWS[view]])
    return budget.elapsed() - start


def print_plan(name: str, photos: int, views: int, deadline: float, pace: Pace, budget: Budget) -> None:
    """One line: how many views there is time for."""
    planned = pace.affordable_views(photos, views, deadline - budget.elapsed())
    print(
        f"{name}: {planned} of {views} views of {photos} photos, about {pace.seconds(photos, planned):.0f} s of the "
        f"{budget.remaining():.0f} s left ({MARGIN:.0%} of the limit is kept in reserve)",
        flush=True,
    )


def load_batches(
    encoder: Encoder,
    observations: Sequence[Observation],
    unreadable: list[tuple[Path, str]],
    remaining: Callable[[], float] = lambda: math.inf,
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Readable photos in order, as (index of each photo's observation, (batch, 3, decoded_size, decoded_size) uint8).

    Args:
        unreadable: gets the path of every photo that could not be read, and the cause.
        remaining: seconds that a batch may take. When it takes longer, as when a disk hangs, there are no more batches.
    """
    photos = [(index, path) for index, observation in enumerate(observations) for path in observation.photos]
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        first, end = 0, FIRST_BATCH
        while first < len(photos):
            part = photos[first:end]
            first, end = end, end + encoder.batch_size
            paths, timeout = [path for _, path in part], min(max(0, remaining()), threading.TIMEOUT_MAX)
            try:
                decoded = decode_all(paths, encoder.preprocessing, threads, timeout)
            except TimeoutError:
                return
            readable = []
            for (index, path), photo in zip(part, decoded, strict=True):
                if isinstance(photo, str):
                    unreadable.append((path, photo))
                else:
                    readable.append((index, photo))
            if readable:
                indices, batch = zip(*readable, strict=True)
                yield indices, to_batch(batch, encoder)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # one of them may wait for a disk that hangs


def to_batch(photos: Sequence[np.ndarray], encoder: Encoder) -> torch.Tensor:
    """Photos as one (batch, 3, decoded_size, decoded_size) uint8 tensor, in pinned memory for a GPU."""
    batch = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    return batch.pin_memory() if encoder.device.type == "cuda" else batch


def prefetch(batches: Iterator[T], remaining: Callable[[], float]) -> Iterator[T]:
    """The same batches, made in a thread while the batches before them are being embedded.

    Args:
        remaining: seconds to wait for the next batch at most. After that there are no more, as when a disk hangs.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ready = deque(thread.submit(next, batches, None) for _ in range(PREFETCHED))
    try:
        while (batch := ready.popleft().result(min(max(0, remaining()), threading.TIMEOUT_MAX))) is not None:
            ready.append(thread.submit(next, batches, None))
            yield batch
    except TimeoutError:
        return
    finally:
        for task in ready:
            task.cancel()
        thread.submit(batches.close)
        thread.shutdown(wait=False)

"""From photos to observation embeddings, in batches and within the budget.

The embedding of an observation is the mean over its photos and their views of L2-normalised embeddings. When memory
runs out, the batch is halved. Several GPUs share each batch. In the scored rerun, an error costs only the observations
that are not embedded yet: they keep the fallback prediction.
"""

import math
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kernel.budget import MARGIN, UNLIMITED, Budget, Pace
from kernel.forward import Encoder, Submitted, torch_threads
from kernel.loader import PhotoLoader
from kernel.observations import Observation
from kernel.progress import Progress
from kernel.views import ALL_VIEWS


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a list of observations, by one encoder.

    Attributes:
        pooled: (observations, features) float32, the mean or maximum over photos, or zero where no photo was embedded.
            Without pooling (observations x views, features), the views of an observation one after another.
        photos: number of photos in each row.
        unreadable: path and cause of every photo that could not be read.
        late: number of observations left out because the budget was spent, or because of an error.
        views: number of photos by the number of their views.
    """

    pooled: torch.Tensor
    photos: torch.Tensor
    unreadable: list[tuple[Path, str]]
    late: int
    views: Counter

    @property
    def values(self) -> torch.Tensor:
        """The rows of `pooled`, each of length 1 or 0."""
        return concatenate([self.pooled])

    @property
    def failures(self) -> Counter:
        """Number of photos that could not be read, by cause."""
        return Counter(cause for _, cause in self.unreadable)

    @property
    def has_embedding(self) -> torch.Tensor:
        """Which rows are not zero, bool."""
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
        views: of a photo, at most.
        pooling: "mean", or element-wise "max"; with "none" every view of an observation's photo has a row of its own.
    """

    def __init__(self, observations: int, views: int, features: int, pooling: str):
        self.pooling, self.rows = pooling, views if pooling == "none" else 1
        shape = (observations * self.rows, features)
        self.totals = torch.full(shape, -torch.inf if pooling == "max" else 0.0)
        self.counts = torch.zeros(len(self.totals), dtype=torch.long)

    def add(self, indices: Sequence[int], embedded: torch.Tensor) -> None:
        """Add (photos, views, features) to the observations of these indices, one per photo."""
        index = torch.tensor(indices)
        if self.pooling == "none":
            index = (index[:, None] * self.rows + torch.arange(embedded.shape[1])).flatten()
            embedded = embedded.flatten(0, 1)
        else:
            embedded = embedded.mean(dim=1)
        if self.pooling == "max":
            self.totals.scatter_reduce_(0, index[:, None].expand_as(embedded), embedded, "amax")
        else:
            self.totals.index_add_(0, index, embedded)
        self.counts.index_add_(0, index, torch.ones_like(index))

    def drop_from(self, first: int) -> int:
        """Drop the observations from `first` on, since some of their photos are missing. Returns how many."""
        self.counts[first * self.rows :] = 0
        return len(self.counts) // self.rows - first

    def pooled(self) -> torch.Tensor:
        """The rows, zero without a photo."""
        pooled = self.totals.where(self.counts[:, None] > 0, torch.zeros(()))
        return pooled / self.counts.clamp(min=1)[:, None] if self.pooling == "mean" else pooled


def concatenate(pooled: Sequence[torch.Tensor]) -> torch.Tensor:
    """The embeddings of observations by several encoders as one. How much each counts is a matter of the bank.

    Args:
        pooled: (observations, features) of each encoder, means or maxima of embeddings of length 1.

    Returns:
        (observations, features of all) float32, each row of length 1 or 0.
    """
    return nn.functional.normalize(torch.cat(list(pooled), dim=1), dim=1)


def embed_observations(
    encoder: Encoder,
    observations: Sequence[Observation],
    views: Sequence[str],
    pooling: str = "mean",
    limits: Limits | None = None,
    name: str = "",
    loader: PhotoLoader | None = None,
) -> Embeddings:
    """Embed every observation: photos averaged over views, then pooled over the observation, then normalised.

    Args:
        views: keys of ALL_VIEWS, the most useful first. When time is short, photos get the first of them.
        pooling: over an observation's photos, "mean" or element-wise "max"; "none" keeps each view of the only photo.
        limits: None sets none.
        name: of the encoder, for the plan and for the progress in the log; empty prints neither.
        loader: of all photos of the observations, in order, if it has been started already. It is closed at the end.
    """
    limits = limits or Limits()
    observation_index = [index for index, observation in enumerate(observations) for _ in observation.photos]
    loader = loader or PhotoLoader.for_encoder(list_photos(observations), encoder)
    pool = Pool(len(observations), len(views), encoder.features, pooling)
    schedule = Schedule(encoder, loader, views, limits, name)
    photos_by_views, end = Counter(), 0
    try:
        with loader, Progress(name, len(observation_index), "photo") as progress:
            for batch, embedded in embed_batches(encoder, schedule.batches(), schedule.pace):
                pool.add([observation_index[photo] for photo in batch.photos], embedded)
                photos_by_views[len(batch.views)] += len(batch.photos)
                end = batch.photos[-1] + 1
                progress.advance(len(batch.photos), f"{len(batch.views)} of {len(views)} views")
    except Exception:
        if not (limits.tolerates_errors and end):
            raise
        traceback.print_exc()
    is_complete = photos_by_views.total() + len(loader.unreadable) == len(observation_index)
    late = 0 if is_complete else pool.drop_from(observation_index[end])
    return Embeddings(pool.pooled(), pool.counts, loader.unreadable, late, photos_by_views)


def list_photos(observations: Sequence[Observation]) -> list[Path]:
    """All photos, in the order of the observations."""
    return [photo for observation in observations for photo in observation.photos]


@dataclass(frozen=True)
class Batch:
    """Photos to embed.

    Attributes:
        photos: their indices.
        pixels: (photos, 3, decoded_size, decoded_size) uint8.
        views: keys of ALL_VIEWS.
    """

    photos: list[int]
    pixels: torch.Tensor
    views: Sequence[str]


def embed_batches(
    encoder: Encoder, batches: Iterable[Batch], pace: Pace | None = None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Embed batch after batch: each with (photos, views, features) float32.

    The next batch is queued before the result of one is waited for, so that a GPU or the threads of a CPU never wait.
    Beside a GPU torch computes in this thread alone meanwhile: its other threads would wait for the cores that decode.
    After an error, the batches that are queued still come before it is raised.

    Args:
        pace: gets the times of the forward passes.
    """
    queued: deque[tuple[Batch, Submitted]] = deque()

    def finish() -> tuple[Batch, torch.Tensor]:
        batch, submitted = queued.popleft()
        embedded = submitted.result()
        if pace:
            pace.record_forward(len(batch.photos), len(batch.views), submitted.seconds)
        return batch, embedded

    arriving, failure = iter(batches), None
    with torch_threads(torch.get_num_threads() if encoder.shares_cores else 1):
        try:
            while True:
                try:
                    batch = next(arriving, None)
                    if batch:
                        queued.append((batch, encoder.submit(batch.pixels, [ALL_VIEWS[view] for view in batch.views])))
                except Exception as error:
                    batch, failure = None, error
                while len(queued) > (1 if batch else 0):
                    yield finish()
                if not batch:
                    break
        except BaseException:  # Ctrl-C, for instance
            encoder.cancel()
            raise
    if failure:
        raise failure


class Schedule:
    """Decides how many views each batch gets, within the limits.

    Attributes:
        pace: what photos have cost so far; the forward passes are recorded by `embed_batches`.
    """

    def __init__(self, encoder: Encoder, loader: PhotoLoader, views: Sequence[str], limits: Limits, name: str) -> None:
        self.encoder, self.loader, self.views, self.limits, self.name = encoder, loader, views, limits, name
        self.pace = Pace(encoder.shares_cores)

    def batches(self) -> Iterator[Batch]:
        """The batches of the loader with their views, until the budget is spent."""
        budget, pace, encoder, total = self.limits.budget, self.pace, self.encoder, len(self.loader.paths)
        arriving = self.loader.batches(encoder, budget.remaining)
        requested = arrived = budget.elapsed()
        deadline = requested + budget.remaining() * self.limits.fraction
        queued = views = 0  # photos of the batch before, whose forward passes may not have ended, and their views
        is_first = 0 < budget.remaining() < math.inf
        for photos, pixels in arriving:
            before, arrived = arrived, budget.elapsed()
            pace.record_decode(len(photos), arrived - requested, arrived - before)
            if is_first:
                is_first = False
                pace.record_forward(len(photos), 1, time_one_view(encoder, pixels, self.views[0], budget))
                if self.name:
                    print_plan(self.name, total, len(self.views), deadline, pace, budget)
                if self.limits.is_optional and pace.seconds(total, 1) > budget.remaining():
                    return
            # One batch more than there is, so that a last batch that is slow costs views and not photos.
            rest = total - self.loader.taken + 2 * len(photos) + queued
            count = pace.affordable_views(rest, len(self.views), deadline - budget.elapsed())
            if budget.remaining() <= max(0, pace.seconds(len(photos) + queued, count)):
                return
            yield Batch(photos, pixels, self.views[:count])
            before, requested = requested, budget.elapsed()
            if (queued, views) == (len(photos), count):
                pace.record_interval(len(photos), count, requested - before)
            queued, views = len(photos), count


def time_one_view(encoder: Encoder, pixels: torch.Tensor, view: str, budget: Budget) -> float:
    """Seconds that one view of a batch takes. A GPU is warm; on a CPU a first pass, which is not timed, sets it up."""
    if encoder.shares_cores:
        encoder.embed(pixels, [ALL_VIEWS[view]])
    start = budget.elapsed()
    encoder.embed(pixels, [ALL_VIEWS[view]])
    return budget.elapsed() - start


def print_plan(name: str, photos: int, views: int, deadline: float, pace: Pace, budget: Budget) -> None:
    """One line: how many views there is time for."""
    planned = pace.affordable_views(photos, views, deadline - budget.elapsed())
    print(
        f"{name}: {planned} of {views} views of {photos} photos, about {pace.seconds(photos, planned):.0f} s of the "
        f"{budget.remaining():.0f} s left ({MARGIN:.0%} of the limit is kept in reserve)",
        flush=True,
    )

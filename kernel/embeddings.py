"""From photos to observation embeddings, in batches and within the budget.

When memory runs out, the batch is halved. Several GPUs share each batch; an encoder that fits on no GPU runs on the
CPU, and one that overflows in half precision continues in full precision. In the scored rerun, an error that cannot be
recovered from affects only the observations that are not embedded yet: they keep the fallback prediction.
"""

import math
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from kernel.budget import MARGIN, Budget, Pace
from kernel.encoders import Encoder
from kernel.observations import Observation
from kernel.photos import decode_all
from kernel.views import VIEWS

T = TypeVar("T")
PROBE = 8  # photos in the first batch, from which the plan is made; few, since a slow machine pays for all their views


@dataclass(frozen=True)
class Embeddings:
    """What an encoder made of a list of observations.

    Attributes:
        values: (observations, features) float32, each row of length 1, or zero where no photo was seen.
        photos: (observations,) photos that went into each row.
        unreadable: path and cause of every photo that could not be read.
        late: observations left out because the budget was spent.
        views: photos by the number of their views.
    """

    values: torch.Tensor
    photos: torch.Tensor
    unreadable: list[tuple[Path, str]]
    late: int
    views: Counter

    @property
    def failures(self) -> Counter:
        """Photos that could not be read, by cause."""
        return Counter(cause for _, cause in self.unreadable)

    @property
    def seen(self) -> torch.Tensor:
        """(observations,) bool: which rows hold an embedding."""
        return self.photos > 0


class Pool:
    """Sums up photo embeddings by observation; its memory grows with the observations, not with the photos."""

    def __init__(self, observations: int, features: int, pooling: str):
        self.pooling = pooling
        self.totals = torch.full((observations, features), 0.0 if pooling == "mean" else -torch.inf)
        self.counts = torch.zeros(observations, dtype=torch.long)

    def add(self, owners: Sequence[int], embedded: torch.Tensor) -> None:
        """Add (photos, features) to the observations that own them."""
        index = torch.tensor(owners)
        if self.pooling == "mean":
            self.totals.index_add_(0, index, embedded)
        else:
            self.totals.scatter_reduce_(0, index[:, None].expand_as(embedded), embedded, "amax")
        self.counts.index_add_(0, index, torch.ones_like(index))

    def leave_out(self, first: int) -> int:
        """Forget the observations from `first` on: half of one would not be comparable. Returns how many."""
        self.counts[first:] = 0
        return len(self.counts) - first

    def values(self) -> torch.Tensor:
        """(observations, features), of length 1. A mean has the direction of its sum, which is all that is needed."""
        return nn.functional.normalize(self.totals.where(self.counts[:, None] > 0, torch.zeros(())), dim=1)


def embed_observations(
    encoder: Encoder,
    observations: Sequence[Observation],
    views: Sequence[str],
    pooling: str = "mean",
    budget: Budget | None = None,
    share: float = 1.0,
    is_optional: bool = False,
    keeps_going: bool = False,
    name: str = "",
) -> Embeddings:
    """Embed every observation: photos averaged over views, then pooled over the observation, then normalised.

    Args:
        views: keys of VIEWS, in order of worth. When time is short, photos get the first of them.
        pooling: over an observation's photos, "mean" or element-wise "max".
        budget: when it is spent, observations that are not complete are left out. None is no limit.
        share: of the time left that the views may be planned for; the rest is for other encoders.
        is_optional: give up at once when not even one view of every photo is affordable.
        keeps_going: an error after the first batch, in loading photos or in embedding them, costs the observations to
            come, and not those that are done.
        name: of the encoder, to tell the plan and every tenth of the way; empty is silent.
    """
    budget, failures = budget or Budget(math.inf, 0.0), []
    # Beside a GPU decoding runs ahead; on a CPU it would take cores from the forward pass, whose threads then wait.
    overlaps, batches = encoder.device.type != "cpu", load_batches(encoder, observations, failures, budget.left)
    if overlaps:
        batches = ahead(batches, budget.left)
    pool, pace = Pool(len(observations), encoder.features, pooling), Pace(overlaps)
    used, done, incomplete = Counter(), 0, 0  # `incomplete` is the first observation of which photos may be missing
    total = sum(len(observation.photos) for observation in observations)
    end, asked = budget.elapsed() + budget.left() * share, budget.elapsed()
    try:
        for owners, photos in batches:
            arrived = budget.elapsed()
            if not done and 0 < budget.left() < math.inf:
                # Once untimed, since the first pass also sets the libraries up; then one view, to plan all of them by.
                encoder.embed(photos, [VIEWS[views[0]]])
                warm = budget.elapsed()
                encoder.embed(photos, [VIEWS[views[0]]])
                pace.record(len(owners), 1, arrived - asked, budget.elapsed() - warm)
                if name:
                    planned = pace.affordable(total, len(views), end - budget.elapsed())
                    tell_plan(name, total, planned, len(views), pace, budget)
                if is_optional and pace.seconds(total, 1) > budget.left():
                    break
            # As if there were one batch more: a batch that takes longer than the last then costs views, not photos.
            rest = total - done - len(failures) + len(owners)
            count = pace.affordable(rest, len(views), end - budget.elapsed())
            incomplete = owners[0]
            if budget.left() <= max(0, pace.seconds(len(owners), count)):
                break
            start = budget.elapsed()
            embedded = encoder.embed(photos, [VIEWS[view] for view in views[:count]])
            pool.add(owners, embedded.mean(dim=1))
            incomplete = owners[-1]
            if done:
                pace.record(len(owners), count, arrived - asked, budget.elapsed() - start)
            asked = budget.elapsed()
            used[count] += len(owners)
            if name and (done + len(owners)) * 10 // total > done * 10 // total:
                print(f"{name}: {done + len(owners)} of {total} photos, {count} views", flush=True)
            done += len(owners)
    except Exception:
        if not (keeps_going and done):
            raise
        traceback.print_exc()
    finally:
        batches.close()
    late = pool.leave_out(incomplete) if done + len(failures) < total else 0
    return Embeddings(pool.values(), pool.counts, failures, late, used)


def tell_plan(name: str, photos: int, planned: int, views: int, pace: Pace, budget: Budget) -> None:
    """One line: what the time left is planned for."""
    print(
        f"{name}: {planned} of {views} views of {photos} photos, about {pace.seconds(photos, planned):.0f} s of the "
        f"{budget.left():.0f} s left ({MARGIN:.0%} of the limit is kept in reserve)",
        flush=True,
    )


@contextmanager
def decoding_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread per core. At the end nothing waits for them, since one of them may wait for a disk that hangs."""
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def load_batches(
    encoder: Encoder,
    observations: Sequence[Observation],
    failures: list[tuple[Path, str]],
    left: Callable[[], float] = lambda: math.inf,
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Readable photos in order, as (index of the observation of each, (batch, 3, decoded, decoded) uint8).

    Args:
        failures: gets the path of every photo that could not be read, and the cause.
        left: seconds that a batch may take; when it takes longer, as when a disk hangs, there are no more batches.
    """
    photos = [(index, path) for index, observation in enumerate(observations) for path in observation.photos]
    with decoding_threads() as threads:
        first, end = 0, PROBE
        while first < len(photos):
            part = photos[first:end]
            first, end = end, end + encoder.batch_size
            paths, timeout = [path for _, path in part], min(max(0, left()), threading.TIMEOUT_MAX)
            try:
                decoded = decode_all(paths, encoder.preprocessing, threads, timeout)
            except TimeoutError:
                return
            readable = []
            for (owner, path), photo in zip(part, decoded, strict=True):
                if isinstance(photo, str):
                    failures.append((path, photo))
                else:
                    readable.append((owner, photo))
            if readable:
                owners, batch = zip(*readable, strict=True)
                yield owners, stack(batch, encoder)


def stack(photos: Sequence[np.ndarray], encoder: Encoder) -> torch.Tensor:
    """Photos as one tensor, (batch, 3, decoded, decoded) uint8, in memory from which a GPU can fetch them by itself."""
    batch = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    return batch.pin_memory() if encoder.device.type == "cuda" else batch


def ahead(batches: Iterator[T], left: Callable[[], float], depth: int = 2) -> Iterator[T]:
    """The same batches, made in a thread of their own while the ones before are being embedded.

    Args:
        left: seconds that may be waited for the next one; then there are no more, as when a disk hangs.
    """
    waiting: Queue = Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            with suppress(Full):
                waiting.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    break
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))
        finally:
            batches.close()

    threading.Thread(target=work, name="ahead", daemon=True).start()
    try:
        while True:
            try:
                batch, error = waiting.get(timeout=min(max(0, left()), threading.TIMEOUT_MAX))
            except Empty:
                return
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield batch
    finally:
        stopped.set()

"""The wall-clock budget: measure what a photo costs, and give every photo as many views as the time allows.

A tenth of the time limit is kept in reserve. The first photos are timed. From then on every photo gets as many of the
views as fit into the remaining time, more or fewer as the machine becomes faster or slower; the last views of the list
are dropped first. Photos for which there is no time keep the fallback prediction, and the last line of the log says
how many observations that concerns.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

MARGIN = 0.1  # fraction of the limit that is reserved for scoring, for writing, and for what Kaggle does afterwards


@dataclass(frozen=True)
class Budget:
    """A time limit that counts from the start of the process.

    Attributes:
        limit: seconds that the kernel may take in all.
        started: the clock's reading when the process started; the imports count too.
        clock: seconds, monotonic.
    """

    limit: float
    started: float
    clock: Callable[[], float] = time.monotonic

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def remaining(self) -> float:
        """Seconds until embedding must stop, the reserve left out."""
        return self.limit * (1 - MARGIN) - self.elapsed()


UNLIMITED = Budget(limit=float("inf"), started=0.0)


class Pace:
    """What a photo has cost in the latest batches, and so how many views the others can have.

    A photo costs its decoding and its forward passes. Beside a GPU the larger of the two counts. On a CPU their sum
    does, but the next batch is decoded while one is embedded, and each takes longer than it would alone: the sum is
    scaled to the time from one batch to the next. All are exponential moving averages, so that a slower disk or a busy
    machine shows within a few batches.

    Args:
        shares_cores: whether decoding takes the cores of the forward passes.
    """

    MEMORY = 0.7  # weight of the average so far against one new batch

    def __init__(self, shares_cores: bool) -> None:
        self.shares_cores = shares_cores
        self.decode = self.per_view = 0.0  # seconds per photo, 0 before the first
        self.scale = 1.0  # of their sum; less where they overlap

    def record_decode(self, photos: int, waited: float, seconds: float) -> None:
        """Take the decoding of a batch into the average.

        Args:
            waited: seconds until its photos were there.
            seconds: since the photos of the batch before were there. Where decoding was waited for beside a GPU, these
                are the time that it took; no wait says that it is at least so fast.
        """
        decode = waited / photos
        if not self.shares_cores:
            decode = seconds / photos if waited > 0.05 * seconds else min(self.decode, seconds / photos)
        self.decode = self._average(self.decode, decode)

    def record_forward(self, photos: int, views: int, seconds: float) -> None:
        """Take the forward passes of a batch into the average, all views together."""
        self.per_view = self._average(self.per_view, seconds / photos / views)

    def record_interval(self, photos: int, views: int, seconds: float) -> None:
        """Take the time from one batch to the next, of the same size, into the average."""
        self.scale = self._average(self.scale, seconds / photos / (self.decode + views * self.per_view))

    def _average(self, before: float, new: float) -> float:
        return self.MEMORY * before + (1 - self.MEMORY) * new if before else new

    def seconds(self, photos: int, views: int) -> float:
        """How long so many photos will take with so many views each."""
        forward = views * self.per_view
        return photos * (self.scale * (self.decode + forward) if self.shares_cores else max(self.decode, forward))

    def affordable_views(self, photos: int, views: int, seconds: float) -> int:
        """The largest number of views, up to `views`, that so many photos can have in the given time; at least 1."""
        return max((count for count in range(1, views + 1) if self.seconds(photos, count) <= seconds), default=1)

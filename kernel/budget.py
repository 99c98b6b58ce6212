"""The wall-clock budget: measure what a photo costs, plan how many views all of them can have, and keep to it.

A tenth of the time limit stays in reserve. The first photos are timed; from then on every photo gets as many of the
bank's views as fit into the time left, more or fewer as the machine gets faster or slower. The views are dropped from
the end of the list, the least useful ones first. Photos for which there is no time keep the fallback prediction, and
the last line of the log says how many.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

MARGIN = 0.1  # of the limit, kept for matching, for writing, and for what Kaggle does after the script's last line


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

    def left(self) -> float:
        """Seconds until photos must stop."""
        return self.limit * (1 - MARGIN) - self.elapsed()


class Pace:
    """What photos have cost lately, and so how many views the rest can have.

    A photo costs its decode and its views; whichever takes longer, where one runs beside the other. Both are running
    means that forget: a disk or a neighbour that slows down shows within a few batches.

    Args:
        overlaps: whether decoding runs beside the forward passes.
    """

    MEMORY = 0.7  # weight of the past against one new batch

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.decode = self.per_view = 0.0  # seconds per photo
        self.batches = 0

    def record(self, photos: int, views: int, waited: float, forward: float) -> None:
        """Note a batch.

        Args:
            waited: seconds until its photos were there. Where decoding overlaps, these are what the forward passes did
                not hide, and none at all says only that decoding is no slower than they are.
            forward: seconds of its forward passes, all views together.
        """
        decode = waited / photos
        if self.overlaps and self.batches:
            decode = (waited + forward) / photos if waited > 0.05 * forward else min(self.decode, forward / photos)
        memory = self.MEMORY if self.batches else 0.0
        self.decode = memory * self.decode + (1 - memory) * decode
        self.per_view = memory * self.per_view + (1 - memory) * forward / photos / views
        self.batches += 1

    def seconds(self, photos: int, views: int) -> float:
        """How long photos will take, each in so many views."""
        return photos * (max if self.overlaps else sum)((self.decode, views * self.per_view))

    def affordable(self, photos: int, views: int, left: float) -> int:
        """The largest number of views, up to `views`, that so many photos can have in `left` seconds; at least 1."""
        return max((count for count in range(1, views + 1) if self.seconds(photos, count) <= left), default=1)

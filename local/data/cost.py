"""Say what embedding costs: the number of forward passes before it starts, and the time once a batch is measured."""

import time
from collections.abc import Callable, Sequence

import torch

from kernel.forward import Encoder
from local.base.console import counted, say

SLOW = 8.0  # seconds of a photo in all its views from which the first batch is not awaited to estimate the time
STEADY = 5.0  # seconds on a CPU after which the start-up of the first batch hardly counts
LONG = 3 * 3600  # seconds on a CPU from which the estimate also says what to do


class Cost:
    """Prints two lines: what there is to embed, and how long it will take on this device.

    Args:
        photos: how many are embedded.
        views: of each of them.
        rounds: how often they are embedded, once for each resize mode.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        photos: int,
        views: Sequence[str],
        encoder: Encoder,
        rounds: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.photos, self.views, self.encoder, self.rounds, self.clock = photos, views, encoder, rounds, clock
        self.device = encoder.device.type
        self.done, self.first, self.is_estimated = 0, (0, 0.0), False

    def start(self) -> None:
        """Print how much there is to embed; and on a CPU, where a batch would take minutes, the estimate too."""
        size = self.encoder.preprocessing.size
        times = "" if self.rounds == 1 else f", in {self.rounds} resize modes"
        say(
            f"to embed: {counted(self.photos, 'photo')} in {counted(len(self.views), 'view')} of {size} pixels"
            f"{times}: {counted(self.photos * len(self.views) * self.rounds, 'forward pass')} on {self.device}"
        )
        if self.device == "cpu" and (seconds := self.time_one_photo()) >= SLOW:
            self.estimate(seconds)
        self.first = (0, self.clock())

    def time_one_photo(self) -> float:
        """Seconds that one photo takes in all its views."""
        size, module = self.encoder.preprocessing.size, self.encoder.module
        start = self.clock()
        with torch.inference_mode():
            self.encoder.forward(torch.zeros(1, 3, size, size), module)
        return (self.clock() - start) * len(self.views)

    def advance(self, photos: int) -> None:
        """Another batch is done. Prints the estimate, if there is none yet and more batches follow."""
        self.done += photos
        if self.is_estimated or self.done >= self.photos * self.rounds:
            return
        now, (before, began) = self.clock(), self.first
        if before == 0 and (self.device != "cpu" or now - began < STEADY):
            self.first = (self.done, now)  # the first batch is slow: it also starts processes, threads and CUDA
            return
        self.estimate((now - began) / (self.done - before))

    def estimate(self, seconds: float) -> None:
        """Print the estimate.

        Args:
            seconds: that a photo takes in all its views.
        """
        self.is_estimated = True
        say(self.describe(seconds))

    def describe(self, seconds: float) -> str:
        """The estimate.

        Args:
            seconds: that a photo takes in all its views.
        """
        total = seconds * self.photos * self.rounds
        text = f"embedding takes about {in_words(total)} on {self.device}"
        if self.device != "cpu" or total < LONG:
            return text
        fewer = " or fewer views (--set views=plain,hflip)" if len(self.views) > 2 else ""
        smaller = "a smaller encoder (such as --encoder timm:mobilenetv2_100)"
        return f"{text}: faster are a GPU{',' if fewer else ' or'} {smaller}{fewer}"


def in_words(seconds: float) -> str:
    """A time in its largest fitting unit: `40 seconds`, `12 minutes`, `5 hours` or `2 days`."""
    for unit, length, limit in (("second", 1, 90), ("minute", 60, 5400), ("hour", 3600, 36 * 3600)):
        if seconds < limit:
            return counted(max(1, round(seconds / length)), unit)
    return counted(round(seconds / 86400), "day")

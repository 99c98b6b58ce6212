"""Progress for a log: how far a long step is, how fast, and how long it still takes."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress


class Progress:
    """Prints a line at regular intervals while photos are embedded, from a thread, so that a slow batch is not silent.

    with Progress("bioclip", 17_840) as progress:
        progress.update(1_240, "3 views")

    The line reads `bioclip: 1,240 of 17,840 photos, 3 views, 93.1 photos/s, 178 s left`.

    Args:
        name: what is embedded, or by what; empty prints nothing.
        total: photos in all.
        clock: seconds, monotonic.
    """

    def __init__(self, name: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.total, self.clock = name, total, clock
        self.done, self.note = 0, ""
        self.started = self.updated = clock()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self.print_lines, args=(self._finished.wait,), daemon=True)

    def __enter__(self) -> "Progress":
        if self.name:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        if self.name:
            self._thread.join()

    def update(self, done: int, note: str = "") -> None:
        """So many photos are done; the note goes into the line."""
        self.done, self.note, self.updated = done, note, self.clock()

    def line(self) -> str:
        """The line for now."""
        now, seconds = self.clock(), self.updated - self.started  # the speed is that of the batches that are complete
        parts = [f"{self.done:,} of {self.total:,} photos"] + ([self.note] if self.note else [])
        if self.done and seconds > 0:
            speed = self.done / seconds
            left = max(0, (self.total - self.done) / speed - (now - self.updated))
            parts += [f"{speed:.{1 if speed >= 1 else 2}f} photos/s", f"{left:,.0f} s left"]
        else:
            parts += [f"{now - self.started:,.0f} s so far"]
        return f"{self.name}: {', '.join(parts)}"

    def print_lines(self, wait: Callable[[float], bool]) -> None:
        """Print a line after each interval.

        Args:
            wait: waits so many seconds; returns True as soon as the step has ended.
        """
        with suppress(OSError, ValueError):  # of a log that was closed
            while not wait(self.interval()):
                print(self.line(), flush=True)

    def interval(self) -> float:
        """Seconds until the next line: ten at first; a minute later on, so that nine hours do not flood the log."""
        return 10 if self.clock() - self.started < 600 else 60

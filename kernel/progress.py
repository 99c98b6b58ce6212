"""How far a long step is, how fast, and how long it still takes."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

LINE_SECONDS = 10.0  # between two lines of progress


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: `1 photo`, `2 photos`, `1,204 classes`.

    Args:
        plural: if it is not the noun with -s or -es.
    """
    several = plural or noun + ("es" if noun.endswith(("s", "x", "sh", "tch")) else "s")
    return f"{count:,} {noun if count == 1 else several}"


def clock_time(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A bar on a terminal; elsewhere a line every `LINE_SECONDS`, from a thread, so that a slow step is not silent.

    with Progress("embedding", total=240, unit="photo") as progress:
        progress.advance(16, "3 of 4 views")

    The line reads `embedding: 16 of 240 photos (7%), 3 of 4 views, 3.2 per second, 1:10 left`.

    Args:
        what: the step; empty prints nothing.
        total: how many units there are; None where nobody knows.
        unit: what is counted, in the singular.
        clock: seconds, for tests.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "step", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.done, self.note = 0, ""
        self.began = self.advanced = clock()
        self._bar = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self.report, args=(self._ended.wait,), daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        self.began = self.clock()
        if self.what and sys.stdout.isatty():
            from tqdm import tqdm  # no Kaggle kernel has a terminal

            self._bar = tqdm(desc=self.what, total=self.total, unit=self.unit, leave=False, file=sys.stdout)
        elif self.what:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.what:
            self._ended.set()
            self._thread.join()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Another `count` units are done; the line shows the latest note."""
        self.done, self.note, self.advanced = self.done + count, note, self.clock()
        if self._bar is not None:
            self._bar.update(count)

    def report(self, wait: Callable[[float], bool]) -> None:
        """Print a line after every `LINE_SECONDS`.

        Args:
            wait: waits so many seconds; returns True as soon as the step has ended.
        """
        # A reader that has gone, or a closed stream, is for the main thread to notice when it prints.
        with suppress(OSError, ValueError):
            while not wait(LINE_SECONDS):
                print(self.line(), flush=True)

    def line(self) -> str:
        """How far, how fast and how long still, as far as each is known."""
        now = self.clock()
        so_far = f"{clock_time(now - self.began)} so far"
        if not self.done:
            start = f"0 of {counted(self.total, self.unit)}, " if self.total else ""
            return f"{self.what}: {start}{so_far}"
        each = max(self.advanced - self.began, 1e-9) / self.done  # of complete units: the next may take long
        far, left = counted(self.done, self.unit), so_far
        if self.total:
            far = f"{self.done:,} of {counted(self.total, self.unit)} ({self.done / self.total:.0%})"
            left = f"{clock_time(max(0, (self.total - self.done) * each - (now - self.advanced)))} left"
        speed = f"{1 / each:,.1f} per second" if each < 1 else f"{each:,.1f} s each"
        return f"{self.what}: {', '.join(filter(None, (far, self.note, speed, left)))}"

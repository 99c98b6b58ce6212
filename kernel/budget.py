"""The wall-clock budget: how much time is left for photos before the submission must be on disk."""

import time
from collections.abc import Callable


class Budget:
    """A time limit that counts from the start of the process.

    Args:
        limit: seconds that the kernel may take in all.
        started: the clock's reading when the process started; the imports count too.
        clock: seconds, monotonic.
    """

    # Enough to match and write, and for Kaggle's own work after the script's last line.
    MARGIN = 0.05

    def __init__(self, limit: float, started: float, clock: Callable[[], float] = time.monotonic):
        self.limit, self.started, self.clock = limit, started, clock

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def is_spent(self) -> bool:
        """Whether photos must stop now, for the submission to be written in time."""
        return self.elapsed() >= self.limit * (1 - self.MARGIN)

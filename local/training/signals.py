"""Ctrl-C and SIGTERM during training: the optimizer step is finished and a checkpoint is written first."""

import contextlib
import signal
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """The user or the system asked to stop; a checkpoint holds what was trained."""


class StopSignals:
    """Within it, Ctrl-C and SIGTERM raise `Stopped`: immediately, or, while `deferred`, at the next check.

    Attributes:
        pending: whether a signal has come while deferred.
    """

    def __init__(self) -> None:
        self.pending, self.is_deferred = False, False

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        """Note the first signal while deferred; raise on a second one, and whenever not deferred."""
        if not self.is_deferred or self.pending:
            raise Stopped("stopped: continue with --resume")
        self.pending = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a signal only sets `pending`."""
        self.is_deferred = True
        try:
            yield
        except RuntimeError as error:
            # A signal that is sent to every process, as SLURM does, also ends the workers that load photos.
            if not (self.pending and "DataLoader worker" in str(error)):
                raise
            raise Stopped("stopped: continue with --resume") from error
        self.is_deferred = False

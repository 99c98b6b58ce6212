"""Ctrl-C and SIGTERM during training: the optimizer step is finished and a checkpoint is written first."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from kernel.inputs import InputError
from local.training.checks import has_checkpoint


class Stopped(KeyboardInterrupt):
    """The user or the system asked to stop; a checkpoint holds what was trained."""

    def __init__(self, where: str = ""):
        super().__init__(f"stopped{f' in {where}' if where else ''}: continue with --resume")


class StopSignals:
    """Within it, Ctrl-C and SIGTERM only set `pending`, and raise `Stopped` at its end if nothing has done so before.

    Within `immediate`, and on a second signal, they raise `Stopped` immediately.

    Attributes:
        pending: whether a signal has come.
    """

    def __init__(self) -> None:
        self.pending, self.is_immediate = False, False

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.pending and kind is None:
            raise Stopped

    def handle(self, number: int, frame: object) -> None:
        """Note a signal, or raise `Stopped`."""
        if self.is_immediate or self.pending:
            raise Stopped
        self.pending = True

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within it, a signal raises `Stopped` immediately, also one that has come before."""
        self.is_immediate = True
        try:
            if self.pending:
                raise Stopped
            yield
        finally:
            self.is_immediate = False

    @contextlib.contextmanager
    def lost_workers_named(self, folder: Path) -> Iterator[None]:
        """Turn the loss of a photo worker into one line; the checkpoints in `folder` are kept.

        A signal that was sent to every process, as SLURM does, ends the workers too: that raises `Stopped`. Otherwise
        the system has killed one, as it does when memory is out. An error within a worker is raised as it is.
        """
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            if self.pending:
                raise Stopped from error
            kept = f"{folder} keeps the last checkpoint; " if has_checkpoint(folder) else ""
            raise InputError(
                "a process that loads photos was killed, as the system does when it is out of memory: free memory, or "
                f"allow fewer cores, each of which has such a process (taskset -c 0,1 python ...); {kept}continue with "
                "--resume"
            ) from error

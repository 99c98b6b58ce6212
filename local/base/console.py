"""What all commands share: flags, output, one-line errors for mistakes of the user, progress of long work."""

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from functools import cache
from typing import TypeVar

from tqdm import tqdm

from kernel.inputs import InputError, escape_unprintable

T = TypeVar("T")
LINE_SECONDS = 10.0  # between two lines of progress
CLOSED = 141  # the exit code when the reader of the output has closed it: 128 + SIGPIPE, as in a shell


def command_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a command's flags. They cannot be abbreviated: `--sub` must not cost a submission.

    Args:
        description: the command's docstring.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


def run(main: Callable[[], None]) -> None:
    """Run a command. An InputError is one line on stderr and exit code 2. Any other exception is a bug: a traceback.

    Characters that the console cannot print are escaped. If the reader closes the output, as `head` does, the command
    ends without a message.
    """
    escape_unprintable(sys.stdout, sys.stderr)
    try:
        main()
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()


def report_error(error: BaseException) -> int:
    """Print the exception that ended a command; returns the exit code."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def say(line: str) -> None:
    """Print a line, without buffering even if the output is a file."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        discard_output()
        sys.exit(CLOSED)


def discard_output() -> None:
    """Discard all further output. Otherwise the rest of the buffer would fail again when Python exits."""
    with suppress(OSError, ValueError):  # a stream without a file descriptor has no such buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: `1 photo`, `2 photos`, `1,204 classes`.

    Args:
        noun: singular.
        plural: if it is not the noun with -s or -es.
    """
    several = plural or noun + ("es" if noun.endswith(("s", "x", "sh", "tch")) else "s")
    return f"{count:,} {noun if count == 1 else several}"


@cache
def say_once(line: str) -> None:
    """Print a line the first time only."""
    say(line)


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """The lines of a table with a header; all rows have the same keys."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


class Progress:
    """How far a long step is: a bar on a terminal; elsewhere a line every `LINE_SECONDS`, even when nothing advances.

    with Progress("embedding", total=240, unit="photo") as bar:
        bar.advance(16)

    The line reads `embedding: 16 of 240 photos (7%), 3.2 per second, 1:10 left`.

    Args:
        what: the step, as the line begins.
        total: how many units there are; None where nobody knows.
        unit: what is counted, in the singular.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "step",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.done, self.began, self.advanced = 0, clock(), 0.0
        self._bar: tqdm | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self.report, args=(self._ended.wait,), daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        self.began = self.clock()
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self.what, total=self.total, unit=self.unit, leave=False)
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.close()
        else:
            self._ended.set()
            self._thread.join()

    def advance(self, count: int = 1) -> None:
        """Another `count` units are done."""
        self.done, self.advanced = self.done + count, self.clock()
        if self._bar:
            self._bar.update(count)

    def report(self, wait: Callable[[float], bool]) -> None:
        """Print a line after every `LINE_SECONDS`.

        Args:
            wait: for so many seconds; true as soon as the step has ended.
        """
        # A reader that has gone, or a closed stream, is for the main thread to notice when it prints.
        with suppress(OSError, ValueError):
            while not wait(LINE_SECONDS):
                print(self.line(), flush=True)

    def line(self) -> str:
        """How far, how fast and how long still, as far as each is known."""
        seconds = self.clock() - self.began
        if not self.done and not self.total:
            return f"{self.what}: {clock_time(seconds)} so far"
        if not self.done:
            return f"{self.what}: 0 of {counted(self.total, self.unit)}, {clock_time(seconds)} so far"
        each = max(self.advanced - self.began, 1e-9) / self.done  # of complete units: the next may take long
        speed = f"{1 / each:,.1f} per second" if each < 1 else f"{each:,.1f} s each"
        if not self.total:
            return f"{self.what}: {counted(self.done, self.unit)}, {speed}, {clock_time(seconds)} so far"
        left = clock_time(max(0, (self.total - self.done) * each - (self.clock() - self.advanced)))
        far = f"{self.done:,} of {counted(self.total, self.unit)} ({self.done / self.total:.0%})"
        return f"{self.what}: {far}, {speed}, {left} left"


def progress(items: Iterable[T], what: str, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """The same items, with `Progress` over them.

    Args:
        total: how many there are, where `len` cannot tell.
    """
    items, total = iter(items), len(items) if total is None and isinstance(items, Sized) else total
    # After `iter`, which may fork the workers of a DataLoader: no thread of ours may be running then.
    with Progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def clock_time(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

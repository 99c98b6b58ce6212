"""What all commands share: flags, output, one-line errors for mistakes of the user, progress of long work."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from functools import cache
from typing import TypeVar

from kernel.inputs import InputError, escape_control, escape_unprintable, prepare_torch
from kernel.progress import Progress
from kernel.progress import counted as counted

T = TypeVar("T")
# Exit codes as in a shell, 128 + the signal: SIGINT, SIGTERM, and SIGPIPE when the reader of the output has closed it.
INTERRUPTED, TERMINATED, CLOSED = 130, 143, 141


def command_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a command's flags. They cannot be abbreviated: `--sub` must not cost a submission."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


def run(main: Callable[[], None]) -> None:
    """Run a command. An InputError is one line on stderr and exit code 2, and so is what the system says of a path that
    it cannot read or write. Any other exception is a bug: a traceback.

    Characters that the console cannot print are escaped. If the reader closes the output, as `head` does, the command
    ends without a message.
    """
    escape_unprintable(sys.stdout, sys.stderr)
    prepare_torch()
    try:
        with sigterm_raises():
            main()
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(report_error(error))
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()


class Terminated(KeyboardInterrupt):
    """The system asked the command to end."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within it, SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt, so that temporary files go."""
    owner = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker must end immediately
            os._exit(TERMINATED)
        raise Terminated("terminated")

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def report_error(error: BaseException) -> int:
    """Print the exception that ended a command; returns the exit code."""
    if isinstance(error, InputError):
        print(f"error: {escape_control(error)}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        path = escape_control(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename)
        print(f"error: {path}: {error.strerror}: check the path, its permissions and the disk", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
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


@cache
def say_once(line: str) -> None:
    """Print a line the first time only."""
    say(line)


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """The lines of a table with a header; all rows have the same keys."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


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

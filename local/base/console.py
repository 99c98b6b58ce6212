"""What every command does at its border: errors of the user become one line, and long work shows progress."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache

from tqdm import tqdm

from kernel.inputs import InputError, escape_unprintable

CLOSED = 141  # the exit code where the reader of the output went away: 128 + SIGPIPE, as in a shell


def command_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a command's flags, which cannot be abbreviated: `--sub` must not cost a submission.

    Args:
        description: the command's docstring.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


def run(main: Callable[[], None]) -> None:
    """Run a command. An InputError is one line on stderr and exit code 2; anything else is a defect and a traceback.

    A console that lacks a character shows its escape. A reader that closes the output, such as `head`, ends the command
    without a word.
    """
    escape_unprintable(sys.stdout, sys.stderr)
    try:
        main()
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(tell(error))
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()


def tell(error: BaseException) -> int:
    """Print what ended a command; returns its exit code."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def say(line: str) -> None:
    """A line of the log, at once also when the output is a file."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        discard_output()
        sys.exit(CLOSED)


def discard_output() -> None:
    """Print to nowhere from now on: what is left in the buffer would fail again when Python ends."""
    with suppress(OSError, ValueError):  # a stream without a file descriptor has nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: `1 photo`, `2 photos`, `1,204 classes`.

    Args:
        noun: of one.
        plural: of several, where it is not the noun with -s or -es.
    """
    several = plural or noun + ("es" if noun.endswith(("s", "x", "sh", "tch")) else "s")
    return f"{count:,} {noun if count == 1 else several}"


@cache
def say_once(line: str) -> None:
    """A line of the log that is said the first time only, however often it is true."""
    say(line)


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """Rows of equal keys as the lines of a table, under a header."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """A progress bar on a terminal; nothing elsewhere, where the lines of the log tell enough."""
    return tqdm(items, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())

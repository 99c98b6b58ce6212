"""What every command does at its border: errors of the user become one line, and long work shows progress."""

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from tqdm import tqdm

from kernel.mounts import InputError


def run(main: Callable[[], None]) -> None:
    """Run a command. An InputError is one line on stderr and exit code 2; anything else is a defect and a traceback."""
    try:
        main()
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(tell(error))


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
    print(line, flush=True)


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

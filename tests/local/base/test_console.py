"""What all commands share: flags, output, messages.

python -m pytest tests/local/base/test_console.py
"""

import argparse
import importlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernel.inputs import InputError, shorten
from local.base import console
from local.base.console import CLOSED, LINE_SECONDS, Progress, clock_time, counted, progress, run, say
from tests.conftest import ROOT, command

COMMANDS = [
    "bundle",
    "kernel.start",
    *(f"local.{path.stem}" for path in sorted((ROOT / "local").glob("*.py")) if "run(main)" in path.read_text("utf-8")),
]


class Parsed(Exception):
    """Ends a command once its flags are known."""


def parsers_of(name: str, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parser of a command, and those of its subcommands."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as stopped:
        (module.parse_options if hasattr(module, "parse_options") else module.main)()
    parser = stopped.value.args[0]
    subparsers = [action.choices.values() for action in parser._actions if isinstance(action.choices, dict)]
    return [parser, *(one for choices in subparsers for one in choices)]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_of_a_command_can_be_abbreviated(name, monkeypatch):
    for parser in parsers_of(name, monkeypatch):
        assert not parser.allow_abbrev, parser.prog


def test_all_commands_are_tested():
    assert {"bundle", "kernel.start", "local.publish", "local.benchmark"} <= set(COMMANDS)
    assert len(COMMANDS) >= 11


def test_an_abbreviated_submit_is_a_mistake_and_submits_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish.py", "--sub"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("local.publish").main()
    assert ended.value.code == 2
    assert "unrecognized arguments: --sub" in capsys.readouterr().err


def test_a_character_that_the_console_cannot_print_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run(lambda: say("±0.065 … Tromsø \udcff"))
    assert stream.buffer.getvalue() == b"\\xb10.065 \\u2026 Troms\\xf8 \\udcff\n"


def test_the_kernel_escapes_what_the_console_cannot_print_too(tmp_path):
    (tmp_path / "Pilzblüte").mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = command("-m", "kernel", "--input", tmp_path, "--working", tmp_path / "out", env=environment)
    assert result.returncode == 2, result.stderr
    assert "Pilzbl\\xfcte" in result.stdout
    assert result.stderr.startswith("error: no weights under")


@contextmanager
def closed_output(monkeypatch) -> Iterator[None]:
    """An output whose reader has closed it, as `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


def test_a_closed_output_ends_a_command_without_a_message(monkeypatch, capfd):
    worked = []

    def main() -> None:
        say("the first line")
        worked.append("after it")

    with closed_output(monkeypatch), pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == CLOSED
    assert not worked
    assert capfd.readouterr().err == ""


def test_the_rest_of_the_buffer_is_lost_without_a_message_too(monkeypatch, capfd):
    with closed_output(monkeypatch):
        run(lambda: print("a line that waits in the buffer"))
    assert capfd.readouterr().err == ""


def test_another_broken_pipe_is_a_bug_and_is_shown():
    def main() -> None:
        raise BrokenPipeError("a worker's pipe")

    with pytest.raises(BrokenPipeError, match="a worker's pipe"):
        run(main)


@pytest.mark.parametrize(
    ("words", "width", "short"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two …"),
        ("one two three", 9, "one two …"),
        ("one two three", 8, "one …"),
        (" one\n  two\tthree ", 20, "one two three"),
        ("unabbreviated", 5, "unabbreviated …"),
        ("/a/path/that/must/stay whole", 10, "/a/path/that/must/stay …"),
        (InputError("one two three"), 9, "one two …"),
        (ValueError(), 9, "ValueError"),
        ("", 9, ""),
        (["a", "b"], 20, "['a', 'b']"),
    ],
)
def test_a_line_that_is_too_long_ends_after_a_whole_word(words, width, short):
    assert shorten(words, width) == short


def test_nothing_else_cuts_a_message():
    for path in [*Path(ROOT, "kernel").rglob("*.py"), *Path(ROOT, "local").rglob("*.py"), ROOT / "bundle.py"]:
        assert ".split())[:" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("count", "noun", "says"),
    [
        (0, "photo", "0 photos"),
        (1, "photo", "1 photo"),
        (2, "photo", "2 photos"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (2, "process", "2 processes"),
        (5, "epoch", "5 epochs"),
        (2, "batch", "2 batches"),
        (12015, "observation", "12,015 observations"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(count, noun, says):
    assert counted(count, noun) == says


def test_an_irregular_plural_can_be_given():
    assert counted(1, "query", "queries") == "1 query"
    assert counted(2, "query", "queries") == "2 queries"


class Clock:
    """A clock that only `wait` moves; after the last `work` the step has ended."""

    def __init__(self, *work):
        self.now, self.work = 100.0, list(work)

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        if not self.work:
            return True
        self.work.pop(0)()
        return False


def test_a_step_without_a_terminal_says_how_far_how_fast_and_how_long_still(capsys):
    clock = Clock(lambda: None, lambda: bar.advance(50), lambda: bar.advance(10))
    bar = Progress("embedding", 240, "photo", clock)
    bar.report(clock.wait)
    assert clock.now == 100 + 4 * LINE_SECONDS
    assert capsys.readouterr().out.splitlines() == [
        "embedding: 0 of 240 photos, 0:10 so far",
        "embedding: 50 of 240 photos (21%), 2.5 per second, 1:16 left",
        "embedding: 60 of 240 photos (25%), 2.0 per second, 1:30 left",
    ]


def test_while_a_unit_takes_long_the_time_left_goes_down_and_the_speed_stays(capsys):
    clock = Clock(lambda: bar.advance(50), lambda: None, lambda: None)
    bar = Progress("embedding", 100, "photo", clock)
    bar.report(clock.wait)
    assert capsys.readouterr().out.splitlines() == [
        f"embedding: 50 of 100 photos (50%), 5.0 per second, 0:{left} left" for left in ("10", "00", "00")
    ]


def test_a_slow_step_gives_its_seconds_per_unit_and_one_of_unknown_length_the_time_so_far(capsys):
    clock = Clock(lambda: None, lambda: bar.advance(1), lambda: None)
    bar = Progress("selecting the bank", unit="candidate", clock=clock)
    bar.report(clock.wait)
    assert capsys.readouterr().out.splitlines() == [
        "selecting the bank: 0:10 so far",
        "selecting the bank: 1 candidate, 20.0 s each, 0:20 so far",
        "selecting the bank: 1 candidate, 20.0 s each, 0:30 so far",
    ]


def test_a_line_comes_while_one_unit_alone_takes_long_and_none_after_the_end(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.001)
    for _ in progress(["the only one"], "training"):
        time.sleep(0.2)
    assert capsys.readouterr().out.startswith("training: 0 of 1 step, 0:00 so far\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_short_step_prints_nothing(capsys):
    assert list(progress((number for number in range(3)), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_lines_too():
    with pytest.raises(RuntimeError, match="no more"), Progress("working"):
        raise RuntimeError("no more")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


@pytest.mark.parametrize(("seconds", "says"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_a_time_is_written_as_a_clock_shows_it(seconds, says):
    assert clock_time(seconds) == says

"""A long step says how far it is, how fast, and how long it still takes, also while nothing advances."""

import io
import threading
import time

import pytest

from kernel.progress import LINE_SECONDS, Progress, clock_time, counted
from local.base.console import progress


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
    monkeypatch.setattr("kernel.progress.LINE_SECONDS", 0.001)
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


def test_a_line_shows_the_latest_note():
    bar = Progress("bioclip", 17_840, "photo", Clock())
    bar.clock.now += 20
    bar.advance(620, "4 of 4 views")
    bar.advance(620, "3 of 4 views")
    assert bar.line() == "bioclip: 1,240 of 17,840 photos (7%), 3 of 4 views, 62.0 per second, 4:28 left"


def test_a_step_without_a_name_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr("kernel.progress.LINE_SECONDS", 0.001)
    with Progress("", 1) as silent:
        assert not silent._thread.is_alive()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_and_only_where_the_output_goes_to_it(monkeypatch):
    """Of the processes under torchrun, all but the first write to no terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    with Progress("embedding", 4, "photo") as bar, Progress("of unknown length"):
        bar.advance(4)
    assert "embedding: " in terminal.getvalue()
    assert "of unknown length: " in terminal.getvalue()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress("embedding", 4, "photo") as bar:
        bar.advance(4)
    assert terminal.getvalue() == ""


def test_a_closed_log_does_not_end_the_work(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", refuse)
    Progress("tiny", 1).report(lambda seconds: False)

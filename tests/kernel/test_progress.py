"""A log shows how far a long step is, how fast, and how long it still takes, also while nothing advances."""

import itertools

from kernel.progress import Progress


class Clock:
    """Moves when it is set; `wait` moves it, and ends the step at a given time."""

    def __init__(self, end: float = 0.0):
        self.now, self.end = 0.0, end

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self.end


def test_a_line_says_how_far_how_fast_and_how_long_still():
    clock = Clock()
    progress = Progress("bioclip on cuda:0", 17_840, clock)
    clock.now = 12.4
    assert progress.line() == "bioclip on cuda:0: 0 of 17,840 photos, 12 s so far"
    clock.now = 20.0
    progress.update(1_240, "3 of 4 views")
    assert progress.line() == "bioclip on cuda:0: 1,240 of 17,840 photos, 3 of 4 views, 62.0 photos/s, 268 s left"
    clock.now = 50.0  # the next batch takes long: the time left goes down, and the speed is that of complete batches
    assert progress.line() == "bioclip on cuda:0: 1,240 of 17,840 photos, 3 of 4 views, 62.0 photos/s, 238 s left"
    clock.now = 10_000.0
    assert progress.line().endswith(", 0 s left")


def test_a_slow_machine_has_a_speed_too():
    clock = Clock()
    progress = Progress("tiny", 40, clock)
    clock.now = 32.0
    progress.update(8)
    assert progress.line() == "tiny: 8 of 40 photos, 0.25 photos/s, 128 s left"


def test_there_is_a_line_every_ten_seconds_at_first_and_every_minute_after_ten(capsys):
    clock = Clock(end=9 * 3600)
    progress, times = Progress("tiny", 100, clock), []

    def wait(seconds: float) -> bool:
        has_ended = clock.wait(seconds)
        times.append(clock.now)
        return has_ended

    progress.print_lines(wait)
    assert {later - earlier for earlier, later in itertools.pairwise(times) if later <= 600} == {10}
    assert {later - earlier for earlier, later in itertools.pairwise(times) if earlier >= 600} == {60}
    assert len(capsys.readouterr().out.splitlines()) == len(times) - 1 == 60 + (9 * 60 - 10)


def test_a_step_without_a_name_starts_no_thread_and_one_with_a_name_ends_its_own():
    with Progress("", 1) as silent:
        assert not silent._thread.is_alive()
    with Progress("tiny", 1) as named:
        assert named._thread.is_alive()
    assert not named._thread.is_alive()


def test_a_closed_log_does_not_end_the_work(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", refuse)
    Progress("tiny", 1, Clock()).print_lines(lambda seconds: False)

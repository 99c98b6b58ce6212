"""No GPU hour is wasted: nothing is pushed in vain, the log is shown as it comes, and a run that hangs is ended."""

import re

import pytest

from local.base.console import Terminated
from tests.local.publishing.conftest import KERNEL
from tests.local.publishing.loopback import hang_up, http, saying

OTHERS = {"tester/one-kernel": "RUNNING", "tester/two-kernel": "QUEUED"}
FULL = {"error": "Maximum batch GPU session count of 2 reached."}
CRASH = ["embedding: 16 of 18 photos\n", "Traceback (most recent call last):\n", "ValueError: no\n"]


def log_lines(text: str) -> list[str]:
    """The lines of the kernel's log that were printed."""
    return re.findall(r"^  \| (.*)$", text, re.MULTILINE)


# Before a push


def test_the_quota_is_printed_before_a_push(world, capsys):
    world.publish()
    assert "quota: 17.5 of 30 hours of GPU time are left, renewed on 2026-11-28 at 00:00 UTC" in capsys.readouterr().out


def test_nothing_is_pushed_when_the_quota_is_spent(world):
    world.kaggle.hours = 29.9
    message = world.refusal()
    assert "this week's GPU quota is spent: 0.1 of 30 hours" in message
    assert "renewed on 2026-11-28" in message
    assert "--wait" in message
    assert world.kaggle.count("SaveKernel") == 0


def test_nothing_is_pushed_while_two_sessions_run(world):
    world.kaggle.others = dict(OTHERS)
    assert "tester/one-kernel and tester/two-kernel are running" in world.refusal()
    assert world.kaggle.count("SaveKernel") == 0
    world.kaggle.others["tester/two-kernel"] = "COMPLETE"
    world.publish()
    assert world.kaggle.count("SaveKernel") == 1


def test_wait_pushes_when_a_session_ends_and_the_quota_is_renewed(world, capsys):
    def end_one(body: dict) -> None:
        world.kaggle.others["tester/one-kernel"] = "ERROR"

    def renew(body: dict) -> None:
        world.kaggle.hours = 0

    world.kaggle.others, world.kaggle.hours = dict(OTHERS), 30
    world.kaggle.fail("GetAcceleratorQuotaStatistics", saying_nothing, renew, saying_nothing, end_one)
    world.publish(waits=True)
    assert world.kaggle.count("SaveKernel") == 1
    said = capsys.readouterr().out
    assert "waiting for a session: this week's GPU quota is spent" in said
    assert "waiting for a session: tester/one-kernel and tester/two-kernel are running" in said


def saying_nothing(body: dict) -> None:
    """No fault."""


def test_wait_pushes_again_when_kaggle_refuses_a_third_session(world):
    """A session in the editor on the website is in no list."""
    world.kaggle.fail("SaveKernel", saying(**FULL), saying(**FULL))
    world.publish(waits=True)
    assert world.kaggle.count("SaveKernel") == 3
    assert len(world.kaggle.kernels[KERNEL]) == 1


def test_no_run_is_started_for_a_submission_that_is_not_left(world):
    world.kaggle.limits = 0
    assert "no more submissions today" in world.refusal(submits=True)
    assert world.kaggle.count("SaveKernel") == 0


def test_wait_waits_for_a_submission(world):
    def renew(body: dict) -> None:
        world.kaggle.limits = 5

    world.kaggle.limits = 0
    world.kaggle.fail("GetSubmissionLimits", saying_nothing, renew)
    world.publish(submits=True, waits=True)
    assert len(world.kaggle.submitted) == 1


@pytest.mark.parametrize("method", ["GetAcceleratorQuotaStatistics", "ListKernels"])
def test_what_kaggle_does_not_say_of_the_quota_prevents_no_push(world, method, capsys):
    world.kaggle.fail(method, http(403, "Permission denied"))
    world.publish()
    assert "warning: asking for" in capsys.readouterr().out
    assert world.kaggle.count("SaveKernel") == 1


def test_the_session_limit_is_the_budget_and_a_margin(world):
    world.publish()
    [pushed] = world.kaggle.bodies["SaveKernel"]
    assert pushed["sessionTimeoutSeconds"] == 12 * 3600 - 60  # the competition's 12 hours are also Kaggle's maximum


# The push


def test_a_push_that_arrived_although_it_timed_out_is_not_repeated(world, capsys):
    def arrive(body: dict) -> None:
        world.kaggle._SaveKernel(body)
        raise ConnectionAbortedError

    world.kaggle.fail("SaveKernel", arrive)
    world.publish()
    assert world.kaggle.count("SaveKernel") == 1
    assert "it had arrived, as version 1" in capsys.readouterr().out


def test_a_push_that_did_not_arrive_is_repeated(world):
    world.publish()
    world.bundle_again()
    world.kaggle.fail("SaveKernel", hang_up)
    world.publish()
    assert len(world.kaggle.kernels[KERNEL]) == 2


@pytest.mark.parametrize("code", [200, 429, 503])
@pytest.mark.parametrize("method", ["SaveKernel", "GetKernelSessionStatus", "GetDatasetStatus"])
def test_html_in_the_place_of_json_passes(world, method, code):
    world.kaggle.fail(method, *[http(code, "Too many requests", is_html=True)] * 2)
    world.publish()
    assert len(world.kaggle.kernels[KERNEL]) == 1


# While it runs


def test_a_state_that_cannot_be_read_ten_times_does_not_end_the_wait(world, capsys):
    world.kaggle.fail("GetKernelSessionStatus", *[http(503, is_html=True)] * 10)
    world.publish()
    assert "Kaggle does not answer" in capsys.readouterr().out


def test_a_log_that_is_cut_is_continued_and_no_line_is_printed_twice(world, capsys):
    lines = [f"line {number}" for number in range(6)]
    world.kaggle.live = [[*lines[:2], None], [*lines[:1], None], [*lines[:4], None], lines]
    world.kaggle.running = ["RUNNING"] * 4 + ["COMPLETE"]
    world.publish()
    printed = log_lines(capsys.readouterr().out)
    assert [line for line in printed if line.startswith("line")] == lines


def test_the_log_is_read_as_utf8(world, capsys):
    world.kaggle.live = [["Güte – 3 Fotos …"]]
    world.publish()
    assert "Güte – 3 Fotos …" in log_lines(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("embedding: 16 of 18 photos (89%), 3.2 per second, 1:02:10 left", "running, 1:02:10 left of this step"),
        ("encoder: 2 of 3 views of 18 photos, about 754 s of the 32400 s", "running, 12:34 planned"),
    ],
)
def test_the_kernels_own_plan_is_shown_as_the_time_left(world, capsys, line, says):
    world.kaggle.live = [[line]]
    world.publish()
    assert says in capsys.readouterr().out


# When it goes wrong


def test_a_crash_that_stays_running_is_ended(world, capsys):
    world.kaggle.running, world.kaggle.live = ["RUNNING"], [[*CRASH, None]]
    message = world.refusal()
    assert "it ended (ValueError: no), but Kaggle still showed it as running" in message
    assert f"{KERNEL} was deleted" in message
    assert KERNEL not in world.kaggle.kernels
    assert log_lines(capsys.readouterr().out) == [line.strip() for line in CRASH]
    world.kaggle.running, world.kaggle.live = ["RUNNING", "COMPLETE"], []
    world.publish()
    assert len(world.kaggle.kernels[KERNEL]) == 1


def test_a_log_that_ended_while_the_run_goes_on_is_ended_too(world):
    world.kaggle.running, world.kaggle.live = ["RUNNING"], [["killed"]]
    assert "was deleted" in world.refusal()


def test_a_run_that_kaggle_does_not_end_at_its_limit_is_ended(world, monkeypatch):
    monkeypatch.setattr("local.publishing.session.POLL_SECONDS", 3600)
    world.kaggle.running = ["RUNNING"]
    assert "Kaggle did not end it at its limit of 11:59:00" in world.refusal()
    assert KERNEL not in world.kaggle.kernels


def test_a_run_that_somebody_deleted_is_started_again_by_the_next_command(world):
    world.kaggle.fail("GetKernelSessionStatus", lambda body: world.kaggle.kernels.clear())
    assert "Kaggle does not find it (404: no such kernel); the same command starts it again" in world.refusal()
    world.publish()
    assert len(world.kaggle.kernels[KERNEL]) == 1


def test_a_full_disk_is_one_line(world, monkeypatch):
    from kaggle.api.kaggle_api_extended import KaggleApi

    def fill(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KaggleApi, "kernels_output", fill)
    assert "No space left on device: check the disk" in world.refusal()


def test_a_quiet_run_without_a_crash_goes_on(world):
    world.kaggle.running, world.kaggle.live = ["RUNNING"] * 60 + ["COMPLETE"], [["choosing the bank", None]]
    world.publish()
    assert KERNEL in world.kaggle.kernels


def test_a_kernel_with_earlier_versions_is_not_deleted(world):
    world.publish()
    world.bundle_again()
    world.kaggle.running, world.kaggle.live = ["RUNNING"], [[*CRASH, None]]
    assert f"cancel it at https://www.kaggle.com/code/{KERNEL}" in world.refusal()
    assert len(world.kaggle.kernels[KERNEL]) == 2


class Interrupted(list):
    """A clock's list of delays; the first delay of the wait for a run is interrupted."""

    def __init__(self, world, error: type):
        super().__init__()
        self.world, self.error = world, error

    def append(self, seconds: float) -> None:
        super().append(seconds)
        if self.world.kaggle.count("GetKernelSessionStatus"):
            raise self.error


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_ctrl_c_asks_whether_to_end_the_run(world, monkeypatch, capsys, answer):
    world.kaggle.running = ["RUNNING"]
    world.slept = Interrupted(world, KeyboardInterrupt)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    if answer == "y":
        assert "was deleted" in world.refusal()
    else:
        with pytest.raises(KeyboardInterrupt):
            world.publish()
        assert f"{KERNEL} continues on Kaggle" in capsys.readouterr().out
    assert (KERNEL in world.kaggle.kernels) == (answer != "y")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated])
def test_nobody_is_asked_where_nobody_can_answer(world, monkeypatch, error):
    world.kaggle.running = ["RUNNING"]
    world.slept = Interrupted(world, error)
    monkeypatch.setattr("sys.stdin.isatty", lambda: error is Terminated, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    with pytest.raises(error):
        world.publish()
    assert KERNEL in world.kaggle.kernels
    world.slept, world.kaggle.running = [], ["COMPLETE"]
    world.publish()
    assert len(world.kaggle.kernels[KERNEL]) == 1


def test_output_that_comes_in_pages_is_found(world):
    world.kaggle.output = {**{f"{number}.txt": b"x" for number in range(5)}, **world.kaggle.output}
    world.publish()
    assert world.kaggle.count("ListKernelSessionOutput") == 6
    assert (world.build / "kaggle" / "submission.csv").is_file()

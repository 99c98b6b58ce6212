"""A run on Kaggle: start it if the quota permits, and watch it until it ends, its log as it comes."""

import math
import re
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from kernel.inputs import InputError
from kernel.progress import clock_time
from local.base.console import Terminated, say
from local.publishing.client import (
    LIVE,
    MAX_QUEUE,
    WHEN_BUSY,
    Busy,
    GpuQuota,
    Kaggle,
    NotFound,
    Unavailable,
    kernel_page,
)

POLL_SECONDS = 30
BUSY_SECONDS = 300  # between two looks whether a session can start
MAX_SESSIONS = 2  # that Kaggle runs at once for a user, on GPUs
MAX_WAIT = 8 * 24 * 3600  # seconds to wait for a session, or for next week's quota
MIN_QUOTA = 900.0  # seconds of GPU time with less of which no run is worth starting
STUCK_SECONDS = 600  # without a line after a crash, or beyond the session's limit: Kaggle will not end it
MISSING_SECONDS = 600  # after which a run that Kaggle does not list is gone
CRASH = re.compile(r"^(Traceback \(most recent call last\)|error: )")
TAIL = 60  # of the last lines, in which a crash is looked for
LEFT = re.compile(r"([0-9]+(?::[0-9]{2}){1,2}) left")  # at the end of a line of progress
PLAN = re.compile(r"about ([0-9.]+) s of the")  # of the kernel's plan, before the first line of progress
LAST_LINES = 20  # of a run that ended before its log could be read
STUCK, STOPPED = "STUCK", "STOPPED"  # ends that Kaggle does not know

T = TypeVar("T")


class RunEnd(NamedTuple):
    """How a run ended: Kaggle's word for it, or STUCK or STOPPED; and the reason if it failed."""

    state: str
    reason: str


def start_session(kaggle: Kaggle, waits: bool, push: Callable[[GpuQuota | None], T]) -> T:
    """Push when there is quota and a session can start.

    Args:
        waits: wait until then, instead of raising an error.
        push: gets the quota, if it is known.

    Returns:
        What `push` returns.

    Raises:
        Busy: no session can start now.
    """

    def attempt() -> tuple[T | None, str]:
        quota, obstacle = find_obstacle(kaggle)
        if obstacle:
            raise Busy(f"{obstacle}; {WHEN_BUSY}")
        return push(quota), "pushed"

    if not waits:
        return attempt()[0]

    def poll() -> tuple[T | None, str]:
        try:
            return attempt()
        except Busy as busy:
            return None, str(busy).partition(f"; {WHEN_BUSY}")[0]

    return kaggle.wait("waiting for a session", poll, BUSY_SECONDS, MAX_WAIT)


def find_obstacle(kaggle: Kaggle) -> tuple[GpuQuota | None, str]:
    """This week's GPU quota, if it is known; and why no session can start, or an empty string.

    Kaggle itself refuses a session that it cannot start. So if it does not answer these questions, nothing is lost.
    """
    quota, running = None, []
    try:
        quota = kaggle.gpu_quota()
        running = kaggle.running_kernels()
    except InputError as error:
        say(f"warning: {error}; pushing without a look at the quota and the running sessions")
    if quota and quota.left < MIN_QUOTA:
        return quota, f"this week's GPU quota is spent: {quota}"
    if len(running) >= MAX_SESSIONS:
        return quota, f"{' and '.join(running)} are running, and Kaggle runs {MAX_SESSIONS} sessions at once"
    if quota:
        say(f"quota: {quota}")
    return quota, ""


@dataclass
class Watch:
    """Follows one run until it ends.

    Attributes:
        kernel: owner/slug.
        limit: seconds that the session may take.
        can_delete: whether the kernel has nothing but this run, so that it may be deleted to end the run.
        again: what to do to wait for it again.
        lines: of the log, as far as it was read.
    """

    kaggle: Kaggle
    kernel: str
    version: int
    limit: float
    can_delete: bool
    again: str = "run the same command again"
    lines: list[str] = field(default_factory=list)
    pieces: int = 0  # of the log
    shown: int = 0  # lines that were printed
    is_log_complete: bool = False
    last_line_at: float = 0.0
    started: float | None = None

    @property
    def reference(self) -> str:
        """owner/slug/version"""
        return f"{self.kernel}/{self.version}"

    def wait(self) -> RunEnd:
        """Print the log as it comes, until the run ends.

        A crashed run that Kaggle still shows as running is ended: it would be billed for hours. After Ctrl-C the user
        is asked whether to end the run.

        Raises:
            InputError: the run does not exist any more, or does not start.
        """
        self.last_line_at = asked = self.kaggle.clock.now()

        def poll() -> tuple[RunEnd | None, str]:
            nonlocal asked
            now = self.kaggle.clock.now()
            try:
                state, reason = self.kaggle.kernel_status(self.reference, attempts=1)
            except Unavailable:
                return None, "Kaggle does not answer"
            except NotFound:
                if now - asked < MISSING_SECONDS:
                    return None, "not listed yet"
                raise
            asked = now
            if state not in (*LIVE, "NEW_SCRIPT"):
                self.read_log()
                self.show(self.lines[self.shown :][-LAST_LINES:])
                return RunEnd(state, reason), state.lower()
            if state == "RUNNING":
                self.read_log(self.show)
                self.started = self.started or now
                if problem := self.find_problem():
                    return RunEnd(STUCK, f"{problem}; {self.end()}"), "stuck"
            return None, state.lower() + self.time_left()

        what = f"{self.kernel}, version {self.version}"
        try:
            return self.kaggle.wait(what, poll, POLL_SECONDS, MAX_QUEUE + self.limit)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated) or not self.ask_whether_to_end():
                say(f"{self.kernel} continues on Kaggle ({kernel_page(self.kernel)}): {self.again} to wait for it")
                raise
            return RunEnd(STOPPED, self.end())

    def read_log(self, on_lines: Callable[[list[str]], None] = lambda lines: None) -> None:
        """Add what is new in the log to `lines`, until it ends or nothing comes for a while.

        Each connection sends the log from its beginning.

        Args:
            on_lines: gets the new lines as they come.
        """
        pieces = 0
        try:
            for piece in self.kaggle.log_events(self.reference):
                pieces += 1
                if pieces > self.pieces:
                    self.pieces, self.last_line_at = pieces, self.kaggle.clock.now()
                    on_lines(self.add(piece))
            self.is_log_complete = pieces > 0
        except (Unavailable, NotFound):
            self.is_log_complete = False

    def add(self, text: str) -> list[str]:
        """The lines that a piece of the log completes. The end of a piece is the end of a line."""
        new = [line.rstrip() for line in text.splitlines() if line.strip()]
        self.lines += new
        return new

    def show(self, lines: list[str]) -> None:
        """Print lines of the log."""
        self.shown = len(self.lines)
        for line in lines:
            if sys.stdout.isatty():
                print(f"\r{'':<79}\r", end="")  # over the line that says how long the run takes
            say(f"  | {line}")

    def find_problem(self) -> str:
        """Why a run that Kaggle shows as running will never end by itself; an empty string if it may."""
        now = self.kaggle.clock.now()
        if now - self.started > self.limit + STUCK_SECONDS:
            return f"Kaggle did not end it at its limit of {clock_time(self.limit)}"
        if now - self.last_line_at < STUCK_SECONDS:
            return ""
        tail = deque(self.lines, TAIL)
        if self.is_log_complete or any(CRASH.match(line) for line in tail):
            quiet = clock_time(now - self.last_line_at)
            last = f" ({tail[-1]})" if tail else ""
            return f"it ended{last}, but Kaggle still showed it as running {quiet} later"
        return ""

    def time_left(self) -> str:
        """What the log says about the time that is left, for the line of state."""
        for line in reversed(deque(self.lines, TAIL)):
            if found := LEFT.search(line):
                return f", {found[1]} left of this step"
            if found := PLAN.search(line):
                return f", {clock_time(math.ceil(float(found[1])))} planned"
        return ""

    def ask_whether_to_end(self) -> bool:
        """Ask the user whether to end the run on Kaggle; no if nobody can answer."""
        if not sys.stdin.isatty():
            return False
        lost = "" if self.can_delete else ", and with it the earlier versions"
        try:
            answer = input(
                f"\nThe run continues on Kaggle and uses GPU time. Delete {self.kernel} to end it{lost}? [y/N] "
            )
        except EOFError:
            return False
        if answer.strip().lower() not in ("y", "yes"):
            return False
        self.can_delete = True
        return True

    def end(self) -> str:
        """End the run, if its kernel may be deleted; returns what was done or has to be done."""
        if not self.can_delete:
            return f"cancel it at {kernel_page(self.kernel)}, because it uses GPU time until then"
        self.kaggle.delete_kernel(self.kernel)
        return f"{self.kernel} was deleted, so that it uses no more GPU time"

"""Run a script as Kaggle would: in its own process, without network, over folders it cannot write to.

Where the system allows it, Linux namespaces cut the network off and mount the folders read-only, for the script and for
whatever it starts. Elsewhere a guard inside the interpreter refuses connections and writes.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# With processes of their own, all that the script started ends with it, also what left its session.
PROCESSES = ["--pid", "--fork", "--kill-child"]
NAMESPACES = tuple(  # as root; as anybody
    ["--net", "--mount", *who, *what] for what in (PROCESSES, []) for who in ([], ["--user", "--map-root-user"])
)
MOUNT_READ_ONLY = """
count=$1; shift
while [ "$count" -gt 0 ]; do
  mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 125
  count=$((count - 1)); shift
done
"$@"
exit $?  # and no exec: the first process of a namespace would be deaf to signals
"""
# An audit hook cannot be removed again by the script that it watches.
GUARD = """
import os, sys
folders = [os.path.realpath(folder) for folder in sys.argv[1].split(os.pathsep)]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
def inside(real):
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        raise PermissionError("no network in a rehearsal")
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes or event in CHANGES:
        # A path may be relative to a folder that is open: for what has one, its descriptor follows the paths.
        at = [value for value in arguments if isinstance(value, int) and value >= 0] if event in CHANGES else []
        for path in arguments[: 1 if writes else 2]:
            if isinstance(path, (str, bytes, os.PathLike)):
                name = os.fsdecode(path)
                bases = [os.getcwd(), *(os.path.realpath(f"/proc/self/fd/{folder}") for folder in at)]
                real = next(filter(inside, (os.path.realpath(os.path.join(base, name)) for base in bases)), "")
                if real:
                    raise PermissionError(f"{path} is read-only in a rehearsal")
sys.addaudithook(refuse)
"""
START = """
import runpy, sys
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Called in a thread with the process group and an event that is set when the process is about to end.
Companion = Callable[[int, threading.Event], None]


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: the exit code; negative is a signal's number.
        timed_out: whether it was killed at the limit.
        peak_memory_mb: of the process or a child of it, whichever was larger.
    """

    code: int
    seconds: float
    peak_memory_mb: float
    timed_out: bool


def find_isolation(folder: Path) -> list[str] | None:
    """The command that runs another in fresh namespaces, if this system lets us mount `folder` read-only in them."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        return None
    for flags in NAMESPACES:
        command = ["unshare", *flags, "sh", "-c", MOUNT_READ_ONLY, "sh"]
        with suppress(OSError):  # the system may forbid the program itself
            if subprocess.run([*command, "1", str(folder), "true"], capture_output=True).returncode == 0:
                return command
    return None


def run_isolated(
    script: Path,
    arguments: Sequence[str],
    read_only: Sequence[Path],
    working: Path,
    isolation: list[str] | None,
    limit: float,
    hear: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    bootstrap: str = "",
    companion: Companion | None = None,
) -> Outcome:
    """Run `python -I script arguments` without network, in `working`.

    Args:
        read_only: folders that the process may not write to.
        isolation: of `find_isolation`; None takes the guard in the interpreter.
        limit: seconds after which the process and its children are killed.
        hear: called with each line that it prints, errors included.
        environment: variables that the process gets beside the usual ones.
        bootstrap: Python that runs in the process before the script, such as an audit hook.
        companion: lives beside the process, and may send signals to its group.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command_line(script, arguments, read_only, isolation, bootstrap),
        cwd=working,
        env=variables_for(working, environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    ended, peak = threading.Event(), [0.0]
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, ended, peak), daemon=True)
    watcher.start()
    ending = threading.Event()
    attendant = threading.Thread(target=companion or _be_idle, args=(process.pid, ending), daemon=True)
    attendant.start()
    try:
        for line in process.stdout:
            hear(line.rstrip("\n"))
        ending.set()
        attendant.join()  # before the process is reaped: until then its number is nobody else's
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        kill()
        process.wait()
        raise
    finally:
        timer.cancel()
        ending.set()
        ended.set()
        watcher.join()
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    # The shell between says 128 + n of a script that signal n ended.
    code = 128 - process.returncode if process.returncode > 128 else process.returncode
    # Linux counts in ru_maxrss what the parent held when it forked, so there the process itself is asked.
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
    return Outcome(code, time.monotonic() - started, peak[0] or usage.ru_maxrss * unit / 1e6, killed.is_set())


def command_line(
    script: Path, arguments: Sequence[str], read_only: Sequence[Path], isolation: list[str] | None, bootstrap: str
) -> list[str]:
    """The command that starts the script, behind the namespaces or the guard; arguments as of `run_isolated`."""
    python = [sys.executable, "-I", "-u"]  # -I makes it deaf to PYTHONUNBUFFERED
    before = bootstrap + ("" if isolation else GUARD)
    if before:
        python += ["-c", before + START, os.pathsep.join(map(str, read_only))]
    mounts = [*isolation, str(len(read_only)), *map(str, read_only)] if isolation else []
    return [*mounts, *python, str(script), *arguments]


def variables_for(working: Path, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process: little of the user's, and none of the user's secrets."""
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    kept += ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how torch shares the cores with others
    # A home of its own: nothing that was downloaded before can stand in for what the bundle lacks.
    own = {"HOME": str(working), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    return {name: os.environ[name] for name in kept if name in os.environ} | own | dict(more)


def duty_cycle(share: float, period: float = 0.1) -> Companion:
    """A companion that lets a process group run for only a share of each period, in seconds: a slower machine."""

    def throttle(group: int, ending: threading.Event) -> None:
        while not ending.wait(period * share):
            os.killpg(group, signal.SIGSTOP)
            ending.wait(period * (1 - share))
            os.killpg(group, signal.SIGCONT)

    return throttle


def kill_after(announced: threading.Event, seconds: float) -> Companion:
    """A companion that kills a process group some seconds after an announcement, unless it ends before."""

    def kill(group: int, ending: threading.Event) -> None:
        while not announced.wait(0.01):
            if ending.is_set():
                return
        if not ending.wait(seconds):
            os.killpg(group, signal.SIGKILL)

    return kill


def _be_idle(group: int, ending: threading.Event) -> None:
    """The companion of a process that needs none."""


def _watch_memory(pid: int, ended: threading.Event, peak: list[float]) -> None:
    """Keep the largest resident size of a process or one below it, in MB, in `peak`, where the system tells it."""
    while True:
        pids = [pid]
        for each in pids:
            with suppress(OSError):
                status = Path(f"/proc/{each}/status").read_text(encoding="ascii", errors="replace")
                if "VmHWM:" in status:
                    peak[0] = max(peak[0], int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
                pids += map(int, Path(f"/proc/{each}/task/{each}/children").read_text(encoding="ascii").split())
        if ended.wait(0.05):
            return

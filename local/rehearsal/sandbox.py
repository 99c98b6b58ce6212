"""Run a script as Kaggle would: in its own process, without network, with read-only folders.

If the system permits it, Linux namespaces disable the network and mount the folders read-only, for the script and all
processes that it starts. Otherwise an audit hook in the interpreter refuses connections and writes.
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
from dataclasses import dataclass, field
from pathlib import Path

# In a process namespace, all processes that the script started end with it, even those in another session.
PROCESSES = ["--pid", "--fork", "--kill-child"]
NAMESPACES = tuple(  # for root, then for any user
    ["--net", "--mount", *user, *pid] for pid in (PROCESSES, []) for user in ([], ["--user", "--map-root-user"])
)
MOUNT_READ_ONLY = """
count=$1; shift
while [ "$count" -gt 0 ]; do
  mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 125
  count=$((count - 1)); shift
done
"$@"
exit $?  # without exec: the first process of a namespace ignores signals
"""
# The script cannot remove an audit hook.
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
        # A path may be relative to an open folder, whose descriptor is then among the arguments.
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
# Runs in a thread beside the process; gets its process group, and an event that is set when the process ends.
Controller = Callable[[int, threading.Event], None]


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: the exit code; negative is a signal's number.
        timed_out: whether it was killed at the limit.
        peak_memory_mb: of the process or one of its children, whichever was larger.
    """

    code: int
    seconds: float
    peak_memory_mb: float
    timed_out: bool


@dataclass(frozen=True)
class Sandbox:
    """What a script may do.

    Attributes:
        working: its working folder, which it may write to.
        read_only: folders that it may not write to.
        isolation: of `find_isolation`; None uses the audit hook.
        environment: additional environment variables.
        bootstrap: Python code that runs in the process before the script, such as an audit hook.
    """

    working: Path
    read_only: tuple[Path, ...]
    isolation: list[str] | None
    environment: Mapping[str, str] = field(default_factory=dict)
    bootstrap: str = ""


def find_isolation(folder: Path) -> list[str] | None:
    """A command that runs another one in new namespaces; None if this system cannot mount `folder` read-only there."""
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
    sandbox: Sandbox,
    limit: float,
    on_line: Callable[[str], None],
    controller: Controller | None = None,
) -> Outcome:
    """Run `python -I script arguments` without network.

    Args:
        limit: seconds after which the process and its children are killed.
        on_line: called with each line of its output, errors included.
        controller: runs beside the process, and may send signals to its group.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        make_command(script, arguments, sandbox),
        cwd=sandbox.working,
        env=make_environment(sandbox),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    killed, ending, peak = threading.Event(), threading.Event(), [0.0]

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    threads = [threading.Thread(target=_watch_memory, args=(process.pid, ending, peak), daemon=True)]
    if controller:
        threads.append(threading.Thread(target=controller, args=(process.pid, ending), daemon=True))
    for thread in (timer, *threads):
        thread.start()
    try:
        for line in process.stdout:
            on_line(line.rstrip("\n"))
        ending.set()
        for thread in threads:  # before the process is reaped: until then no other process can get its number
            thread.join()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        kill()
        process.wait()
        raise
    finally:
        timer.cancel()
        ending.set()
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    # The shell of the namespaces returns 128 + n for a script that was ended by signal n.
    code = 128 - process.returncode if process.returncode > 128 else process.returncode
    # On Linux ru_maxrss includes what the parent had when it forked, so the watched value is better.
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes elsewhere
    return Outcome(code, time.monotonic() - started, peak[0] or usage.ru_maxrss * unit / 1e6, killed.is_set())


def make_command(script: Path, arguments: Sequence[str], sandbox: Sandbox) -> list[str]:
    """The command that starts the script in its sandbox."""
    python = [sys.executable, "-I", "-u"]  # -u, since -I ignores PYTHONUNBUFFERED
    folders = list(map(str, sandbox.read_only))
    bootstrap = sandbox.bootstrap + ("" if sandbox.isolation else GUARD)
    if bootstrap:
        python += ["-c", bootstrap + START, os.pathsep.join(folders)]
    mounts = [*sandbox.isolation, str(len(folders)), *folders] if sandbox.isolation else []
    return [*mounts, *python, str(script), *arguments]


def make_environment(sandbox: Sandbox) -> dict[str, str]:
    """The environment of the process: a few of the user's variables, none of which is a secret."""
    kept = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    kept += ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how torch shares the cores with others
    # With its own home the script cannot use files that were downloaded before and that the bundle lacks.
    own = {"HOME": str(sandbox.working), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    return {name: os.environ[name] for name in kept if name in os.environ} | own | dict(sandbox.environment)


def duty_cycle(fraction: float) -> Controller:
    """A controller that lets a process group run for a fraction of each tenth of a second, as on a slower machine."""

    def throttle(group: int, ending: threading.Event) -> None:
        while not ending.wait(0.1 * fraction):
            os.killpg(group, signal.SIGSTOP)
            ending.wait(0.1 * (1 - fraction))
            os.killpg(group, signal.SIGCONT)

    return throttle


def kill_after(start: threading.Event, seconds: float) -> Controller:
    """A controller that kills a process group some seconds after `start` is set, unless it ends before."""

    def kill(group: int, ending: threading.Event) -> None:
        while not start.wait(0.01):
            if ending.is_set():
                return
        if not ending.wait(seconds):
            os.killpg(group, signal.SIGKILL)

    return kill


def _watch_memory(pid: int, ending: threading.Event, peak: list[float]) -> None:
    """Keep the largest resident size of a process or one of its descendants in `peak` (MB), if the system gives it."""
    while True:
        pids = [pid]
        for each in pids:
            with suppress(OSError):
                status = Path(f"/proc/{each}/status").read_text(encoding="ascii", errors="replace")
                if "VmHWM:" in status:
                    peak[0] = max(peak[0], int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
                pids += map(int, Path(f"/proc/{each}/task/{each}/children").read_text(encoding="ascii").split())
        if ending.wait(0.05):
            return

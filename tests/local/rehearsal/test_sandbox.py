"""A rehearsed script has no network, writes only to its working folder, sees no secrets, and ends in time."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from local.rehearsal.sandbox import Outcome, Sandbox, find_isolation, run_isolated

POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="sessions and file locks need POSIX")
HOLD = """
import fcntl, os, sys, time
file = open("held", "w")
fcntl.flock(file, fcntl.LOCK_EX)
child = os.fork()  # it shares the lock, which is free again once both are gone
if child:
    print("holding", flush=True)
time.sleep(10)
open("outlived", "w")
"""


@dataclass
class Folders:
    """Folders of a rehearsal, and how to run a script in them."""

    folder: Path
    isolation: list[str] | None
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in (self.read_only, self.read_only / "sub", self.working):
            folder.mkdir()
        for path in (self.read_only / "photo.jpg", self.read_only / "sub" / "photo.jpg"):
            path.write_text("original", encoding="utf-8")

    @property
    def read_only(self) -> Path:
        return self.folder / "read only"

    @property
    def working(self) -> Path:
        return self.folder / "working"

    def script(self, source: str) -> Path:
        path = self.folder / "script.py"
        path.write_text(source, encoding="utf-8")
        return path

    def run(self, source: str, *arguments: object, limit: float = 30, on_line=None) -> Outcome:
        allowed = Sandbox(self.working, (self.read_only,), self.isolation)
        return run_isolated(
            self.script(source), list(map(str, arguments)), allowed, limit, on_line or self.lines.append
        )

    def content(self) -> dict[str, str]:
        """What the read-only folder holds: name -> text, None for a folder."""
        return {
            path.relative_to(self.read_only).as_posix(): path.read_text(encoding="utf-8") if path.is_file() else None
            for path in sorted(self.read_only.rglob("*"))
        }


@pytest.fixture(params=["namespaces", "guard"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Folders:
    isolation = find_isolation(tmp_path) if request.param == "namespaces" else None
    if request.param == "namespaces" and isolation is None:
        pytest.skip("this system does not permit namespaces")
    return Folders(tmp_path, isolation)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A local server without connections so far."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening


def has_connection(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except TimeoutError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether a process of HOLD is still running; waits a little for the system to clean up."""
    with path.open("w") as file:
        for _ in range(50):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            else:
                return False
    return True


CALLS = {
    "create_connection": "socket.create_connection(('127.0.0.1', port), timeout=5)",
    "connect": "socket.socket().connect(('127.0.0.1', port))",
    "connect_ex": "sys.exit(socket.socket().connect_ex(('127.0.0.1', port)))",
    "by name": "socket.create_connection(('localhost', port), timeout=5)",
    "http": "urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=0.3)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_script_reaches_no_server_not_even_on_the_loopback(
    folders: Folders, server: socket.socket, call: str
) -> None:
    source = f"import socket, sys, urllib.request\nport = int(sys.argv[1])\n{call}\n"
    port = server.getsockname()[1]
    outside = subprocess.run([sys.executable, "-I", str(folders.script(source)), str(port)], capture_output=True)
    assert has_connection(server), outside.stderr  # so the script can connect outside of the sandbox
    assert folders.run(source, port).code != 0
    assert not has_connection(server)


def test_in_namespaces_what_the_script_starts_has_no_network_either(folders: Folders, server: socket.socket) -> None:
    if folders.isolation is None:
        pytest.skip("the audit hook watches only the interpreter")
    call = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5)"
    source = (
        f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {call!r}, *sys.argv[1:]]).returncode)"
    )
    assert folders.run(source, server.getsockname()[1]).code != 0
    assert not has_connection(server)


WRITES = {
    "overwrite": "(folder / 'photo.jpg').write_text('x')",
    "overwrite by a path in bytes": "open(os.fsencode(folder / 'photo.jpg'), 'wb').close()",
    "append": "open(folder / 'photo.jpg', 'a').write('x')",
    "update": "open(folder / 'photo.jpg', 'r+').write('x')",
    "create": "(folder / 'new.txt').write_text('x')",
    "create exclusively": "open(folder / 'new.txt', 'x').write('x')",
    "touch": "(folder / 'new.txt').touch()",
    "os.open": "os.write(os.open(folder / 'photo.jpg', os.O_WRONLY | os.O_TRUNC), b'x')",
    "by a path with dots": "(folder / 'sub' / '..' / 'photo.jpg').write_text('x')",
    "by a relative path": "open(os.path.relpath(folder / 'photo.jpg'), 'w')",
    "through a link": "os.symlink(folder.parent, 'up'); open('up/read only/photo.jpg', 'w')",
    "truncate": "os.truncate(folder / 'photo.jpg', 0)",
    "remove": "(folder / 'photo.jpg').unlink()",
    "make a folder": "(folder / 'new').mkdir()",
    "remove a tree": "shutil.rmtree(folder / 'sub')",
    "move out": "os.rename(folder / 'photo.jpg', 'mine.jpg')",
    "move in": "Path('mine.jpg').write_text('x'); os.replace('mine.jpg', folder / 'photo.jpg')",
    "move a tree out": "shutil.move(folder / 'sub', 'mine')",
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_into_a_read_only_folder_fails_and_leaves_it_as_it_was(folders: Folders, write: str) -> None:
    before = folders.content()
    source = f"import os, shutil, sys\nfrom pathlib import Path\n\nfolder = Path(sys.argv[1])\n{write}\n"
    outcome = folders.run(source, folders.read_only)
    assert folders.content() == before
    assert outcome.code == 1
    assert any(name in folders.lines[-1] for name in ("OSError", "PermissionError")), folders.lines


def test_a_read_only_folder_can_be_read_and_listed(folders: Folders) -> None:
    source = "import os, sys\nprint(open(sys.argv[1] + '/photo.jpg').read(), sorted(os.listdir(sys.argv[1])))"
    assert folders.run(source, folders.read_only).code == 0
    assert folders.lines == ["original ['photo.jpg', 'sub']"]


def test_the_script_starts_in_the_working_folder_and_may_write_there(folders: Folders) -> None:
    source = """
import os, shutil, sys
from pathlib import Path
Path("partial.csv").write_text("done")
os.replace("partial.csv", "submission.csv")
Path("packages/one").mkdir(parents=True)
Path("packages/one/file").touch()
shutil.rmtree("packages")
shutil.copy(sys.argv[1] + "/photo.jpg", "copy.jpg")
"""
    assert folders.run(source, folders.read_only).code == 0, folders.lines
    written = {path.name: path.read_text(encoding="utf-8") for path in folders.working.iterdir()}
    assert written == {"submission.csv": "done", "copy.jpg": "original"}


def test_the_script_sees_no_secrets_of_the_environment(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAGGLE_KEY", "HF_TOKEN", "SOMEBODYS_PASSWORD"):
        monkeypatch.setenv(name, "s3cret-value")
    monkeypatch.setenv("PYTHONPATH", "/s3cret-value")
    assert folders.run("import os, sys\nprint(dict(os.environ), sys.path)").code == 0
    assert "HOME" in folders.lines[0]
    assert "s3cret-value" not in folders.lines[0]


def test_the_script_has_its_own_home_and_runs_as_a_batch(folders: Folders) -> None:
    source = "import os, pathlib\nprint(pathlib.Path.home())\nprint(os.environ['KAGGLE_KERNEL_RUN_TYPE'])"
    assert folders.run(source).code == 0
    assert folders.lines == [str(folders.working), "Batch"]


def test_the_script_is_main_and_gets_its_arguments_as_they_are(folders: Folders) -> None:
    assert folders.run("import sys\nprint(__name__, sys.argv[1:])", "--input", "a b", "$HOME", "*").code == 0
    assert folders.lines == ["__main__ ['--input', 'a b', '$HOME', '*']"]


def test_every_line_of_output_is_received_in_order_errors_included(folders: Folders) -> None:
    source = "import sys\nprint('one')\nprint('two', file=sys.stderr)\nsys.stdout.buffer.write(b'\\xff three')\n"
    assert folders.run(source).code == 0
    assert folders.lines == ["one", "two", "\ufffd three"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('no')", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_exit_codes_pass_through(folders: Folders, source: str, code: int) -> None:
    outcome = folders.run(source)
    assert outcome.code == code
    assert not outcome.timed_out


def test_the_memory_of_a_script_is_measured(folders: Folders) -> None:
    source = "import sys, time\nblock = bytearray(int(sys.argv[1]))\ntime.sleep(0.3)"
    lean, heavy = (folders.run(source, size).peak_memory_mb for size in (0, 100_000_000))
    assert 1 < lean < 100  # of the script, not of the test
    assert 90 < heavy - lean < 130


@POSIX_ONLY
def test_a_script_that_sleeps_is_killed_at_the_limit_with_its_children(folders: Folders) -> None:
    outcome = folders.run(HOLD, limit=2)
    assert folders.lines == ["holding"]
    assert outcome.timed_out
    assert outcome.code == -signal.SIGKILL
    assert not is_held(folders.working / "held")
    assert not (folders.working / "outlived").exists()


@POSIX_ONLY
def test_in_a_namespace_what_left_the_scripts_session_is_killed_too(folders: Folders) -> None:
    if "--pid" not in (folders.isolation or []):
        pytest.skip("only a process namespace knows which processes left its session")
    source = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HOLD!r}], start_new_session=True)"
    outcome = folders.run(source, limit=2)
    assert folders.lines == ["holding"]
    assert outcome.timed_out
    assert outcome.seconds < 5  # no process keeps its output open
    assert not is_held(folders.working / "held")
    assert not (folders.working / "outlived").exists()


@POSIX_ONLY
def test_a_script_does_not_outlive_an_interrupted_rehearsal(folders: Folders) -> None:
    def interrupt(line: str) -> None:
        folders.lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.run(HOLD, on_line=interrupt)
    assert folders.lines == ["holding"]
    assert not is_held(folders.working / "held")

"""What all commands share: flags, output, messages."""

import argparse
import importlib
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernel.inputs import InputError, shorten
from local.base.console import CLOSED, run, say
from tests.conftest import ROOT, command

COMMANDS = [
    "bundle",
    "kernel.start",
    *(f"local.{path.stem}" for path in sorted((ROOT / "local").glob("*.py")) if "run(main)" in path.read_text("utf-8")),
]

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIBGOMP = [*Path(find_spec("torch").origin).parent.glob("lib/libgomp*.so*")]  # found without importing torch


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


@pytest.mark.skipif(not LIBGOMP, reason="this build of torch has no libgomp")
@pytest.mark.parametrize(
    "start",
    [
        "from local.base.console import run\nrun(load)",
        "from kernel.start import start\nwith contextlib.suppress(SystemExit): start()\nload()",
    ],
    ids=["a command", "the kernel"],
)
@pytest.mark.parametrize(
    ("given", "policy", "spins"), [({}, "PASSIVE", "0"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000")]
)
def test_torchs_threads_sleep_while_they_wait_unless_the_user_says_otherwise(start, given, policy, spins):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = f"import contextlib, ctypes\nload = lambda: ctypes.CDLL({str(LIBGOMP[0])!r})\n{start}"
    result = command("-c", code, "--help", env=environment | given | {"OMP_DISPLAY_ENV": "verbose"})
    assert f"OMP_WAIT_POLICY = '{policy}'" in result.stderr  # libgomp prints what it has read
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="programs do not choose their pages"
)
@pytest.mark.parametrize(
    ("given", "fits"), [({}, lambda size: size >= 64 << 10), ({"THP_MEM_ALLOC_ENABLE": "0"}, lambda size: not size)]
)
def test_large_tensors_lie_on_large_pages_unless_the_user_says_otherwise(given, fits):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    code = (
        "from kernel.inputs import prepare_torch\nprepare_torch()\nimport torch\nones = torch.ones(32 << 20)\n"
        "print(next(line.split()[1] for line in open('/proc/self/smaps_rollup') if line.startswith('AnonHuge')))"
    )
    result = command("-c", code, env=environment | given)
    assert fits(int(result.stdout)), result.stderr  # kilobytes


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


def test_sigterm_ends_a_command_as_ctrl_c_does_and_temporary_files_are_removed(tmp_path, capsys):
    def main() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert (ended.value.code, capsys.readouterr().err) == (143, "terminated\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_system_says_of_a_path_is_one_line_and_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: (tmp_path / "two\nlines").mkdir() or (tmp_path / "two\nlines").read_bytes())
    assert ended.value.code == 2
    path = f"{tmp_path}/two\\nlines"
    assert capsys.readouterr().err == f"error: {path}: Is a directory: check the path, its permissions and the disk\n"


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

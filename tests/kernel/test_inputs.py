"""What is set before torch is loaded; libraries are unpacked from their wheels; what is mounted is listed."""

import importlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from kernel import inputs
from kernel.inputs import InputError, escape_control, find_folders, install_wheels, list_folder, prepare_torch


@pytest.mark.parametrize(
    ("flags", "given", "chosen"),
    [
        ({"fpu", "avx2"}, None, "AVX2"),
        ({"fpu", "avx2"}, "AUTO", "AUTO"),
        ({"fpu", "avx2", "avx512f"}, None, None),
        ({"fpu"}, None, None),
        (set(), None, None),
    ],
)
def test_mkl_is_told_of_the_instructions_that_it_would_not_use(flags, given, chosen, monkeypatch):
    monkeypatch.setattr(inputs, "processor_flags", lambda: flags)
    monkeypatch.setattr(os, "environ", {} if given is None else {"MKL_CBWR": given})
    prepare_torch()
    assert os.environ.get("MKL_CBWR") == chosen


def test_the_listing_for_the_log_is_short_however_many_files_there_are(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.jpg").touch()
    lines = list_folder(tmp_path).splitlines()
    assert len(lines) < 12
    assert "92 more" in lines[-1]


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "weights").mkdir()
    assert list(find_folders(tmp_path, lambda folder: folder.name == "weights")) == [tmp_path / "weights"]
    assert list_folder(tmp_path).splitlines()[1:] == ["  dangling", "  loop", "  weights/"]


def test_a_message_stays_on_one_line_whatever_is_in_a_name():
    assert escape_control("a\nb\r\x1b[2J\u2028 ö 名 \\ '") == "a\\nb\\r\\x1b[2J\\u2028 ö 名 \\ '"


def make_wheel(folder: Path, member: str, text: str) -> Path:
    """A wheel of one file."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, text)
    return folder / "a-1-py3-none-any.whl"


@pytest.fixture
def import_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield sys.path
    sys.modules.pop("library_of_a_wheel", None)
    importlib.invalidate_caches()


def test_a_library_of_the_weights_is_imported_before_the_installed_one(tmp_path, import_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "library_of_a_wheel.py").write_text("ORIGIN = 'installed'")
    import_path.insert(0, str(tmp_path / "site"))
    wheel = make_wheel(tmp_path / "wheels", "library_of_a_wheel/__init__.py", "ORIGIN = 'wheel'")
    install_wheels([wheel], tmp_path / "packages")
    assert importlib.import_module("library_of_a_wheel").ORIGIN == "wheel"


@pytest.mark.parametrize("member", ["../outside.py", "a/../../outside.py", "/tmp/outside.py"])
def test_a_wheel_that_would_write_elsewhere_is_refused(tmp_path, import_path, member):
    wheel, before = make_wheel(tmp_path / "wheels", member, "x"), list(import_path)
    with pytest.raises(InputError, match="outside of its own folder"):
        install_wheels([wheel], tmp_path / "packages")
    assert not (tmp_path / "packages").exists()
    assert import_path == before


def test_weights_without_wheels_leave_the_import_path_alone(tmp_path, import_path):
    before = list(import_path)
    install_wheels([], tmp_path / "packages")
    assert (import_path, (tmp_path / "packages").exists()) == (before, False)

"""Inputs are found by what lies in them, and refused when they are not what the kernel was bundled with."""

import importlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from kernel.inputs import (
    FORMAT,
    MANIFEST,
    InputError,
    Weights,
    find_weights,
    install_wheels,
    read_weights,
    sha256,
    tree,
)


def lay_weights(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "bank.safetensors").write_text(text)
    files = {"bank.safetensors": sha256(folder / "bank.safetensors")}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder


@pytest.mark.parametrize("mount", ["weights", "datasets/somebody/weights", "models/a/b/pytorch/default/1", "."])
def test_weights_are_found_under_every_layout_of_mounts(tmp_path, mount):
    folder = lay_weights(tmp_path / "input" / mount)
    (tmp_path / "input" / "competitions" / "fungi" / "images").mkdir(parents=True)
    assert find_weights(tmp_path / "input").folder == folder


def test_another_datasets_manifest_is_not_taken_for_weights(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"name": "a web app"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    folder = lay_weights(tmp_path / "zz-weights")
    assert find_weights(tmp_path).folder == folder


def test_weights_of_another_bundle_are_refused_with_both_digests(tmp_path):
    folder = lay_weights(tmp_path / "weights")
    with pytest.raises(InputError) as error:
        find_weights(tmp_path, "f" * 64)
    assert "f" * 64 in str(error.value)
    assert sha256(folder / MANIFEST) in str(error.value)


def test_of_two_versions_the_one_that_the_script_names_is_taken(tmp_path):
    lay_weights(tmp_path / "a", "old")
    wanted = lay_weights(tmp_path / "b", "new")
    assert find_weights(tmp_path, sha256(wanted / MANIFEST)).folder == wanted
    with pytest.raises(InputError, match="several weights"):
        find_weights(tmp_path)


def test_a_damaged_or_missing_weights_file_is_refused(tmp_path):
    weights = read_weights(lay_weights(tmp_path / "weights"))
    assert weights.file("bank.safetensors").is_file()
    (weights.folder / "bank.safetensors").write_text("damaged")
    with pytest.raises(InputError, match="SHA-256"):
        weights.file("bank.safetensors")
    (weights.folder / "bank.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        weights.file("bank.safetensors")


def test_without_weights_the_error_says_what_to_attach(tmp_path):
    with pytest.raises(InputError, match="attach the dataset"):
        find_weights(tmp_path)


def test_the_tree_for_the_log_is_short_however_many_files_there_are(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.jpg").touch()
    lines = tree(tmp_path).splitlines()
    assert len(lines) < 12
    assert "92 more" in lines[-1]


def lay_wheel(folder: Path, member: str, text: str) -> Weights:
    """Weights with one wheel of one file."""
    (folder / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(folder / "wheels" / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, text)
    digest = sha256(folder / "wheels" / "a-1-py3-none-any.whl")
    return Weights(folder, {"files": {"wheels/a-1-py3-none-any.whl": digest}})


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
    weights = lay_wheel(tmp_path / "weights", "library_of_a_wheel/__init__.py", "ORIGIN = 'wheel'")
    install_wheels(weights, tmp_path / "packages")
    assert importlib.import_module("library_of_a_wheel").ORIGIN == "wheel"


@pytest.mark.parametrize("member", ["../outside.py", "a/../../outside.py", "/tmp/outside.py"])
def test_a_wheel_that_would_write_elsewhere_is_refused(tmp_path, import_path, member):
    weights, before = lay_wheel(tmp_path / "weights", member, "x"), list(import_path)
    with pytest.raises(InputError, match="outside of its own folder"):
        install_wheels(weights, tmp_path / "packages")
    assert not (tmp_path / "packages").exists()
    assert import_path == before


def test_a_wheel_that_is_not_the_manifests_is_refused(tmp_path, import_path):
    weights = lay_wheel(tmp_path / "weights", "library_of_a_wheel.py", "x")
    (tmp_path / "weights" / "wheels" / "a-1-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(InputError, match="SHA-256"):
        install_wheels(weights, tmp_path / "packages")
    weights.manifest["files"]["wheels/a-1-py3-none-any.whl"] = sha256(next(tmp_path.rglob("*.whl")))
    with pytest.raises(InputError, match="cannot be unpacked"):
        install_wheels(weights, tmp_path / "packages")


def test_weights_without_wheels_leave_the_import_path_alone(tmp_path, import_path):
    before = list(import_path)
    install_wheels(Weights(lay_weights(tmp_path / "weights"), {"files": {"bank.safetensors": ""}}), tmp_path / "p")
    assert (import_path, (tmp_path / "p").exists()) == (before, False)

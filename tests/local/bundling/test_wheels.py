"""A library that is installed becomes the wheel that it came from, or is refused in one line."""

import base64
import csv
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from kernel.inputs import InputError
from kernel.manifest import Weights
from local.bundling.wheels import IMAGE, is_newer, make_wheel, needed_wheels
from tests import manifests

WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
INFO = "tiny_library-1.2.dist-info"
FILES = {
    "tiny_library/__init__.py": "NAME = 'tiny'\n",
    "tiny_library/models/größe.json": "{}",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: tiny-library\nVersion: 1.2\nRequires-Python: >=3.9\n",
    f"{INFO}/WHEEL": WHEEL,
    f"{INFO}/licenses/LICENSE": "free",
}
INSTALLERS = {
    "tiny_library/__pycache__/__init__.cpython-311.pyc": "bytes",
    f"{INFO}/INSTALLER": "pip\n",
    f"{INFO}/REQUESTED": "",
    f"{INFO}/direct_url.json": "{}",
    "../bin/tiny": "#!python",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs the tiny library; a change of None leaves a file out that its RECORD names."""

    def install(**changes: str | None) -> Path:
        site = tmp_path / "site"
        files = FILES | INSTALLERS | changes
        for name, content in files.items():
            if content is not None:
                (site / name).parent.mkdir(parents=True, exist_ok=True)
                (site / name).write_text(content, encoding="utf-8")
        record = "".join(f"{name},,\n" for name in [*files, f"{INFO}/RECORD"])
        (site / INFO / "RECORD").write_text(record, encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        return site

    return install


def test_a_wheel_contains_the_files_of_the_library_and_their_record(install, tmp_path):
    install()
    wheel = make_wheel("tiny-library", "1.2", tmp_path / "wheels")
    assert wheel == tmp_path / "wheels" / "tiny_library-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    rows = list(csv.reader(contents.pop(f"{INFO}/RECORD").decode().splitlines()))
    assert contents == {name: content.encode() for name, content in FILES.items()}
    assert rows[-1] == [f"{INFO}/RECORD", "", ""]
    for name, digest, size in rows[:-1]:
        found = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={found}", len(contents[name]))
    assert len(rows) == len(FILES) + 1


def test_the_same_files_give_the_same_bytes_whenever_they_were_installed(install, tmp_path):
    site = install()
    first = make_wheel("tiny-library", "1.2", tmp_path / "one").read_bytes()
    (site / "tiny_library" / "__init__.py").touch()
    install(**{f"{INFO}/INSTALLER": "uv\n"})
    assert make_wheel("tiny_library", "1.2", tmp_path / "other").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "version", "changes", "says"),
    [
        ("tiny-library", "1.3", {}, "trained with tiny-library 1.3, but 1.2 is installed: pip install tiny-l"),
        ("no-such-library", "1.3", {}, "which is not installed: pip install no-such-library==1.3, or train again"),
        ("tiny-library", "1.2", {f"{INFO}/WHEEL": WHEEL.replace("true", "false")}, "not installed from a pure-Python"),
        ("tiny-library", "1.2", {f"{INFO}/WHEEL": "Root-Is-Purelib: true\nTag: cp312-cp312-linux_x86_64"}, "pure-Py"),
        ("tiny-library", "1.2", {f"{INFO}/WHEEL": None}, "not installed from a pure-Python wheel"),
        ("tiny-library", "1.2", {"tiny_library/fast.so": "machine code"}, "contains tiny_library/fast.so, which is co"),
        ("tiny-library", "1.2", {"tiny_library/__init__.py": None}, "damaged (tiny_library/__init__.py: No such "),
        ("tiny-library", "1.2", {f"{INFO}/direct_url.json": json.dumps({"dir_info": {"editable": True}})}, "editable"),
        (
            "tiny-library",
            "1.2",
            {f"{INFO}/METADATA": FILES[f"{INFO}/METADATA"].replace("3.9", "3.99")},
            f"needs Python 3.99, Kaggle's image has {IMAGE['python']}",
        ),
    ],
    ids=["another version", "absent", "impure", "of one machine", "no wheel", "compiled", "damaged", "editable", "new"],
)
def test_a_library_that_cannot_be_bundled_is_refused_in_one_line(install, tmp_path, name, version, changes, says):
    install(**changes)
    with pytest.raises(InputError) as refused:
        make_wheel(name, version, tmp_path / "wheels")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "wheels").exists()


def run(name: str, library: str, packages: dict[str, str], timm: str) -> Weights:
    encoder = manifests.encoder_spec(library=library, packages=packages)
    member = manifests.member(encoders=(encoder,), versions={"timm": timm})
    return Weights(Path(name), manifests.manifest(members=(member,)))


def test_timm_is_bundled_if_it_is_newer_than_kaggles_and_open_clip_always():
    image, newer = IMAGE["timm"], IMAGE["timm"] + ".1"
    clip = {"open_clip_torch": "3.3.0", "ftfy": "6.3.1"}
    assert needed_wheels([run("a", "timm", {"timm": image}, image)]) == {}
    assert needed_wheels([run("a", "timm", {"timm": "0.9.16"}, "0.9.16")]) == {}
    assert needed_wheels([run("a", "timm", {"timm": newer}, newer)]) == {"timm": newer}
    assert needed_wheels([run("a", "open_clip", clip, image)]) == clip
    both = needed_wheels([run("a", "open_clip", clip, newer), run("b", "timm", {"timm": newer}, newer)])
    assert both == {**clip, "timm": newer}
    assert needed_wheels([run("a", "timm", {"timm": "1.0.20"}, "1.0.20"), run("b", "timm", {}, newer)])["timm"] == newer


def test_a_run_that_does_not_name_its_timm_is_refused_with_its_manifest():
    manifest = manifests.manifest(members=(manifests.member(versions={"torch": "2.8.0"}),))
    with pytest.raises(InputError, match=r"^a/manifest\.json does not name the version of timm: train again$"):
        needed_wheels([Weights(Path("a"), manifest)])


def test_two_runs_that_need_two_versions_of_a_library_are_refused():
    clips = [run(name, "open_clip", {"open_clip_torch": name}, IMAGE["timm"]) for name in ("3.2.0", "3.3.0")]
    with pytest.raises(InputError, match=r"^3\.2\.0 was trained with open_clip_torch 3\.2\.0 and 3\.3\.0 with 3\.3\.0"):
        needed_wheels(clips)
    with pytest.raises(InputError, match="timm"):
        needed_wheels([run(name, "timm", {"timm": name}, name) for name in ("99.0", "99.1")])


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("1.0.31", "1.0.26", True),
        ("1.0.26", "1.0.26", False),
        ("1.0.9", "1.0.26", False),
        ("1.1", "1.0.26", True),
        ("1.0", "1.0.0", False),
        ("2.10.0+cu128", "2.10.0", False),
        ("1.0.27.dev0", "1.0.26", True),
        ("1.0.26.post1", "1.0.26", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, than, expected):
    assert is_newer(version, than) == expected

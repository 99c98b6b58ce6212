"""kernel-metadata.json is checked against Kaggle's rules before it is sent."""

import json
import re
from pathlib import Path

import pytest
from slugify import slugify

from kernel.inputs import InputError
from local.bundling.metadata import (
    PLACEHOLDER,
    dataset_metadata,
    has_owner,
    read_kernel_metadata,
    with_owner,
    write_metadata,
)
from tests.conftest import kernel_metadata

OWN = Path(__file__).resolve().parents[3] / "kernel-metadata.json"
ABSENT = object()


def metadata_file(folder: Path, **changes: object) -> Path:
    """A file that passes, with some keys changed, or removed where ABSENT."""
    path = kernel_metadata(folder / "kernel-metadata.json")
    metadata = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in metadata.items() if value is not ABSENT}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        read_kernel_metadata(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_file_of_the_repository_passes() -> None:
    assert read_kernel_metadata(OWN) == json.loads(OWN.read_text(encoding="utf-8"))


def test_the_owner_replaces_the_placeholder_and_no_other_name(tmp_path: Path) -> None:
    metadata = read_kernel_metadata(metadata_file(tmp_path))
    assert not has_owner(metadata)
    assert with_owner(metadata, None) == metadata
    filled = with_owner(metadata, "ann")
    assert (filled["id"], filled["dataset_sources"]) == ("ann/few-shot-species", ["ann/few-shot-species-weights"])
    assert has_owner(filled)
    assert with_owner(filled, "bob") == filled
    mixed = read_kernel_metadata(metadata_file(tmp_path, dataset_sources=["club/weights", f"{PLACEHOLDER}/more-data"]))
    assert not has_owner(mixed)
    assert with_owner(mixed, "ann")["dataset_sources"] == ["club/weights", "ann/more-data"]


@pytest.mark.parametrize("owner", ["Ann Lee", "ann/lee", "ann@example.org", "-ann"])
def test_an_impossible_kaggle_name_is_refused(tmp_path: Path, owner: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(owner))):
        with_owner(read_kernel_metadata(metadata_file(tmp_path)), owner)


def test_the_metadata_that_kaggles_client_reads_is_written_into_the_bundle(tmp_path: Path) -> None:
    metadata = with_owner(read_kernel_metadata(metadata_file(tmp_path)), "ann")
    write_metadata(tmp_path / "build", metadata)
    written = json.loads((tmp_path / "build" / "kernel-metadata.json").read_text())
    assert written == {**metadata, "code_file": "kernel.py"}
    written = json.loads((tmp_path / "build" / "weights" / "dataset-metadata.json").read_text())
    assert written == dataset_metadata(metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "Ann-Lee2/few-shot-species"},
        {"id": "ann/fungi", "title": "Fungi"},
        {"id": f"ann/{'a' * 50}", "title": "A" * 50},
        {"dataset_sources": ["ann/weight", "bob/data5"]},
        {"dataset_sources": [f"ann/{'w' * 50}"]},
        {"competition_sources": ["herbarium-2020-fgvc7"]},
        {"competition_sources": ["GiveMeSomeCredit", "fungi-clef-2025"]},
        {"machine_shape": "NvidiaL4X1"},
        {"enable_tpu": ABSENT, "machine_shape": ABSENT, "kernel_sources": ABSENT, "model_sources": ABSENT},
    ],
)
def test_metadata_that_kaggle_accepts_passes(tmp_path: Path, changes: dict) -> None:
    path = metadata_file(tmp_path, **changes)
    assert read_kernel_metadata(path) == json.loads(path.read_text(encoding="utf-8"))


WRONG = {
    "id": [
        ABSENT, "few-shot-species", "ann/Few-Shot-Species", "ann/few_shot_species", "ann/few", "ann/few-shot-species/1",
        "-ann/few-shot-species", "ann/few-shot-species\n", 5,
    ],
    "title": [ABSENT, "Few", "Few-shot species " + "x" * 40, "Another title", "Few-shot\nspeciess"],
    "code_file": [ABSENT, "kernel.py"],
    "language": [ABSENT, "r"],
    "kernel_type": [ABSENT, "notebook"],
    "is_private": [ABSENT, False, "true"],
    "enable_gpu": [ABSENT, False, 1],
    "enable_internet": [ABSENT, True, "false"],
    "machine_shape": ["NvidiaTeslaP100", "TpuV5E8", "nvidiateslat4", "", None],
    "dataset_sources": [
        ABSENT, [], "ann/weights", ["weights"], [5], ["ann/weights", "data"], ["ann/five5"], [f"ann/{'w' * 51}"],
    ],
    "competition_sources": [
        ABSENT, [], "fungi-clef-2025", None, [5], [None], [""], [" x "], ["../../x"], ["fungi-clef-2025\n"],
        ["fungi-clef-2025", "-x"], ["https://www.kaggle.com/competitions/my-comp"],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_broken_rule_is_reported_with_file_key_and_rule_in_one_line(tmp_path: Path, key: str, value: object) -> None:
    path = metadata_file(tmp_path, **{key: value})
    message = refusal(path)
    assert message.startswith(f"{path}: {key} is {None if value is ABSENT else value!r}: it must be ")


def test_the_title_must_have_the_slug_of_the_id(tmp_path: Path) -> None:
    message = refusal(metadata_file(tmp_path, title="Few shots of species"))
    assert "'few-shot-species'" in message
    assert "'few-shots-of-species'" in message


@pytest.mark.parametrize("content", [b"{", b"", b'{"id": "\xff"}', b"[]", b'"text"', b"null"])
def test_a_file_that_is_not_a_json_object_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernel-metadata.json"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    assert str(tmp_path / "none.json") in refusal(tmp_path / "none.json")


@pytest.mark.parametrize("slug", ["weight", "few-shot-species-weights", "w" * 50, "5-shots-2025"])
def test_the_metadata_of_the_dataset_follows_kaggles_rules(tmp_path: Path, slug: str) -> None:
    metadata = read_kernel_metadata(metadata_file(tmp_path, dataset_sources=[f"Ann/{slug}", "bob/another"]))
    dataset = dataset_metadata(metadata)
    assert set(dataset) == {"title", "id", "licenses"}
    assert dataset["id"] == f"Ann/{slug}"
    assert 6 <= len(dataset["title"]) <= 50
    assert re.fullmatch(r"[a-z0-9-]{6,50}", dataset["id"].partition("/")[2])
    assert slugify(dataset["title"]) == slug
    assert len(dataset["licenses"]) == 1
    assert dataset["licenses"][0]["name"]

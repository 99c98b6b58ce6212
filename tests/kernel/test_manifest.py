"""A manifest is read as it was written, and a damaged one is refused with the name of the wrong key."""

import json
from dataclasses import replace

import pytest

from kernel.inputs import InputError, install_wheels, sha256
from kernel.manifest import (
    FORMAT,
    MANIFEST,
    GivenSettings,
    Weights,
    find_weights,
    read_manifest,
    read_weights,
    to_json,
    write_manifest,
)
from tests import manifests


def full_manifest():
    """A manifest in which every key has a value of its own."""
    spec = manifests.encoder_spec(
        arguments={"img_size": [64, 96]}, packages={"timm": "1.0.20"}, learnt_from={"a" * 64: ("b" * 64, 3)}
    )
    one = manifests.member(
        encoders=(replace(spec, preprocessing=replace(spec.preprocessing, larger_size=96)),),
        views=("plain", "larger"),
        metadata_prior="prior.safetensors",
        metadata_prior_weight=0.5,
        validation={"recall_at_1": 0.25, "recall_at_5": 1},
        recipe={"epochs": 2, "choose": ["resize_mode"]},
        given=GivenSettings(recipe={"epochs": 2}, weights="c" * 64),
        run="baseline",
    )
    return manifests.manifest(
        commit="0123abc with changes", members=(one, manifests.member(name="Träume")), files={"a": "d"}
    )


def changed(path, key: str, value: object = None, drop: bool = False):
    """Write a manifest whose JSON has another value at a key such as `members.0.weight`, or lacks the key."""
    content = to_json(full_manifest())
    *parents, last = (int(name) if name.isdigit() else name for name in key.split("."))
    at = content
    for name in parents:
        at = at[name]
    if drop:
        del at[last]
    else:
        at[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("manifest", [manifests.manifest(), full_manifest()], ids=["small", "full"])
def test_a_manifest_is_read_as_it_was_written_and_written_as_it_was_read(tmp_path, manifest):
    write_manifest(manifest, tmp_path / "first.json")
    assert read_manifest(tmp_path / "first.json") == manifest
    write_manifest(read_manifest(tmp_path / "first.json"), tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.json", "second.json"]


def test_the_json_on_disk_has_the_names_of_the_fields(tmp_path):
    write_manifest(manifests.manifest(), tmp_path / MANIFEST)
    content = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    keys = ["format", "competition", "class_ids", "fallback_classes", "class_counts", "members", "files"]
    assert list(content) == keys
    assert content["members"][0]["metadata_prior"] is None
    assert content["members"][0]["encoders"][0]["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert "run" not in content["members"][0]


def test_a_manifest_of_an_older_version_is_refused_with_both_formats_and_what_to_do(tmp_path):
    path = changed(tmp_path / MANIFEST, "format", "few-shot-species/1")
    with pytest.raises(InputError) as error:
        read_manifest(path)
    assert str(error.value) == (f"{path} has format 'few-shot-species/1', expected '{FORMAT}': train or bundle again")


def test_optional_keys_that_are_missing_have_their_defaults(tmp_path):
    content = to_json(full_manifest())
    del content["commit"], content["competition"]["observations_sha256"]
    for one in content["members"]:
        del one["given"], one["encoders"][0]["learnt_from"], one["encoders"][0]["packages"]
        for size in ("larger_size", "cropped_size"):
            del one["encoders"][0]["preprocessing"][size]
    (tmp_path / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    found = read_manifest(tmp_path / MANIFEST)
    assert (found.commit, found.competition.observations_sha256) == (None, "")
    assert found.members[0].given == GivenSettings(recipe={}, weights="")
    spec = found.members[0].encoders[0]
    assert (spec.learnt_from, spec.packages) == ({}, {})
    assert (spec.preprocessing.larger_size, spec.preprocessing.cropped_size) == (0, 0)


def test_unknown_keys_are_ignored(tmp_path):
    changed(tmp_path / MANIFEST, "members.0.encoders.0.of_next_year", {"a": 1})
    assert read_manifest(tmp_path / MANIFEST) == full_manifest()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("competition", "competition"),
        ("fallback_classes", "fallback_classes"),
        ("files", "files"),
        ("competition.time_limit", "competition.time_limit"),
        ("members.1.banks", r"members\[1\].banks"),
        ("members.0.encoders.0.file", r"members\[0\].encoders\[0\].file"),
        ("members.0.encoders.0.preprocessing.size", r"members\[0\].encoders\[0\].preprocessing.size"),
    ],
)
def test_a_missing_key_is_named_with_the_file_and_what_to_do(tmp_path, key, named):
    path = changed(tmp_path / MANIFEST, key, drop=True)
    with pytest.raises(InputError, match=rf"{path} is damaged: {named} is missing; train or bundle again") as error:
        read_manifest(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("class_ids", "oak", "expected a list for class_ids, got 'oak'"),
        ("class_ids", [1, 2], "expected a string for class_ids[0], got 1"),
        ("competition", [], "expected an object for competition, got []"),
        ("competition.time_limit", "12 h", "expected a number for competition.time_limit, got '12 h'"),
        ("competition.time_limit", True, "expected a number for competition.time_limit, got True"),
        ("members", [], "members is empty"),
        ("members", {}, "expected a list for members, got {}"),
        ("members.1", None, "expected an object for members[1], got None"),
        ("members.0.metadata_prior", 3, "expected a string for members[0].metadata_prior, got 3"),
        ("members.0.validation", {"macro_f1": None}, "a number for members[0].validation.macro_f1, got None"),
        ("members.0.encoders.0.features", 96.0, "expected an int for members[0].encoders[0].features, got 96.0"),
        ("members.0.encoders.0.library", "keras", "expected 'timm' or 'open_clip' for members[0].encoders[0].library"),
        (
            "members.0.encoders.0.learnt_from",
            {"a": ["b"]},
            "expected 2 values for members[0].encoders[0].learnt_from.a",
        ),
        ("members.0.encoders.0.preprocessing.mean", [0.5], "expected 3 values for"),
        ("members.0.encoders.0.preprocessing.std", [1, "x", 1], "members[0].encoders[0].preprocessing.std[1], got 'x'"),
        ("files", {"a": 1}, "expected a string for files.a, got 1"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(tmp_path, key, value, problem):
    path = changed(tmp_path / MANIFEST, key, value)
    with pytest.raises(InputError) as error:
        read_manifest(path)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"{path} is damaged: ")
    assert str(error.value).endswith("; train or bundle again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": ["few-shot-species/2"]}', "[" * 100_000])
def test_a_file_that_is_not_a_manifest_of_this_format_is_refused_in_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"{tmp_path / MANIFEST} (cannot be read|has format)") as error:
        read_manifest(tmp_path / MANIFEST)
    assert "\n" not in str(error.value)


def write_weights(folder, text: str = "weights", name: str = "bank.safetensors"):
    """A folder of weights with one file."""
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    files = {name: sha256(folder / name)}
    write_manifest(manifests.manifest(files=files), folder / MANIFEST)
    return folder


@pytest.mark.parametrize("mount", ["weights", "datasets/somebody/weights", "models/a/b/pytorch/default/1", "."])
def test_weights_are_found_under_every_layout_of_mounts(tmp_path, mount):
    folder = write_weights(tmp_path / "input" / mount) if mount != "." else write_weights(tmp_path / "input")
    (tmp_path / "input" / "competitions" / "fungi" / "images").mkdir(parents=True)
    assert find_weights(tmp_path / "input").folder == folder


def test_the_manifest_of_another_dataset_is_ignored(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"name": "a web app"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    folder = write_weights(tmp_path / "zz-weights")
    assert find_weights(tmp_path).folder == folder


def test_weights_whose_manifest_lacks_a_key_are_found_and_refused_with_the_name_of_the_key(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / MANIFEST).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
    with pytest.raises(InputError, match="competition is missing"):
        find_weights(tmp_path)


def test_weights_of_another_bundle_are_refused_with_both_digests(tmp_path):
    folder = write_weights(tmp_path / "weights")
    with pytest.raises(InputError) as error:
        find_weights(tmp_path, "f" * 64)
    assert "f" * 64 in str(error.value)
    assert sha256(folder / MANIFEST) in str(error.value)


def test_of_two_versions_the_one_that_the_script_names_is_used(tmp_path):
    write_weights(tmp_path / "a", "old")
    new = write_weights(tmp_path / "b", "new")
    assert find_weights(tmp_path, sha256(new / MANIFEST)).folder == new
    with pytest.raises(InputError, match="several weights"):
        find_weights(tmp_path)


@pytest.mark.parametrize("is_read_ahead", [False, True])
def test_a_damaged_or_missing_weights_file_is_refused(tmp_path, is_read_ahead):
    path = write_weights(tmp_path / "weights", name="encoder.safetensors") / "encoder.safetensors"

    def find_file():
        weights = read_weights(path.parent)
        if is_read_ahead:
            weights.start_checks()
        return weights.file(path.name)

    assert find_file() == path
    path.write_text("damaged")
    with pytest.raises(InputError, match="SHA-256"):
        find_file()
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        find_file()


def test_without_weights_the_error_says_what_to_attach(tmp_path):
    with pytest.raises(InputError, match="attach the dataset"):
        find_weights(tmp_path)


def test_a_wheel_whose_digest_is_not_in_the_manifest_is_refused(tmp_path):
    wheel = tmp_path / "wheels" / "a-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"not a zip")
    files = {"wheels/a-1-py3-none-any.whl": "0" * 64, "bank.safetensors": ""}
    weights = Weights(tmp_path, manifests.manifest(files=files))
    with pytest.raises(InputError, match="SHA-256"):
        weights.wheels()
    files["wheels/a-1-py3-none-any.whl"] = sha256(wheel)
    assert weights.wheels() == [wheel]
    with pytest.raises(InputError, match="cannot be unpacked"):
        install_wheels(weights.wheels(), tmp_path / "packages")

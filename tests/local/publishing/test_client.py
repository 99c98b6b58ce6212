"""Kaggle's own client against a local Kaggle that fails: nothing is lost, and nothing is sent twice."""

import io
import json
import threading
import time
import zipfile

import pytest

from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from tests.local.publishing.conftest import DATASET, KERNEL
from tests.local.publishing.loopback import http, saying


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("GetCompetition", "competitions/fungi-clef-2025/rules"),
        ("CreateDataset", "phone number"),
        ("SaveKernel", "rules accepted"),
        ("GetSubmissionLimits", "competitions/fungi-clef-2025/rules"),
        ("CreateCodeSubmission", "competitions/fungi-clef-2025/rules"),
    ],
)
def test_what_kaggle_forbids_is_reported_with_what_to_do(world, method, says):
    world.kaggle.fail(method, http(403, "Permission denied"))
    message = world.refusal(submits=True)
    assert "Permission denied" in message
    assert says in message
    assert world.kaggle.count(method) == 1


def hang_up(body: dict) -> None:
    raise ConnectionAbortedError


def be_slow(body: dict) -> None:
    time.sleep(0.2)


@pytest.mark.parametrize("method", ["GetCompetition", "SaveKernel", "ListKernelSessionOutput"])
def test_a_request_is_repeated_while_the_network_fails(world, method, capsys):
    world.kaggle.fail(method, http(500), http(429), hang_up, http(503), be_slow)
    world.publish()
    assert world.slept[:4] == [2, 4, 8, 16] or method != "GetCompetition"
    assert capsys.readouterr().out.count("next attempt in") == 4
    assert world.kaggle.count("CreateDataset") == 1


@pytest.mark.parametrize("method", ["GetCompetition", "StartBlobUpload", "PUT"])
def test_a_connection_without_data_is_closed_and_the_request_repeated(world, method, monkeypatch):
    """The client alone would wait forever."""
    monkeypatch.setattr("local.publishing.strict_api.REQUEST_TIMEOUT", 0.5)
    awake = threading.Event()

    def be_silent(body: dict) -> dict:
        awake.wait()
        raise ConnectionAbortedError

    world.kaggle.fail(method, be_silent)
    try:
        world.publish()
    finally:
        awake.set()
    assert world.kaggle.stored(DATASET) == world.weights


def test_a_network_that_keeps_failing_ends_the_command_and_the_next_one_continues_there(world):
    world.kaggle.fail("SaveKernel", *[http(502, "Bad gateway")] * 6)
    message = world.refusal()
    assert message.startswith(f"pushing {KERNEL} failed 6 times")
    assert "Bad gateway" in message
    assert world.slept == [2, 4, 8, 16, 32]
    world.publish()
    assert world.kaggle.count("CreateDataset") == 1
    assert world.kaggle.count("CreateDatasetVersion") == 0


def cut(body: dict) -> dict:
    """Only half of an upload arrives."""
    return {"kept": body["sent"][: len(body["sent"]) // 2]}


def test_an_interrupted_upload_continues_where_it_stopped(world):
    world.kaggle.fail("PUT", cut, cut)
    world.publish()
    assert world.kaggle.stored(DATASET) == world.weights
    assert len(world.weights) == world.kaggle.count("StartBlobUpload")
    assert world.kaggle.count("size question") == 2


def test_an_incomplete_upload_is_resumed_by_the_next_command(world):
    world.kaggle.fail("PUT", cut, *[lambda body: {"kept": b""}] * 1000)
    assert "files did not arrive" in world.refusal()
    assert world.kaggle.count("CreateDataset") == 0
    world.kaggle.faults["PUT"].clear()
    world.publish()
    assert world.kaggle.count("StartBlobUpload") == len(world.weights)  # none was started again
    assert world.kaggle.stored(DATASET) == world.weights


def test_an_error_of_the_client_itself_has_no_advice_about_what_kaggle_forbids(world):
    from local.publishing.client import Kaggle

    def refuse() -> None:
        raise ValueError("Refusing to use upload state directory /tmp/x because it is a symlink.")

    with pytest.raises(InputError) as refused:
        Kaggle("the environment").call("sending weights", refuse, forbidden="a dataset needs a phone number")
    assert str(refused.value).startswith("sending weights: Refusing to use upload state directory")
    assert "phone" not in str(refused.value)


def test_wheels_are_sent_in_a_zip_that_kaggle_unpacks_into_their_folder(world):
    wheel = world.build / "weights" / "wheels" / "ftfy-6.3-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.write_bytes(b"a wheel")
    wheels = {path.name: path.read_bytes() for path in wheel.parent.iterdir()}  # and a newer timm than Kaggle's
    manifest = json.loads((world.build / "weights" / MANIFEST).read_text(encoding="utf-8"))
    world.bundle_again(files={**manifest["files"], f"wheels/{wheel.name}": sha256(wheel)})
    world.publish()
    with zipfile.ZipFile(io.BytesIO(world.kaggle.stored(DATASET)["wheels.zip"])) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheels


def test_a_file_that_kaggle_refused_once_is_in_the_dataset(world):
    """The client alone would leave it out."""
    world.kaggle.fail("PUT", http(400))
    world.publish()
    assert world.kaggle.stored(DATASET) == world.weights
    assert world.kaggle.count("CreateDataset") == 1


@pytest.mark.parametrize("method", ["CreateDataset", "CreateCodeSubmission"])
def test_nothing_is_sent_twice_if_only_the_answer_was_lost(world, method):
    def lose_the_answer(body: dict) -> None:
        getattr(world.kaggle, f"_{method}")(body)
        raise ConnectionAbortedError

    world.kaggle.fail(method, lose_the_answer)
    world.publish(submits=True)
    assert len(world.kaggle.datasets[DATASET]) == 1
    assert len(world.kaggle.submitted) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count"),
        ({"versionNumber": 1, "url": "u", "invalidDatasetSources": [DATASET]}, f"invalid dataset sources {DATASET}"),
        ({"versionNumber": 1, "url": "u", "invalidCompetitionSources": ["f"]}, "invalid competition sources f"),
        ({"versionNumber": 1, "url": "u", "invalidKernelSources": ["k"]}, "invalid kernel sources k"),
        ({"versionNumber": 1, "url": "u", "invalidModelSources": ["m"]}, "invalid model sources m"),
        ({"versionNumber": 1, "url": "u", "invalidTags": ["t"]}, "invalid tags t"),
        ({"url": "u"}, "did not give a version number"),
    ],
)
def test_an_error_inside_a_200_is_reported_and_the_next_command_pushes_again(world, answer, says):
    world.kaggle.fail("SaveKernel", saying(**answer))
    assert says in world.refusal()
    assert world.kaggle.count("GetKernelSessionStatus") == 0
    world.publish()
    assert world.kaggle.count("SaveKernel") == 2


def test_an_error_inside_a_200_of_the_dataset_is_reported(world):
    world.kaggle.fail("CreateDataset", saying(status="error", error="The title is in use"))
    assert "The title is in use" in world.refusal()
    assert world.kaggle.count("SaveKernel") == 0


def test_a_state_that_the_client_does_not_know_is_reported(world):
    world.kaggle.running = ["HIBERNATING"]
    message = world.refusal()
    assert "HIBERNATING" in message
    assert "pip install --upgrade kaggle" in message


def test_a_dataset_that_kaggle_forbids_to_look_at_does_not_exist_yet(world):
    world.kaggle.fail("GetDatasetStatus", http(403, "Permission denied"))
    world.publish()
    assert world.kaggle.count("CreateDataset") == 1

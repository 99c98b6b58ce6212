"""The weights as a Kaggle Model, of which the kernel attaches one version."""

import json

import pytest

from local.bundling.metadata import DATASET_METADATA
from tests.local.publishing.conftest import DATASET
from tests.local.publishing.loopback import http

MODEL = f"{DATASET}/pyTorch/weights"


def test_the_weights_become_a_private_model_whose_version_is_attached(world):
    for _ in range(2):
        world.publish(as_model=True)
    assert world.kaggle.models[DATASET] == [world.weights]
    [created], [instance] = (world.kaggle.bodies[name] for name in ("CreateModel", "CreateModelInstance"))
    assert created["isPrivate"] is True
    assert (instance["body"]["framework"], instance["body"]["instanceSlug"]) == ("MODEL_FRAMEWORK_PY_TORCH", "weights")
    [pushed] = world.kaggle.bodies["SaveKernel"]
    assert pushed["modelDataSources"] == [f"{MODEL}/1"]
    assert not pushed.get("datasetDataSources")
    assert world.kaggle.datasets == {}
    written = json.loads((world.build / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert written["model_sources"] == [f"{MODEL}/1"]
    assert {path.name for path in (world.build / "weights").iterdir()} == {*world.weights, DATASET_METADATA}


def test_other_weights_become_another_version(world):
    world.publish(as_model=True)
    world.bundle_again()
    world.publish(as_model=True)
    assert world.kaggle.models[DATASET][1] == world.weights
    assert world.kaggle.bodies["SaveKernel"][1]["modelDataSources"] == [f"{MODEL}/2"]
    assert world.kaggle.count("CreateModel") == 1


@pytest.mark.parametrize("method", ["CreateModel", "CreateModelInstance"])
def test_nothing_is_sent_twice_if_only_the_answer_was_lost(world, method):
    def lose_the_answer(body: dict) -> None:
        getattr(world.kaggle, f"_{method}")(body)
        raise ConnectionAbortedError

    world.kaggle.fail(method, lose_the_answer)
    world.publish(as_model=True)
    assert world.kaggle.models[DATASET] == [world.weights]


def test_what_kaggle_forbids_is_reported_and_leaves_the_bundle_as_it_was(world):
    world.kaggle.fail("CreateModelInstance", http(403, "Permission denied"))
    assert "verified phone number" in world.refusal(as_model=True)
    world.publish()  # as a dataset

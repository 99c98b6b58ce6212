"""What a run's folder holds can be opened by the kernel, and gives it the embeddings that the bank is made of."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.manifest import MANIFEST, read_manifest
from local.banks.ensemble import HeldOutPredictions
from local.encoders.load import load_encoder
from local.recipes.recipe import make_recipe
from local.training.export import refuse_unopenable, write_out_of_fold
from local.training.inputs import Inputs
from tests.conftest import TINY
from tests.labelled import make_labelled, of_rows


def opening(architecture, out, size=64, **arguments):
    """Let the kernel open a random encoder by a description with other arguments than it was built with."""
    module, spec = load_encoder(f"timm:{architecture}", pretrained=False, image_size=size)
    encoder = Encoder(module, spec.preprocessing, spec.features, [torch.device("cpu")])
    recipe, spec = make_recipe(TINY, "the test"), replace(spec, arguments=arguments)
    refuse_unopenable(Inputs(recipe, recipe, (encoder,), (spec,), make_labelled([], []), "", ""), out)


def test_weights_that_layers_share_are_saved_and_opened_again(tmp_path):
    opening("coat_lite_tiny", tmp_path / "run", 224)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_resnet", {"act_layer": "gelu"}),  # the same weights, another function
        ("test_vit", {"class_token": False, "global_pool": "avg"}),  # other weights
        ("test_vit", {"no_such_argument": 1}),
        ("test_vit", {"img_size": {1, 2}}),  # not JSON
    ],
)
def test_an_encoder_that_the_kernel_would_build_differently_is_refused(tmp_path, architecture, arguments):
    size = 64 if architecture == "test_resnet" else 0
    with pytest.raises(InputError, match=f"the kernel .* {architecture} .*choose another encoder") as error:
        opening(architecture, tmp_path / "run", size, **arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_out_of_fold_predictions_are_a_table_with_the_most_probable_classes_first(tmp_path):
    labelled = of_rows([("train", "a", "7"), ("val", "b", "30"), ("train", "c", "9"), ("val", "d", "7")])
    probabilities = np.array([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]])
    predictions = HeldOutPredictions(
        ["d", "b"], ["5", "7", "9"], torch.tensor(probabilities).log(), np.array([1, -1]), None
    )
    write_out_of_fold(predictions, labelled, tmp_path / "oof.csv")
    with (tmp_path / "oof.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    ranked = [f"{name}_{rank}" for rank in (1, 2, 3) for name in ("class", "probability")]
    assert header == ["observation", "class", *ranked]
    assert rows == [
        ["d", "7", "7", "0.9", "5", "0.1", "9", "0"],
        ["b", "30", "5", "0.5", "9", "0.3", "7", "0.2"],
    ]


def test_a_run_has_the_out_of_fold_predictions_by_which_it_is_scored(trained):
    with (trained / "oof.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    validation = read_manifest(trained / MANIFEST).members[0].validation
    for guesses in (1, 5):
        hits = [row["class"] in [row[f"class_{rank}"] for rank in range(1, guesses + 1)] for row in rows]
        assert np.mean(hits) == pytest.approx(validation[f"unweighted_recall_at_{guesses}"])
    for row in rows:
        assert sum(float(row[f"probability_{rank}"]) for rank in range(1, 13)) == pytest.approx(1, abs=1e-4)

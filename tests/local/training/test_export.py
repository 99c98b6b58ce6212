"""What a run's folder holds can be opened by the kernel, and gives it the embeddings that the bank is made of."""

from dataclasses import replace

import pytest
import torch

from kernel.encoders import Encoder
from kernel.inputs import InputError
from local.encoders.load import load_encoder
from local.recipes.recipe import make_recipe
from local.training.export import refuse_unopenable
from local.training.inputs import Inputs
from tests.conftest import TINY
from tests.labelled import make_labelled


def opening(architecture, out, size=64, **arguments):
    """Let the kernel open a random encoder by a description with other arguments than it was built with."""
    module, spec = load_encoder(f"timm:{architecture}", pretrained=False, image_size=size)
    encoder = Encoder(module, spec.preprocessing, spec.features, [torch.device("cpu")])
    recipe, spec = make_recipe(TINY, "the test"), replace(spec, arguments=arguments)
    refuse_unopenable(Inputs(recipe, recipe, encoder, spec, make_labelled([], []), "", ""), out)


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

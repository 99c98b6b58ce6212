"""An encoder in timm's format gives timm's embeddings, and its description rebuilds it.

python -m pytest tests/local/encoders/test_from_timm.py
"""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from local.encoders.load import load_encoder
from tests.local.encoders import models
from tests.local.encoders.models import RESNET, assert_rebuilds, assert_same, embed, embed_with_timm, write_timm


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_resnet", None),
        ("test_resnet", {}),
        ("test_resnet", {"act_layer": "gelu", "output_stride": 16}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_vit", {"img_size": 64, "class_token": False, "global_pool": "avg", "act_layer": "relu"}),
        ("test_convnext", {"head_hidden_size": 20}),
    ],
)
def test_a_stem_gives_timms_embeddings_with_its_arguments(tmp_path, photos, architecture, arguments):
    original = write_timm(tmp_path, architecture, arguments)
    module, described = load_encoder(str(models.as_pair(tmp_path, "my.encoder v2")))
    expected = embed_with_timm(original, RESNET, photos)
    assert_same(embed(module, described, photos), expected)
    assert_rebuilds(module, described, photos)
    assert (described.library, described.architecture, described.features) == ("timm", architecture, expected.shape[1])
    assert described.packages == {"timm": timm.__version__}


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained_cfg": {**RESNET, "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "center"}},
        {"pretrained_cfg": {**RESNET, "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"}},
        {"pretrained_cfg": {**RESNET, "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"}},
        {"pretrained_cfg": None, **RESNET},  # older configurations have only one table
        {"num_classes": 1000},  # the head has five
        {"num_classes": 0},
        {"num_classes": None},
    ],
    ids=str,
)
def test_a_configuration_is_read_as_timm_reads_it(tmp_path, photos, changes):
    original = write_timm(tmp_path)
    models.change_config(tmp_path / "config.json", **changes)
    expected = embed_with_timm(original, changes.get("pretrained_cfg") or RESNET, photos)
    assert_same(embed(*load_encoder(str(tmp_path)), photos), expected)


@pytest.mark.parametrize(("key", "value"), [("crop_mode", "border"), ("interpolation", "lanczos")])
def test_preprocessing_that_the_kernel_does_not_support_is_refused(tmp_path, key, value):
    write_timm(tmp_path, **{key: value})
    assert f"{key} {value}" in models.refusal(tmp_path)


@pytest.mark.parametrize("is_safetensors", [True, False])
def test_a_folder_that_timm_saved_for_the_hub_gives_timms_embeddings(tmp_path, photos, is_safetensors):
    original, arguments = timm.create_model("test_resnet", num_classes=3, act_layer="gelu"), {"act_layer": "gelu"}
    models.randomise(original)
    timm.models.save_for_hf(original, tmp_path, model_args=arguments, safe_serialization=is_safetensors)
    assert (tmp_path / "model.safetensors").is_file() == is_safetensors
    module, described = load_encoder(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    own = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for expected in (original, own):
        assert_same(embed(module, described, photos), embed_with_timm(expected, config, photos))
    assert_rebuilds(module, described, photos)


def test_another_image_size_changes_the_preprocessing_and_not_the_weights(tmp_path, photos):
    original = write_timm(tmp_path)
    module, described = load_encoder(str(tmp_path), image_size=96)
    assert described.preprocessing.size == 96
    expected = embed_with_timm(original, {**RESNET, "input_size": [3, 96, 96]}, photos)
    assert_same(embed(module, described, photos), expected)


@pytest.mark.parametrize(
    ("arguments", "preprocessing"),
    [
        ({}, {"input_size": [3, 64, 64], "fixed_input_size": True}),
        ({}, {"input_size": [3, 64, 64]}),  # the architecture has a fixed size
        ({"img_size": 64}, {"input_size": [3, 160, 160], "fixed_input_size": True}),
    ],
)
def test_a_transformer_fine_tuned_at_another_size_is_built_at_that_size(tmp_path, photos, arguments, preprocessing):
    original = write_timm(tmp_path, "test_vit", {"img_size": 64})
    models.change_config(tmp_path / "config.json", model_args=arguments, pretrained_cfg=RESNET | preprocessing)
    module, described = load_encoder(str(tmp_path))
    assert (described.arguments, described.preprocessing.size) == ({"img_size": 64}, 64)
    assert_same(embed(module, described, photos), embed_with_timm(original, RESNET, photos))
    assert_rebuilds(module, described, photos)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_best.pth.tar", "last.pth"])
@pytest.mark.parametrize("form", models.CHECKPOINTS)
def test_the_model_is_read_from_a_training_checkpoint(tmp_path, photos, form, name):
    original = write_timm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(models.CHECKPOINTS[form](original.state_dict()), tmp_path / name)
    assert_same(embed(*load_encoder(str(tmp_path)), photos), embed_with_timm(original, RESNET, photos))


def test_a_timm_name_without_pretraining_has_weights_of_the_seed_and_timms_preprocessing():
    torch.manual_seed(1)
    module, described = load_encoder("timm:test_resnet", pretrained=False, image_size=48)
    torch.manual_seed(1)
    expected = timm.create_model("test_resnet", num_classes=0)
    assert all(map(torch.equal, module.state_dict().values(), expected.state_dict().values()))
    config, preprocessing = timm.get_pretrained_cfg("test_resnet"), described.preprocessing
    assert (preprocessing.size, described.features) == (48, expected.num_features)
    assert (preprocessing.mean, preprocessing.crop_pct) == (config.mean, config.crop_pct)
    assert load_encoder("timm:test_resnet", pretrained=False)[1].preprocessing.size == config.input_size[1]


def test_a_timm_name_with_a_tag_is_rebuilt_by_its_architecture(photos):
    module, described = load_encoder("timm:test_vit.r160_in1k", pretrained=False)
    assert described.architecture == "test_vit"
    assert_rebuilds(models.randomise(module), described, photos)


@pytest.mark.parametrize(("name", "near"), [("resnet10x", "resnet10t"), ("test_vot", "test_vit")])
def test_an_unknown_timm_name_is_refused_with_similar_names(name, near):
    message = models.refusal(f"timm:{name}", pretrained=False)
    assert message.startswith(f"timm has no model {name}: ")
    assert near in message


def test_an_unknown_tag_of_a_timm_name_is_refused():
    assert "test_resnet.nosuchtag" in models.refusal("timm:test_resnet.nosuchtag")


@pytest.mark.parametrize("size", [50, -5])
def test_an_image_size_that_the_architecture_does_not_accept_is_refused(size):
    message = models.refusal("timm:test_vit", pretrained=False, image_size=size)
    assert message.startswith(f"image_size = {size}: timm:test_vit does not accept ")


@pytest.mark.parametrize(
    ("architecture", "arguments", "output"),
    [
        ("test_resnet", {"global_pool": ""}, "shape (1, 96, 2, 2)"),
        ("test_vit", {"img_size": 64, "global_pool": ""}, "shape (1, 17, 64)"),
        ("test_resnet", {"features_only": True}, "a list"),
    ],
)
def test_a_model_that_does_not_return_one_vector_per_photo_is_refused(tmp_path, architecture, arguments, output):
    write_timm(tmp_path)
    models.change_config(tmp_path / "config.json", architecture=architecture, model_args=arguments)
    module = timm.create_model(architecture, num_classes=5, **arguments)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert f"returns {output} for a photo, expected one vector" in models.refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_damaged_safetensors_are_refused_with_their_path(tmp_path, keep):
    write_timm(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert models.refusal(tmp_path).startswith(f"{path} cannot be read as weights: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("architecture: test_resnet", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ('{"num_classes": 5}', "has no architecture None"),
        ('{"architecture": "nosuchmodel", "num_classes": 5}', "has no architecture 'nosuchmodel'"),
        ('{"architecture": "test_convnext", "num_classes": 5}', "model.safetensors does not match"),
        ('{"architecture": "test_resnet", "model_args": {"no_such_argument": 1}}', "no_such_argument"),
        ('{"architecture": "test_resnet", "model_args": [1]}', "model.safetensors does not match"),
        ('{"architecture": "test_resnet", "num_classes": "many"}', "model.safetensors does not match"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_path_and_the_problem(tmp_path, text, problem):
    write_timm(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    message = models.refusal(tmp_path)
    assert str(tmp_path / "config.json") in message
    assert problem in message

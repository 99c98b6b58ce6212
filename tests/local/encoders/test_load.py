"""What every form of `--encoder` has in common: refusals, the view `larger`, and runs.

python -m pytest tests/local/encoders/test_load.py
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kernel.encoders import build_module
from kernel.inputs import InputError
from kernel.manifest import read_manifest
from local.encoders.load import enable_larger_view, load_encoder, weights_digest
from local.recipes.settings import EncoderSettings
from tests.local.encoders.models import as_pair, refusal, write_clip, write_timm


@pytest.mark.parametrize(
    ("architecture", "arguments", "larger"),
    [
        ("test_resnet", {}, 96),
        ("test_vit", {"img_size": 64}, 96),
        ("test_vit", {"img_size": 112, "patch_size": 14}, 140),
    ],
    ids=["convolutional", "transformer", "patches of 14"],
)
def test_an_encoder_with_a_larger_view_is_unchanged_at_its_own_size(tmp_path, architecture, arguments, larger):
    size = arguments.get("img_size", 64)
    write_timm(tmp_path, architecture, arguments, input_size=[3, size, size])
    module, described = load_encoder(str(tmp_path))
    changed, enlarged = enable_larger_view(module, described)
    assert enlarged.preprocessing == replace(described.preprocessing, larger_size=larger)
    arguments = json.loads(json.dumps(enlarged.arguments))  # as the kernel reads them
    rebuilt = build_module(enlarged.library, enlarged.architecture, arguments).eval()
    rebuilt.load_state_dict(changed.state_dict(), strict=True)
    own, enlarged_pixels = torch.rand(2, 3, size, size), torch.rand(2, 3, larger, larger)
    with torch.inference_mode():
        assert torch.equal(changed(own), module.eval()(own))
        assert torch.equal(rebuilt(enlarged_pixels), changed(enlarged_pixels))


def test_an_encoder_of_one_size_refuses_the_larger_view_in_one_line(tmp_path):
    with pytest.raises(InputError, match="the view larger: clip only accepts photos of 32 pixels") as error:
        enable_larger_view(*load_encoder(str(write_clip(tmp_path / "clip"))))
    assert "\n" not in str(error.value)


def test_only_a_timm_name_can_have_random_weights(tmp_path):
    write_timm(tmp_path / "timm")
    clip = write_clip(tmp_path / "clip")
    for spec in (tmp_path / "timm", clip, "open_clip:ViT-B-32/openai", "hf-hub:owner/clip"):
        assert refusal(spec, pretrained=False).startswith(f"pretrained = false with the encoder {spec}: ")


SPECS = ["resnet18", "hub:owner/clip", "/nowhere/nothing", "hf-hub:", "hf-hub:clip", "hf-hub:a/b/c"]


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_form_is_refused_with_the_known_ones(spec):
    message = refusal(spec)
    assert message.startswith(f"no encoder {spec}: give ")
    assert "timm:NAME" in message


@pytest.mark.parametrize("missing", [".json", ".safetensors"])
def test_one_file_of_a_pair_is_refused_with_what_is_needed(tmp_path, missing):
    write_timm(tmp_path)
    stem = as_pair(tmp_path, "a")
    (tmp_path / f"a{missing}").unlink()
    message = refusal(stem)
    assert message.startswith(f"no encoder {stem}: ")
    assert missing in message


def test_a_folder_without_configuration_or_weights_is_refused_with_their_names(tmp_path):
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} contains no open_clip_config.json and no config.json: ")
    clip = write_clip(tmp_path / "clip")
    (clip / "open_clip_model.safetensors").unlink()
    assert refusal(clip).startswith(f"{clip} contains no weights: looked for open_clip_model.safetensors, ")
    write_timm(tmp_path / "timm")
    (tmp_path / "timm" / "model.safetensors").unlink()
    assert f"{tmp_path / 'timm'} contains no weights: looked for model.safetensors, " in refusal(tmp_path / "timm")


def test_a_folder_of_both_formats_is_read_in_the_format_that_is_named(tmp_path):
    write_timm(tmp_path)
    write_clip(tmp_path)
    for prefix, library in (("", "open_clip"), ("timm:local-dir:", "timm"), ("open_clip:local-dir:", "open_clip")):
        assert load_encoder(f"{prefix}{tmp_path}")[1].library == library


def test_the_digest_of_an_encoder_is_that_of_its_files_wherever_they_are(tmp_path):
    write_timm(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    digest = weights_digest(EncoderSettings(str(tmp_path / "a")))
    assert weights_digest(EncoderSettings(f"timm:local-dir:{tmp_path / 'b'}")) == digest != ""
    (tmp_path / "b" / "model.safetensors").write_bytes(b"other")
    assert weights_digest(EncoderSettings(str(tmp_path / "b"))) != digest
    assert weights_digest(EncoderSettings("timm:test_resnet")) == ""


def test_a_run_continues_with_its_own_encoder(trained):
    module, described = load_encoder(str(trained))
    weights = load_file(trained / "encoder.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    kept = read_manifest(trained / "manifest.json").members[0].encoders[0]
    assert described.preprocessing == kept.preprocessing
    assert (described.file, described.packages, described.learnt_from) == ("", kept.packages, kept.learnt_from)


def test_a_run_without_its_weights_is_refused_with_their_path(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "encoder.safetensors").unlink()
    assert refusal(tmp_path / "run").startswith(f"{tmp_path / 'run' / 'encoder.safetensors'} is missing: ")

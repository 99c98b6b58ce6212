"""Encoders are rebuilt from their description alone, exactly, or refused."""

import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kernel.encoders import build_module, describe_versions, make_encoder, open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.views import VIEWS
from tests.manifests import encoder_spec, member

SPEC = encoder_spec()


def saved(folder, module) -> Path:
    save_file(module.state_dict(), folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


def test_an_encoder_embeds_as_the_module_it_was_saved_from(tmp_path):
    module = build_module("timm", "test_resnet", {}).eval()
    encoder = open_encoder(saved(tmp_path, module), SPEC, [torch.device("cpu")])
    photos = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SPEC.preprocessing.mean, SPEC.preprocessing.std))
    with torch.inference_mode():
        expected = module((photos / 255 - mean) / std)
    found = encoder.embed(photos, [VIEWS["plain"]])[:, 0]
    assert found.shape == (3, expected.shape[1])
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert (torch.cosine_similarity(found, expected) > 0.99999).all()
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_opening_an_encoder_draws_no_random_weights(tmp_path):
    path = saved(tmp_path, build_module("timm", "test_resnet", {}))
    before = torch.get_rng_state()
    open_encoder(path, SPEC, [torch.device("cpu")])
    assert torch.equal(torch.get_rng_state(), before)
    build_module("timm", "test_resnet", {})
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ["levit_128s", "tiny_vit_5m_224"])
def test_an_encoder_whose_weights_have_changed_embeds_as_the_one_opened_from_them(tmp_path, architecture):
    """These cache their attention biases in evaluation mode. The biases must be those of the current weights."""
    torch.manual_seed(0)
    module = build_module("timm", architecture, {}).requires_grad_(False).eval()
    preprocessing = replace(SPEC.preprocessing, size=224)
    spec = encoder_spec(architecture=architecture, features=module.num_features, preprocessing=preprocessing)
    encoder = Encoder(module, preprocessing, module.num_features, [torch.device("cpu")])
    photos, views = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8), [VIEWS["plain"]]
    start = encoder.embed(photos, views)

    def load(state):
        module.load_state_dict(state)

    def change_in_place(state):
        for name, value in module.state_dict().items():
            value.copy_(state[name])

    for change in (load, change_in_place):
        moved = {
            name: value + 3 * torch.randn_like(value) if "attention_biases" in name else value.clone()
            for name, value in module.state_dict().items()
        }
        change(moved)
        found = encoder.embed(photos, views)
        opened = open_encoder(saved(tmp_path, module), spec, [torch.device("cpu")])
        assert torch.allclose(found, opened.embed(photos, views), atol=1e-6)
        assert not torch.allclose(found, start, atol=1e-3)
    assert not any(layer.training for layer in module.modules())


def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path):
    weights = saved(tmp_path, build_module("timm", "test_vit", {}))
    with pytest.raises(InputError, match="does not fit test_resnet") as error:
        open_encoder(weights, SPEC, [torch.device("cpu")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "resnet_of_next_year"}, "Unknown model (resnet_of_next_year)"),
        ({"arguments": {"an_argument_of_next_year": 1}}, "an_argument_of_next_year"),
        ({"arguments": {"act_layer": "an_activation_of_next_year"}}, "an_activation_of_next_year"),
        ({"library": "open_clip", "arguments": {"embed_dim": 8, "vision_cfg": {"of_next_year": 1}}}, "of_next_year"),
    ],
    ids=["architecture", "argument", "layer", "open_clip"],
)
def test_an_architecture_that_this_version_cannot_build_is_refused_in_one_line_with_both_versions(
    tmp_path, change, reason
):
    weights = saved(tmp_path, build_module("timm", "test_resnet", {}))
    spec = replace(SPEC, **change, packages={"timm": "9.9.9", "open_clip_torch": "9.9.9"})
    with pytest.raises(InputError, match=r"cannot be built by .* \(trained with 9\.9\.9\)") as error:
        open_encoder(weights, spec, [torch.device("cpu")])
    assert reason in str(error.value)
    assert (timm.__version__ if spec.library == "timm" else version("open_clip_torch")) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_versions_are_printed_together_with_those_of_the_training():
    members = [member(versions={"timm": trained, "torch": "2.10.0"}) for trained in ("1.0.26", "1.0.20", "1.0.26")]
    assert describe_versions(members) == (
        f"running with timm {timm.__version__} (trained with 1.0.20 and 1.0.26), "
        f"torch {torch.__version__} (trained with 2.10.0)"
    )


class OnFullGpu(torch.nn.Module):
    """A module for whose weights, or for whose photos, a GPU has no memory. The test needs no GPU."""

    def __init__(self, inner: torch.nn.Module, weights_fit: bool):
        super().__init__()
        self.inner, self.weights_fit, self.is_on_gpu = inner, weights_fit, False

    def load_state_dict(self, *arguments, **options):
        return self.inner.load_state_dict(*arguments, **options)

    def to(self, device, *arguments, **options):
        if device.type == "cpu":
            return super().to(device, *arguments, **options)
        self.inner.half()
        self.is_on_gpu = True
        if not self.weights_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self

    def forward(self, photos):
        if self.is_on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.inner(photos)


@pytest.mark.parametrize("weights_fit", [False, True], ids=["no memory for the weights", "none for one photo"])
def test_an_encoder_that_does_not_fit_on_the_gpu_runs_on_the_cpu(
    tmp_path, monkeypatch, capsys, one_thread, weights_fit
):
    module = build_module("timm", "test_resnet", {}).eval()
    weights, photos = saved(tmp_path, module), torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = open_encoder(weights, SPEC, [torch.device("cpu")]).embed(photos, [VIEWS["plain"]])
    monkeypatch.setattr("kernel.encoders.build_module", lambda *_: OnFullGpu(build_module(*_), weights_fit))
    monkeypatch.setattr(Encoder, "normalise", lambda encoder, photos, device: photos / 255)
    monkeypatch.setattr(Encoder, "_queue", Encoder._compute)
    full = replace(SPEC, precision="full")
    encoder = open_encoder(weights, full, [torch.device("cuda", 0)])
    monkeypatch.undo()
    assert torch.equal(encoder.embed(photos, [VIEWS["plain"]]), expected)  # no weight is left in half precision
    assert (encoder.devices, encoder.batch_size) == ([torch.device("cpu")], 16)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["out of memory: test_resnet does not fit on cuda:0", "continuing on the CPU"]


def test_the_picked_device_works():
    assert torch.ones(2, device=pick_devices()[0]).sum().item() == 2


def test_an_encoder_with_a_weight_too_large_for_half_precision_is_used_in_full_precision(monkeypatch, capsys):
    photos = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    module = build_module("timm", "test_resnet", {}).eval()
    module.bn1.running_var[0] = 1e5
    spec = replace(SPEC, precision="full")
    expected = make_encoder(copy.deepcopy(module), spec, [torch.device("cpu")]).embed(photos, [VIEWS["plain"]])
    monkeypatch.setattr("kernel.encoders.pick_dtype", lambda device, precision: torch.float16)
    encoder = make_encoder(module, SPEC, [torch.device("cpu")])
    assert torch.equal(encoder.embed(photos, [VIEWS["plain"]]), expected)
    assert "weights of this encoder overflow in half precision" in capsys.readouterr().out

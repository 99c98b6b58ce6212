"""The script opens with the model in words, read from the manifest and the banks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, Weights
from local.bundling.introduction import introduce
from tests.manifests import encoder_spec, manifest, member


def bank(index: int = 0, layers: int = 1, prototypes: int = 3, **scalars: float) -> dict[str, np.ndarray]:
    """The tensors that matter of one bank of a file."""
    values = {"logit_scale": 20.0, "mixture_weight": 1.0, "transduction": 0.0} | scalars
    tensors = {f"{index}.{name}": np.array(value, dtype=np.float32) for name, value in values.items()}
    tensors |= {f"{index}.layers.{layer}.weight": np.eye(8, dtype=np.float32) for layer in range(layers)}
    return tensors | {f"{index}.prototypes": np.zeros((prototypes, 8), dtype=np.float32)}


def introduction(folder: Path, *members) -> list[str]:
    return introduce(Weights(folder, replace(manifest(), members=members)), "digest", "commit").splitlines()


def test_a_run_is_its_encoder_views_and_bank(tmp_path):
    save_file(bank(layers=2, transduction=0.25), tmp_path / "bank.safetensors")
    counts, recipe = {"observations": 3, "photos": 1204}, {"matcher": "means", "reference": "train+val"}
    lines = introduction(tmp_path, member(recipe=recipe, views=("plain", "hflip"), reference_counts=counts))
    assert lines[lines.index("The model") + 1 : lines.index("The formula") - 1] == [
        "  competition  class-folders, 2 classes",
        "  encoder      test_resnet of timm, 96 features, half precision on a GPU",
        "  photos       64 x 64 pixels, resize_mode crop",
        "  views        2, the most useful first: plain, hflip",
        "  reference    train+val: 3 observations, 1,204 photos",
        "  bank         means: 3 prototypes of 8 features, after 2 layers, logit_scale 20, transduction 0.25",
    ]
    assert "  The classes are ranked by log p(c)." in lines
    assert lines[-2:] == ["  commit       commit", "  manifest     digest"]


def test_tiles_are_named_with_the_probability_of_a_class_in_an_answer(tmp_path):
    save_file(bank(), tmp_path / "bank.safetensors")
    plants = CompetitionSpec(name="plantclef", resolution="300p", time_limit=60)
    own = manifest(competition=plants, members=(member(views=("plain", "hflip")),), threshold=0.84)
    lines = introduce(Weights(tmp_path, own), "digest", "commit").splitlines()
    assert "  photos       64 x 64 pixels, resize_mode squash" in lines
    assert "  views        51, the most useful first: tiles, each ranked alone" in lines
    assert "  tiles        1 x 1, 3 x 3, 4 x 4, 5 x 5; an answer has the classes of p(c) >= 0.84 in a tile" in lines
    assert "  embedding    = normalize(normalize(encoder(view)))" in lines


def test_a_pooling_of_tokens_is_named_if_it_is_not_the_librarys(tmp_path):
    save_file(bank(), tmp_path / "bank.safetensors")
    lines = introduction(tmp_path, member(encoders=(encoder_spec(pool="token+avg"),)))
    both = "  pooling      the class token and the mean of the patches, concatenated"
    assert both in lines
    encoders = (encoder_spec(pool="token+avg"), encoder_spec(pool="stages"))
    named = member(encoders=encoders, banks=("bank.safetensors",) * 2, recipe={"pool_part": "token"})
    lines = introduction(tmp_path, named)
    embedding = "normalize(concatenation over the encoders e of a member of mean_e); the layers weight the encoders"
    assert f"  embedding    = {embedding}" in lines
    assert f"{both}, of which the bank uses the class token" in lines
    assert "  pooling      the final features and the means of the last feature maps, concatenated" in lines


def test_the_weights_of_several_encoders_are_named(tmp_path):
    save_file(bank(), tmp_path / "bank.safetensors")
    both = member(encoders=(encoder_spec(), encoder_spec()), banks=("1", "bank.safetensors"))
    for recipe, weights in (({}, ["1", "1"]), ({"encoder_weights": [1.0, 0.35]}, ["1", "0.35"])):
        lines = introduction(tmp_path, replace(both, recipe=recipe))
        found = [line.rpartition("GPU, weight ")[2] for line in lines if line.startswith("  encoder")]
        assert found == [f"{weight} in the bank" for weight in weights]


def test_an_ensemble_names_its_members_and_what_it_sums(tmp_path):
    save_file(bank(), tmp_path / "1")
    save_file(bank(0, mixture_weight=0.75) | bank(1, 0, 12, mixture_weight=0.25), tmp_path / "2")
    lines = introduction(
        tmp_path,
        member(banks=("1",), weight=0.625, run="first", recipe={"matcher": "means"}),
        member(
            banks=("2",),
            weight=0.375,
            run="a\nb",
            recipe={"matcher": "means", "nearest_neighbour_weight": 0.25},
            metadata_prior="prior",
            metadata_prior_weight=0.5,
        ),
    )
    assert "  member 1 of 2, weight 0.625, from the run first" in lines
    second = lines[lines.index("  member 2 of 2, weight 0.375, from the run a b") :]
    assert second[4:7] == [
        "  bank         means: 3 prototypes of 8 features, after 1 layer, logit_scale 20, 75% of the probability",
        "  bank         nearest neighbour: 12 prototypes of 8 features, logit_scale 20, 25% of the probability",
        "  metadata     log p(c | metadata) with weight 0.5",
    ]
    assert (
        "  The classes are ranked by the sum over the members of weight * log p(c) + the weighted log p(c | metadata)."
        in lines
    )


@pytest.mark.parametrize("tensors", [{"0.prototypes": np.zeros((3, 8))}, None], ids=["an earlier version", "damaged"])
def test_a_bank_that_cannot_be_read_is_named_in_one_line(tmp_path, tensors):
    if tensors:
        save_file(tensors, tmp_path / "bank.safetensors")
    else:
        (tmp_path / "bank.safetensors").write_bytes(b"12345678")
    with pytest.raises(
        InputError, match=r"^the bank of the run mine is not of this version \([^\n]*\): train it again$"
    ):
        introduction(tmp_path, member(run="mine"))

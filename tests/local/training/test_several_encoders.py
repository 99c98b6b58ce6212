"""Several encoders in one run: their embeddings are concatenated, and a kernel without time uses the first ones."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel.__main__ import embed_test_set, write_predictions
from kernel.bank import read_banks
from kernel.budget import UNLIMITED, Budget
from kernel.embeddings import concatenate, embed_observations
from kernel.encoders import open_encoder
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.manifest import read_weights
from kernel.observations import find_test_table
from kernel.ranking import rank
from kernel.start import Setup
from local.banks.estimators import pool
from local.data.cache import EmbeddingCache
from local.data.concatenated_encoders import ConcatenatedEncoders, embed_with_run
from local.recipes.recipe import read_recipe
from local.training.run import train_run
from tests.conftest import photo

NAMES = ("timm:test_resnet", "timm:test_efficientnet")
CPU = [torch.device("cpu")]


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    settings = ["pretrained=false", "image_size=[64,32]", "encoder_weights=[1,0.5]", 'views=["plain","hflip"]']
    recipe = read_recipe("fungiclef-baseline", settings, NAMES)
    out = tmp_path_factory.mktemp("several") / "run"
    train_run(recipe, drawn.competition, out)
    return out


def setup_of(run: Path, drawn, working: Path, budget: Budget = UNLIMITED) -> Setup:
    return Setup(read_weights(run), find_test_table(drawn.competition), budget, working, False)


def test_the_manifest_names_both_encoders_and_a_bank_for_each_number_of_them(run):
    [member] = read_weights(run).manifest.members
    assert [spec.architecture for spec in member.encoders] == ["test_resnet", "test_efficientnet"]
    assert [spec.preprocessing.size for spec in member.encoders] == [64, 32]
    assert member.recipe["encoder_weights"] == [1.0, 0.5]
    assert member.banks == ("bank-of-1.safetensors", "bank.safetensors")
    widths = [read_banks(run / name)[0].layers[0].weight.shape[0] for name in member.banks]
    assert widths == [member.encoders[0].features, sum(spec.features for spec in member.encoders)]


def test_the_kernel_embeds_as_training_did(run, drawn, tmp_path):
    setup = setup_of(run, drawn, tmp_path)
    [member], observations = setup.weights.manifest.members, setup.table.observations
    embedded, _ = embed_test_set(setup)
    in_kernel = concatenate([one.pooled for one in embedded])
    trained = embed_with_run(run, observations, member.views, tmp_path / "cache")
    assert np.allclose(pool(trained.values, trained.observations, len(observations)), in_kernel, atol=2e-3)
    parts = torch.cat([one.pooled for one in embedded], dim=1)
    assert torch.allclose(in_kernel, parts / parts.norm(dim=1, keepdim=True), atol=1e-6)


def test_the_kernel_predicts_with_both_and_with_the_first_if_there_is_no_time_for_the_second(run, drawn, tmp_path):
    setup = setup_of(run, drawn, tmp_path)
    guesses = setup.table.competition.guesses
    embedded, device = embed_test_set(setup)
    class_ids = setup.weights.manifest.class_ids

    def expected(own, bank: str) -> list[list[str]]:
        values = concatenate([one.pooled for one in own])
        ranked = rank([read_banks(run / bank)], [1.0], [values], guesses, None)[0]
        return [[class_ids[index] for index in row] for row in ranked.tolist()]

    answers = {}
    for number, bank in ((2, "bank.safetensors"), (1, "bank-of-1.safetensors")):
        assert write_predictions(setup, embedded[:number], device) == 0
        answers[number] = (tmp_path / "submission.csv").read_text()
        rows = [line.split(",")[1].split() for line in answers[number].splitlines()[1:]]
        assert rows == expected(embedded[:number], bank)
    assert answers[1] != answers[2]


def test_the_bank_weights_the_encoders(run, drawn, tmp_path):
    unweighted = tmp_path / "run"
    settings = ["pretrained=false", "image_size=[64,32]", 'views=["plain","hflip"]']
    train_run(read_recipe("fungiclef-baseline", settings, NAMES), drawn.competition, unweighted)
    [half], [whole] = (read_banks(path / "bank.safetensors")[0].layers for path in (run, unweighted))
    features = [spec.features for spec in read_weights(run).manifest.members[0].encoders]
    expected = torch.repeat_interleave(torch.tensor([1.0, 0.5]), torch.tensor(features))[:, None]
    assert torch.allclose(half.weight, expected * whole.weight, atol=1e-3)
    alone, other = (read_banks(path / "bank-of-1.safetensors")[0] for path in (run, unweighted))
    assert torch.allclose(alone.layers[0].weight, other.layers[0].weight, atol=1e-3)
    assert torch.allclose(alone.prototypes, other.prototypes, atol=1e-3)


def test_cross_validation_chooses_the_weights_and_the_part_of_a_pooling(drawn, tmp_path):
    choose = 'choose=["pool_part","encoder_weights"]'
    settings = ["pretrained=false", 'pool=["token+avg","stages"]', choose, 'views=["plain"]']
    recipe = read_recipe("fungiclef-baseline", settings, ("timm:test_vit", "timm:test_resnet"))
    train_run(recipe, drawn.competition, tmp_path / "run")
    with (tmp_path / "run/candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["value"] for row in rows if row["key"] == "pool_part"} == {"all", "token", "avg", "final"}
    assert {row["value"] for row in rows if row["key"] == "encoder_weights"} >= {"equal", "1.0 0.5", "0.5 1.0"}
    [member] = read_weights(tmp_path / "run").manifest.members
    setup = setup_of(tmp_path / "run", drawn, tmp_path)
    embedded, device = embed_test_set(setup)
    assert write_predictions(setup, embedded, device) == 0
    [layer] = read_banks(tmp_path / "run/bank.safetensors")[0].layers
    token = member.encoders[0].features // 2
    used = {"all": (True, True), "token": (True, False), "avg": (False, True), "final": (True, True)}
    expected = used[member.recipe["pool_part"]]
    assert (bool(layer.weight[:token].any()), bool(layer.weight[token : 2 * token].any())) == expected


def test_a_run_of_one_encoder_with_one_pooling_does_not_claim_to_have_chosen_weights_or_a_part(drawn, tmp_path):
    choose = 'choose=["encoder_weights","pool_part","whitening"]'
    recipe = read_recipe("fungiclef-baseline", ["pretrained=false", choose, 'views=["plain"]'], NAMES[0])
    train_run(recipe, drawn.competition, tmp_path / "run")
    assert read_recipe(str(tmp_path / "run/recipe.toml")).search.choose == ("whitening",)
    train_run(recipe, drawn.competition, tmp_path / "run", resumes=True)  # as the same run


def test_an_encoder_for_which_there_is_no_time_is_left_out(run, drawn, tmp_path, monkeypatch, capsys):
    now = [0.0]

    def slow(self, photos, views, submit=Encoder.submit):
        now[0] += len(photos) * len(views) * (1.0 if self.preprocessing.size == 64 else 1e6)
        return submit(self, photos, views)

    monkeypatch.setattr(Encoder, "submit", slow)
    setup = setup_of(run, drawn, tmp_path, Budget(10_000.0, 0.0, lambda: now[0]))
    embedded, _ = embed_test_set(setup)
    assert len(embedded) == 1
    assert embedded[0].late == 0
    assert "no time for it and the encoders after it" in capsys.readouterr().out


def test_photos_that_one_encoder_cannot_read_are_left_out_of_both(encoder, tmp_path, monkeypatch):
    from kernel.observations import Observation

    paths = [photo(tmp_path / f"{number}.jpg", number) for number in range(6)]
    observations = [Observation("a", tuple(paths[:2])), Observation("b", tuple(paths[2:]))]
    other = Encoder(encoder.module, replace(encoder.preprocessing, resize_mode="squash"), encoder.features, CPU)
    whole = ConcatenatedEncoders((encoder, other)).embed(observations, ["plain"], tmp_path / "cache")
    embed = EmbeddingCache.embed

    def lose_one(self, observations, views, rounds=1):
        found = embed(self, observations, views, rounds)
        lost = {"crop": 1, "squash": 3}[self.encoder.preprocessing.resize_mode]
        keep = np.arange(6) != lost
        return replace(
            found, values=found.values[keep], observations=found.observations[keep], unreadable=[(paths[lost], "lost")]
        )

    monkeypatch.setattr(EmbeddingCache, "embed", lose_one)
    found = ConcatenatedEncoders((encoder, other)).embed(observations, ["plain"], tmp_path / "cache")
    assert found.observations.tolist() == [0, 1, 1, 1]
    assert found.unreadable == [(paths[1], "lost"), (paths[3], "lost")]
    assert np.array_equal(found.values, whole.values[[0, 2, 4, 5]])
    assert np.allclose(np.linalg.norm(whole.values.astype(float), axis=2), 1, atol=1e-3)


def test_a_part_of_a_pooling_that_no_encoder_has_is_refused(drawn, tmp_path):
    recipe = read_recipe("fungiclef-baseline", ["pretrained=false", "pool_part=token", "pool=stages"], NAMES)
    with pytest.raises(InputError, match='pool_part = token: no encoder has this part: set pool = "token\\+avg"'):
        train_run(recipe, drawn.competition, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochs=1"], "several encoders are used as they are: set epochs = 0"),
        (["image_size=[64,32,96]"], "image_size has 3 values for 2 encoders"),
        (["encoder_weights=[1,0]"], "expected 0 < encoder_weights <= 1000000"),
        (["encoder_weights=[1]"], "encoder_weights has 1 values for 2 encoders"),
        (["encoder_weights=[1,a]"], r"expected a list of numbers for encoder_weights, got \['\[1', 'a\]'\]"),
        (['pool=["auto","best"]'], "expected one of auto, token, avg, token\\+avg, stages for pool"),
    ],
)
def test_settings_that_do_not_fit_several_encoders_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        read_recipe("fungiclef-baseline", settings, NAMES)


def test_any_number_of_encoders_may_have_weights():
    recipe = read_recipe("fungiclef-baseline", [f"encoder_weights={[0.5] * 12}"], NAMES * 6)
    assert recipe.bank.encoder_weights == (0.5,) * 12


def test_other_encoders_on_the_command_line_do_not_get_the_sizes_of_those_in_the_file():
    recipe = read_recipe("fungiclef-winner")
    assert [one.image_size for one in recipe.encoder.each] == [384, 434, 518, 1024]
    assert [one.image_size for one in read_recipe("fungiclef-winner", [], NAMES).encoder.each] == [0, 0]
    both = read_recipe("fungiclef-winner", ["image_size=[64,32]"], NAMES).encoder.each
    assert [(one.name, one.image_size) for one in both] == [(NAMES[0], 64), (NAMES[1], 32)]


def test_a_run_of_several_encoders_is_no_single_encoder(run, drawn, tmp_path):
    with pytest.raises(InputError, match="has 2 encoders"):
        train_run(read_recipe("fungiclef-baseline", [], str(run)), drawn.competition, tmp_path / "next")


def test_one_encoder_is_embedded_as_before(trained, drawn):
    weights = read_weights(trained)
    [spec] = weights.manifest.members[0].encoders
    observations = find_test_table(drawn.competition).observations
    found = embed_observations(open_encoder(weights.file(spec.file), spec, CPU), observations, ["plain"])
    assert torch.allclose(found.values, torch.nn.functional.normalize(found.pooled, dim=1))

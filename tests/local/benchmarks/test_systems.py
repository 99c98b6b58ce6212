"""Recipes are compared with the published systems, on the same photos by the same encoder."""

import shutil

import pytest

from kernel.inputs import InputError
from local.benchmarks.accuracy import export_encoder
from local.benchmarks.systems import RULES, systems
from local.recipes.recipe import read_recipe


@pytest.fixture(scope="module")
def answered(drawn, tmp_path_factory):
    """A competition with its test labels."""
    data = tmp_path_factory.mktemp("answered") / "fungi"
    shutil.copytree(drawn.competition, data)
    shutil.copyfile(drawn.solution, data / "solution.csv")
    return data


@pytest.mark.slow
def test_a_system_and_its_recipe_are_scored_on_the_same_observations(answered, trained, tmp_path, capsys):
    spec = export_encoder(trained, tmp_path / "encoder")
    report = systems([answered], spec, ["fungitastic-multitask", "fungiclef-protonet"], ["epochs=1"])["datasets"][0]
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "fungitastic-multitask: the original's rules",
        "fungitastic-multitask, species alone",
        "fungitastic-multitask",
        "fungiclef-protonet: the original's rules",
        "fungiclef-protonet",
    ]
    assert all(0 <= row[name] <= 1 for row in report["rows"] for name in ("recall_at_1", "weighted_f1"))
    assert [row["gain"] is None for row in report["rows"]] == [True, False, False, True, False]
    groups = [row["groups"] for row in report["ranks"] if "alone" not in row["recipe"]]
    assert groups == sorted(groups)  # from the widest rank to the species
    assert len(groups) > 1
    assert "| fungitastic-multitask |" in capsys.readouterr().out


def test_every_system_has_a_recipe_and_another_name_is_refused(answered):
    assert all(read_recipe(name).train.epochs for name in RULES)
    with pytest.raises(InputError, match="choose from fungiclef-protonet"):
        systems([answered], "timm:test_resnet", ["demo"], [])

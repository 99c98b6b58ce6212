"""Class names in a run: blended into its prototypes at training, and no part of its bundle."""

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from bundle import bundle
from kernel.bank import read_banks
from kernel.inputs import InputError
from kernel.manifest import read_weights
from local.banks.estimators import l2_normalize
from local.base.run_folder import CACHE
from local.data.competition import read_competition
from local.data.concatenated_encoders import embed_with_run
from local.encoders.texts import write_texts
from local.recipes.recipe import read_recipe
from local.training.run import train_run
from tests import layouts
from tests.conftest import command, photo
from tests.layouts import SPECIES
from tests.local.encoders.models import TEXT, write_clip

READS_WORDS = {**TEXT, "vocab_size": 49408, "context_length": 20}  # of open_clip's tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("names") / "fungi"
    layouts.fungiclef(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("names") / "clip", text_cfg=READS_WORDS)


def train(encoder: object, data: Path, out: Path, *settings: str) -> Path:
    train_run(read_recipe("fungiclef-baseline", ["views=plain", *settings], str(encoder)), data, out)
    return out


def test_a_run_blends_the_names_into_its_prototypes_and_its_bundle_predicts_without_a_text_tower(data, clip, tmp_path):
    run = train(clip, data, tmp_path / "runs" / "named", "text_weight=2")
    labelled, weights = read_competition(data), read_weights(run)
    classes = list(weights.manifest.class_ids)

    photos = embed_with_run(run, labelled.observations, ["plain"], run.parent / CACHE)
    values = photos.values[:, 0].astype(float)
    pooled = l2_normalize(np.stack([values[photos.observations == one].mean(axis=0) for one in range(9)]))
    images = l2_normalize(pooled - pooled.mean(axis=0))
    means = np.stack([images[labelled.class_ids == class_id].mean(axis=0) for class_id in classes])
    model, tokenizer = open_clip.create_model(f"local-dir:{clip}").eval(), open_clip.get_tokenizer(f"local-dir:{clip}")
    tokens = [tokenizer(write_texts(SPECIES[class_id][-1], SPECIES[class_id][:-1])) for class_id in classes]
    with torch.inference_mode():
        texts = [model.encode_text(own, normalize=True).mean(dim=0).numpy() for own in tokens]
    texts = l2_normalize(l2_normalize(np.stack(texts)) - l2_normalize(np.stack(texts)).mean(axis=0))
    blended = 3 * means + 2 * texts * np.linalg.norm(means, axis=1).mean()  # of three observations each
    [bank] = read_banks(run / "bank.safetensors")
    assert np.allclose(bank.prototypes, l2_normalize(blended), atol=2e-3)
    assert not np.allclose(bank.prototypes, l2_normalize(means), atol=0.1)
    assert weights.manifest.members[0].recipe["text_weight"] == 2

    bundle([run], tmp_path / "build")
    kept = json.loads((tmp_path / "build" / "weights" / "manifest.json").read_text())["members"][0]
    tower = run / weights.manifest.members[0].encoders[0].file
    assert kept["recipe"]["text_weight"] == 2
    assert tower.stat().st_size < (clip / "open_clip_model.safetensors").stat().st_size / 10
    folders = ["--input", tmp_path / "input", "--working", tmp_path / "working"]
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "competition").symlink_to(data)
    (tmp_path / "input" / "weights").symlink_to(tmp_path / "build" / "weights")
    result = command("-P", tmp_path / "build" / "kernel.py", *folders, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "working" / "submission.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [len(set(row[1].split())) for row in rows] == [3] * 12
    assert len({row[1] for row in rows}) > 1  # not the fallback


def test_cross_validation_compares_the_weights_of_the_names(data, clip, tmp_path, capsys):
    run = train(clip, data, tmp_path / "run", "choose=text_weight")
    with (run / "candidates.csv").open(newline="") as file:
        rows = [(row["key"], float(row["value"])) for row in csv.DictReader(file)]
    assert rows[:4] == [("text_weight", value) for value in (0, 0.5, 1, 2)]
    assert "names: 3 classes of 3 in the space of the photos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("encoders", "settings", "reason"),
    [
        (["timm:test_resnet"], ["pretrained=false"], "timm:test_resnet has no text tower"),
        (["clip", "clip"], [], "several encoders have no text tower in common"),
        (["clip"], ["pool=avg"], "pool = avg is not in the space of the text tower"),
        (["clip"], ["matcher=logistic"], 'it shrinks class means, and the matcher is "logistic"'),
    ],
)
def test_where_names_cannot_be_used_a_weight_is_refused_and_a_choice_of_weights_left_out(
    data, clip, tmp_path, capsys, encoders, settings, reason
):
    names = [str(clip) if name == "clip" else name for name in encoders]
    settings = ["views=plain", *settings]
    recipe = read_recipe("fungiclef-baseline", [*settings, 'choose=["whitening","text_weight"]'], names)
    train_run(recipe, data, tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "text_weight" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"text_weight is not chosen: {reason}")
    assert read_weights(tmp_path / "run").manifest.members[0].recipe["choose"] == ["whitening"]
    with pytest.raises(InputError) as refused:
        train_run(read_recipe("fungiclef-baseline", [*settings, "text_weight=1"], names), data, tmp_path / "weight")
    assert str(refused.value).startswith(f"text_weight does not work here: {reason}")
    assert not (tmp_path / "weight").exists()


def test_a_weight_for_an_encoder_that_is_trained_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="text_weight does not work here: an encoder that is trained leaves"):
        read_recipe("fungiclef-baseline", ["text_weight=1", "epochs=2"])


def test_classes_without_names_have_no_choice_of_weights(clip, tmp_path, capsys):
    for number in range(12):
        photo(tmp_path / "data" / str(number % 3) / f"{number}.jpg", number)
    train(clip, tmp_path / "data", tmp_path / "run", "choose=text_weight")
    assert "text_weight is not chosen: fewer than two classes have a name" in capsys.readouterr().out

"""A bundle of several runs has the ensemble's own score."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel.bank import read_banks
from kernel.inputs import sha256
from kernel.manifest import MANIFEST, Weights, read_manifest, write_manifest
from local.banks.ensemble import HeldOutPredictions, weigh_runs
from local.banks.estimators import save_banks
from local.base.run_folder import VALIDATION_FILE
from local.base.runs import scores_of
from local.bundling.weights import gather_weights, in_order, mean_threshold
from local.bundling.wheels import IMAGE
from tests import manifests
from tests.conftest import trained_with

QUERIES = 300


def runs_that_err_differently(trained: Path, folder: Path) -> list[Path]:
    """Copies of a run, each with predictions of its own for the same held-out observations."""
    runs = [trained_with(trained, folder / name, IMAGE["timm"]) for name in ("a", "b")]
    classes = list(read_manifest(trained / MANIFEST).class_ids)
    truth = torch.tensor(np.random.default_rng(0).integers(0, len(classes), QUERIES))
    for seed, run in enumerate(runs):
        noise = torch.randn(QUERIES, len(classes), generator=torch.Generator().manual_seed(seed))
        logs = (3.0 * torch.nn.functional.one_hot(truth, len(classes)) + 1.6 * noise).log_softmax(dim=1)
        names = [str(number) for number in range(QUERIES)]
        HeldOutPredictions(names, classes, logs, truth.numpy(), np.ones(QUERIES)).write(run / VALIDATION_FILE)
    return runs


def test_an_ensemble_is_scored_by_its_own_predictions(trained, tmp_path, capsys):
    runs = runs_that_err_differently(trained, tmp_path)
    (tmp_path / "weights").mkdir()
    gather_weights(runs, tmp_path / "weights")
    manifest = read_manifest(tmp_path / "weights" / MANIFEST)
    assert len(manifest.members) == 2
    assert manifest.validation == weigh_runs(runs, 10).scores(is_macro=False, seed=0)
    assert scores_of(manifest) == manifest.validation
    assert manifest.validation["recall_at_1"] > max(member.validation["recall_at_1"] for member in manifest.members)
    assert "predicted with the weights that the others choose: Recall@1 " in capsys.readouterr().out


def test_the_score_of_runs_that_cannot_be_compared_is_not_that_of_one_of_them(trained, tmp_path, capsys):
    runs = runs_that_err_differently(trained, tmp_path)
    shutil.copyfile(trained / VALIDATION_FILE, runs[1] / VALIDATION_FILE)
    (tmp_path / "weights").mkdir()
    gather_weights(runs, tmp_path / "weights")
    manifest = read_manifest(tmp_path / "weights" / MANIFEST)
    assert len(manifest.members) == 2
    assert scores_of(manifest) == {}
    assert "the score of the ensemble is not known" in capsys.readouterr().out
    assert scores_of(dataclasses.replace(manifest, members=manifest.members[:1])) == manifest.members[0].validation


def test_runs_with_the_same_encoder_share_its_file(trained, tmp_path):
    runs = runs_that_err_differently(trained, tmp_path)
    manifest = read_manifest(runs[1] / MANIFEST)
    [name] = manifest.members[0].banks
    [bank] = read_banks(runs[1] / name)
    save_banks([dataclasses.replace(bank, bias=bank.bias + 1)], runs[1] / name)
    files = manifest.files | {name: sha256(runs[1] / name)}
    write_manifest(dataclasses.replace(manifest, files=files), runs[1] / MANIFEST)
    (tmp_path / "weights").mkdir()
    gather_weights(runs, tmp_path / "weights")
    bundled = read_manifest(tmp_path / "weights" / MANIFEST)
    first, second = bundled.members
    assert first.encoders == second.encoders
    assert first.banks != second.banks
    assert {*first.banks, *second.banks, first.encoders[0].file} <= bundled.files.keys()
    assert sum("encoder" in name for name in bundled.files) == 1


def test_the_threshold_of_an_ensemble_is_the_weighted_mean_of_those_of_its_runs():
    runs = [Weights(Path(), manifests.manifest(threshold=threshold)) for threshold in (0.8, 0.4)]
    assert mean_threshold(list(zip(runs, (0.75, 0.25), strict=True))) == pytest.approx(0.7)
    assert mean_threshold([(runs[1], 1.0)]) == 0.4
    assert mean_threshold([(Weights(Path(), manifests.manifest()), 1.0)]) is None


def test_the_first_run_of_an_ensemble_is_that_of_the_lowest_log_loss_where_that_is_the_metric():
    settings = {"header": ["id", "elm", "oak"], "classes": ["elm", "oak"]}
    competition = manifests.manifest().competition
    runs = [
        Weights(
            Path(name),
            manifests.manifest(
                competition=dataclasses.replace(competition, settings=own),
                members=(manifests.member(validation={"recall_at_1": recall, "log_loss": loss}),),
            ),
        )
        for own in ({}, settings)
        for name, recall, loss in (("a", 0.8, 0.9), ("b", 0.7, 0.5))
    ]
    assert [run.folder.name for run, _ in in_order(runs[:2], [0.5, 0.5])] == ["a", "b"]
    assert [run.folder.name for run, _ in in_order(runs[2:], [0.5, 0.5])] == ["b", "a"]

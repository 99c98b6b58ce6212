"""The benchmark scores methods as Kaggle would, on observations by which nothing was chosen.

python -m pytest tests/local/benchmarks/test_accuracy.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle import bundle
from kernel.inputs import InputError
from kernel.manifest import MANIFEST, read_manifest, read_weights, write_manifest
from kernel.ranking import rank
from local import benchmark
from local.base.metrics import METRIC_NAMES, bounded
from local.base.run_folder import CACHE
from local.benchmarks.accuracy import (
    export_encoder,
    method_table,
    score_methods,
    score_sparse,
    shots_table,
    sparse_table,
)
from local.benchmarks.methods import (
    DRAWS,
    MethodAnswers,
    answer_with_bundle,
    draw_sparse,
    label,
    nearest_means,
    open_bundle,
    read_task,
    run_methods,
)
from local.data.competition import read_competition
from local.encoders.load import load_encoder
from local.recipes.recipe import make_recipe
from local.rehearsal.report import rehearse
from local.training.run import train_run
from tests.conftest import TINY

SCORES = [f"{name}{end}" for name in METRIC_NAMES for end in ("", "_low", "_high")]


@pytest.fixture(scope="module")
def answered(drawn, tmp_path_factory) -> Path:
    """The drawn competition with its test labels."""
    data = tmp_path_factory.mktemp("answered") / "fungi"
    shutil.copytree(drawn.competition, data)
    shutil.copyfile(drawn.solution, data / "solution.csv")
    return data


@pytest.fixture(scope="module")
def encoders(drawn, trained, tmp_path_factory) -> list[str]:
    """A trained and a random encoder, as values of `--encoder`."""
    folder = tmp_path_factory.mktemp("encoders")
    train_run(make_recipe({**TINY, "epochs": 0, "seed": 5}, "the tests"), drawn.competition, folder / "random")
    return [export_encoder(trained, folder / "tuned"), export_encoder(folder / "random", folder / "untuned")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def task(answered):
    return read_task(answered, "train")


@pytest.fixture(scope="module")
def answers(task, encoders, runs):
    """Without the recipes that take long, whose runs are like the others."""
    return run_methods(task, encoders, runs, ["fungiclef-baseline", "fungiclef-winner"])


@pytest.fixture(scope="module")
def report(task, answers) -> dict:
    return score_methods(task, answers)


@pytest.mark.parametrize("name", ["fungiclef-baseline, tuned", "their ensemble", "fungiclef-winner, together"])
def test_a_run_scores_as_the_rehearsal_of_its_bundle_does(name, report, runs, answered, tmp_path):
    of = {"their ensemble": ["tuned-fungiclef-baseline", "untuned-fungiclef-baseline"]}
    bundle([runs / f"fungi-{run}" for run in of.get(name, ["-".join(reversed(name.split(", ")))])], tmp_path)
    rehearsed = rehearse(answered, tmp_path, answered / "solution.csv")
    found = next(row for row in report["methods"] if row["method"] == name)
    assert {name: found[name] for name in SCORES} == {name: rehearsed.scores[name] for name in SCORES}


@pytest.mark.parametrize("resize_mode", ["crop", "squash"])
def test_an_exported_encoder_has_the_preprocessing_of_its_run(trained, tmp_path, resize_mode):
    shutil.copytree(trained, tmp_path / "run")
    manifest = read_manifest(trained / MANIFEST)
    member = manifest.members[0]
    [encoder] = member.encoders
    preprocessing = replace(encoder.preprocessing, resize_mode=resize_mode)
    encoder = replace(encoder, preprocessing=preprocessing)
    changed = replace(manifest, members=(replace(member, encoders=(encoder,)),))
    write_manifest(changed, tmp_path / "run" / MANIFEST)
    _, described = load_encoder(export_encoder(tmp_path / "run", tmp_path / "exported"))
    assert described.preprocessing == preprocessing


def test_all_encoders_are_compared_with_the_better_run_of_one(report, encoders):
    gains = {row["method"]: row["gain"] for row in report["methods"]}
    alone = [f"fungiclef-baseline, {label(spec)}" for spec in encoders]
    assert gains["their ensemble"]["over"] == gains["fungiclef-winner, together"]["over"] in alone


def test_methods_with_one_encoder_are_compared_with_the_one_before(report):
    names = [row["method"] for row in report["methods"][:3]]
    assert [row["gain"] and row["gain"]["over"] for row in report["methods"][:3]] == [None, *names[:2]]


def test_the_starter_guesses_at_most_once_for_each_photo(answers, task):
    queries = task.queries("300p")
    assert any(len(query.photos) > 1 for query in queries)
    for starter in (one for one in answers if one.name.startswith("starter")):
        for guesses, query in zip(starter.guesses, queries, strict=True):
            assert 1 <= len(guesses) <= len(query.photos)
            assert len(set(guesses)) == len(guesses)


def test_the_starter_guesses_the_class_nearest_to_each_photo_the_most_similar_first():
    means = np.array([[2.0, 0.0], [0.0, 0.5]])
    photos = np.array([[1.0, 0.9], [0.1, 1.0], [1.0, 0.0], [1.0, 0.2]])
    assert nearest_means(photos, np.array([0, 0, 2, 2]), means, 3) == [[1, 0], [], [0]]


def test_only_methods_with_probabilities_have_a_log_loss(report):
    without = [row["method"] for row in report["methods"] if row["log_loss"] is None]
    assert without == [row["method"] for row in report["methods"] if row["method"].startswith("starter")]


def test_the_parts_by_shots_add_up_to_the_whole(report, task):
    parts = report["by_shots"]
    sizes = np.array([part["observations"] for part in parts])
    assert sizes.sum() == report["observations"] == len(task.queries("300p"))
    for row in report["methods"]:
        recalls = np.array([part["recall_at_5"][row["method"]]["value"] for part in parts])
        assert (recalls * sizes).sum() / sizes.sum() == pytest.approx(row["recall_at_5"])


def test_shots_are_counted_in_the_reference(report, task):
    counts = dict(zip(*np.unique(task.support("300p").class_ids.astype(str), return_counts=True), strict=True))
    ones = [query for query in task.queries("300p") if counts.get(task.truth[query.id]) == 1]
    assert [part["observations"] for part in report["by_shots"] if part["shots"] == "1"] == [len(ones)]


def test_a_sparse_test_set_has_a_quarter_of_the_classes_and_one_or_two_observations_of_each():
    truth = np.repeat([f"{number}" for number in range(20)], [1] * 5 + [9] * 15)
    draws = draw_sparse(truth, classes=40)
    assert len(draws) == DRAWS
    for rows in draws:
        names, counts = np.unique(truth[rows], return_counts=True)
        assert len(names) == 10
        assert set(counts) <= {1, 2}
        assert len(set(rows)) == len(rows)
    drawn = np.bincount(np.concatenate(draws), minlength=len(truth))
    assert drawn.min() > 0  # no query is left out of all draws
    assert np.mean([len(rows) for rows in draws]) == pytest.approx(10 * (0.25 * 1 + 0.75 * 1.5), rel=0.05)


def test_a_sparse_test_set_has_no_more_classes_than_there_are():
    assert {tuple(rows) for rows in draw_sparse(["a", "b"], classes=100)} == {(0, 1)}


def test_transduction_sees_the_queries_of_a_sparse_test_set_alone(task, encoders, runs, answers):
    run = runs / f"fungi-{label(encoders[1])}-fungiclef-baseline"
    found = open_bundle(task, [run], [1.0], runs / CACHE)
    [member] = found.members
    banks = [replace(bank, transduction=torch.tensor(20.0)) for bank in member.banks]
    moved = answer_with_bundle(task, replace(found, members=[replace(member, banks=banks)]), "moved", None)
    classes = found.manifest.class_ids
    for rows, guesses in zip(task.draws, moved.sparse, strict=True):
        alone = rank([banks], [1.0], [member.embeddings[torch.tensor(rows)]], 10)[0]
        assert guesses == [[classes[index] for index in row] for row in alone.tolist()]
    assert any(
        guesses != [moved.guesses[row] for row in rows] for rows, guesses in zip(task.draws, moved.sparse, strict=True)
    )
    assert answer_with_bundle(task, found, "fixed", None).sparse is None


def test_sparse_scores_are_means_over_the_draws():
    truth = ["a", "b", "c", "d"]
    draws = [np.array([0, 1]), np.array([0, 2]), np.array([0, 2])]
    fixed = MethodAnswers("fixed", [["a"], ["x", "b"], ["x"], ["d"]])
    moved = MethodAnswers("moved", [["x"]] * 4, None, fixed, [[["a"], ["b"]], [["x"], ["c"]], [["x", "a"], ["x"]]])
    report = score_sparse(draws, truth, [fixed, moved])
    first, second = report["methods"]
    assert (report["draws"], report["classes"], report["observations"]) == (3, 2, 2.0)
    assert (first["recall_at_1"], first["recall_at_5"]) == (pytest.approx(3 / 6), pytest.approx(4 / 6))
    assert (second["recall_at_1"], second["recall_at_5"]) == (pytest.approx(3 / 6), pytest.approx(4 / 6))
    gains = np.array([2 / 3 - 1, 0, 1 / 2])  # query by query, over its draws
    assert second["gain"] == {"over": "fixed", **bounded(gains, np.array([3.0, 1.0, 2.0]))}


def test_a_method_that_is_not_transductive_scores_the_same_on_sparse_test_sets_of_all_queries(answers, task):
    truth = [task.truth[query.id] for query in task.queries("300p")]
    whole = score_methods(task, answers)["methods"]
    sparse = score_sparse([np.arange(len(truth))], truth, [one for one in answers if not one.sparse])
    scores = {row["method"]: row["recall_at_5"] for row in whole}
    for row in sparse["methods"]:
        assert row["recall_at_5"] == pytest.approx(scores[row["method"]])


def test_the_tables_have_a_row_for_each_method_and_a_dash_for_a_missing_score(report):
    scores, sparse, shots = method_table(report), sparse_table(report), shots_table(report)
    for table in (scores, sparse):
        columns = {line.count("|") for line in table if line.startswith("|")}
        assert len(columns) == 1
        names = [line.split(" | ")[0].removeprefix("| ") for line in table[-len(report["methods"]) :]]
        assert names == [row["method"] for row in report["methods"]]
    assert next(line for line in scores if line.startswith("| starter")).endswith("| – | – |")
    assert len({line.count("|") for line in shots if line.startswith("|")}) == 1


def test_without_a_solution_val_is_scored_and_is_no_part_of_the_reference(drawn):
    task = read_task(drawn.competition, "train+val")
    val = set(read_competition(drawn.competition).in_splits("val").ids)
    assert task.split == "val"
    assert {query.id for query in task.queries("300p")} == set(task.truth) == val
    assert not val & {observation.id for observation in task.support("300p").observations}


@pytest.mark.parametrize("recipe", ["fungiclef-protonet", "fungiclef-best"])
def test_a_run_that_may_not_use_val_is_that_of_a_competition_without_one(recipe, drawn, encoders, tmp_path):
    settings = {"encoder": encoders[0], "reference": "train", "seed": 3}
    settings |= {"epochs": 1} if recipe == "fungiclef-protonet" else {"choose": ["whitening", "transduction"]}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "unused", uses_val=False)
    shutil.copytree(drawn.competition, tmp_path / "data")
    next((tmp_path / "data").glob("metadata/*/*-Val.csv")).unlink()
    train_run(make_recipe(settings, "the test"), tmp_path / "data", tmp_path / "absent")
    unused, absent = (read_weights(tmp_path / name).manifest for name in ("unused", "absent"))
    assert unused == absent


def test_a_folder_with_neither_a_solution_nor_a_val_is_refused(drawn, tmp_path):
    shutil.copytree(drawn.competition, tmp_path / "data")
    next((tmp_path / "data").glob("metadata/*/*-Val.csv")).unlink()
    with pytest.raises(InputError, match="nothing to score on"):
        read_task(tmp_path / "data", "train")


def test_the_command_prints_the_tables_and_writes_them(drawn, encoders, tmp_path, monkeypatch, capsys):
    report = tmp_path / "deep" / "report.json"
    arguments = ["accuracy", "--data", drawn.competition, "--encoder", encoders[0], "--json", report]
    arguments += ["--recipe", "fungiclef-baseline", "--out", tmp_path / "runs"]  # one is enough to see them
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    benchmark.main()
    [dataset] = json.loads(report.read_text())["datasets"]
    assert dataset["scored_on"] == "val"
    [member] = read_weights(next((tmp_path / "runs").glob("*-fungiclef-baseline"))).manifest.members
    assert member.data_sha256 == read_competition(drawn.competition).in_splits("train").digest()
    printed = capsys.readouterr().out
    assert all(line in printed for line in (*method_table(dataset), *sparse_table(dataset), *shots_table(dataset)))

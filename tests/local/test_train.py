"""train.py explains a recipe without data, and answers a mistake in its settings before it loads torch."""

import json
import shutil
from pathlib import Path

import pytest

from kernel.manifest import MANIFEST, read_manifest
from local import train
from local.banks.ensemble import common_predictions, read_predictions
from local.base.console import run
from tests.conftest import LEARNING, TINY


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    run(train.main)


def test_explain_needs_no_data_and_prints_every_table(monkeypatch, capsys) -> None:
    call(monkeypatch, "--recipe", "demo", "--explain", "--set", "epochs=3", "--encoder", "timm:resnet18")
    said = capsys.readouterr().out
    assert "epochs = 3  (--set epochs=3)" in said
    assert 'encoder = "timm:resnet18"  (--encoder timm:resnet18)' in said
    assert "[optim]" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "demo"], "required: --data"),
        (["--recipe", "demo", "--explain", "--set", "epoch=3"], "unknown key 'epoch' (in --set epoch=3)"),
        (["--recipe", "demo", "--data", "nowhere", "--set", "epochs=x"], "expected an int for epochs, got 'x'"),
        (["--recipe", "demo", "--data", "nowhere", "--wait"], "--wait is for --on kaggle only"),
        (["--recipe", "demo", "--on", "laptop"], "invalid choice: 'laptop'"),
        (["--recipe", "absent", "--on", "kaggle"], "no recipe absent"),
        (["--recipe", "demo", "--data", "nowhere", "--seeds", "1"], "--seeds: expected 2 or more, got 1"),
        (["--recipe", "demo", "--on", "kaggle", "--seeds", "2"], "--seeds trains here: with --on kaggle, give --set"),
        (["--recipe", "demo", "--data", "nowhere", "--seeds", "2", "--set", "seed=1"], "seed=1 and --seeds both give"),
        (["--recipe", "fungiclef-best", "--data", "nowhere", "--seeds", "2"], "the runs would be the same"),
        (["--recipe", "absent", "--data", "nowhere"], "no recipe absent"),
    ],
)
def test_a_mistake_is_answered_with_exit_code_2(monkeypatch, capsys, arguments, says) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_observations_of_a_csv_are_excluded(monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "marks.csv").write_text("observation,mark\n7,mislabelled\n12,duplicate\n7,duplicate\n")
    call(monkeypatch, "--recipe", "demo", "--explain", "--exclude", str(tmp_path / "marks.csv"))
    assert f'exclude = ["7", "12"]  (--exclude {tmp_path / "marks.csv"})' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id\n7\n", "lacks the column 'observation': it has id"),
        ("observation\n", "lists no observation"),
        (None, "CSV"),
    ],
)
def test_a_csv_without_observations_is_refused(monkeypatch, capsys, tmp_path, text, says) -> None:
    if text:
        (tmp_path / "marks.csv").write_text(text)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--recipe", "demo", "--data", "nowhere", "--exclude", str(tmp_path / "marks.csv"))
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def write_recipe_of(settings: dict, path: Path) -> str:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


def test_seeds_are_runs_of_their_own_of_which_resume_leaves_the_finished_ones(
    monkeypatch, capsys, tmp_path, drawn, trained
):
    recipe = write_recipe_of({**TINY, **LEARNING}, tmp_path / "tiny.toml")
    runs = [tmp_path / "runs" / f"tiny-seed{seed}" for seed in range(2)]
    options = ["--recipe", recipe, "--data", str(drawn.competition), "--out", str(tmp_path / "runs" / "tiny")]
    shutil.copytree(trained, runs[0])  # of seed 0
    with pytest.raises(SystemExit):
        call(monkeypatch, *options, "--seeds", "2")
    assert f"{runs[0]} exists already" in capsys.readouterr().err
    assert not runs[1].exists()
    files = {path: path.stat().st_mtime_ns for path in runs[0].iterdir()}
    call(monkeypatch, *options, "--seeds", "2", "--resume")
    said = capsys.readouterr().out
    assert f"{runs[0]} is done already" in said
    assert said.splitlines()[-1] == f"to make an ensemble of them: python bundle.py {runs[0]} {runs[1]}"
    assert {path: path.stat().st_mtime_ns for path in runs[0].iterdir()} == files
    members = [read_manifest(run / MANIFEST).members[0] for run in runs]
    assert [member.recipe["seed"] for member in members] == [0, 1]
    assert {**members[1].given.recipe, "seed": 0} == members[0].given.recipe
    assert (runs[1] / "bank.safetensors").read_bytes() != (runs[0] / "bank.safetensors").read_bytes()
    predictions = [read_predictions(run) for run in runs]
    assert len(common_predictions(predictions)[1].observations) == len(predictions[0].observations)


def test_help_lists_the_recipes(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    assert "fungiclef-best" in capsys.readouterr().out

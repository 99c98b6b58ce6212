"""train.py explains a recipe without data, and answers a mistake in its settings before it loads torch."""

import pytest

from local import train
from local.base.console import run


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


def test_help_lists_the_recipes(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    assert "fungiclef-best" in capsys.readouterr().out

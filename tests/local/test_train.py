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
        (["--recipe", "absent", "--data", "nowhere"], "no recipe absent"),
    ],
)
def test_a_mistake_is_answered_with_exit_code_2(monkeypatch, capsys, arguments, says) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_help_lists_the_recipes(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    assert "fungiclef-best" in capsys.readouterr().out

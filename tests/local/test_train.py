"""train.py explains a recipe without data, and answers a mistake in its settings before it loads torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from local import train
from local.base.console import run

ROOT = Path(__file__).resolve().parents[2]


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


def test_help_lists_the_recipes_and_loads_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "from local import train\n"
        "try:\n    train.main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fungiclef-best" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"

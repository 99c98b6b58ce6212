"""Every long step of a run and of its report says how far it is, without a terminal too."""

import pytest

from local.evaluate import report
from local.recipes.recipe import make_recipe
from local.training.run import train_run
from tests.conftest import LEARNING, TINY

STEPS = (
    "loading the encoder and the data: ",
    "epoch 1: ",
    "embedding in 2 views: ",
    "selecting the bank: ",
    "reading the run and its data: ",
    "computing the figures: ",
    "drawing the page: ",
)


@pytest.mark.slow
def test_every_long_step_of_a_run_and_of_its_report_prints_lines(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernel.progress.LINE_SECONDS", 0.001)
    settings = {**TINY, **LEARNING, "views": ["plain", "hflip"], "choose": ["whitening"]}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "run")
    report(tmp_path / "run", drawn.competition)
    lines = capsys.readouterr().out.splitlines()
    assert [step for step in STEPS if not any(line.startswith(step) for line in lines)] == []

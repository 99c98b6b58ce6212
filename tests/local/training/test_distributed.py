"""Two processes under torchrun train what one process would."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

from local.encoders.load import load_encoder
from local.recipes.recipe import make_recipe
from local.training.checkpoints import read_checkpoint
from local.training.checks import CHECKPOINTS
from local.training.run import train_run
from tests.conftest import LEARNING, ROOT, TINY
from tests.local.training.test_run import changed_script, train

# Without batch statistics, which each process has of its own part of a batch.
ENCODER = "timm:test_convnext"
SETTINGS = {"epochs": 2, "batch_size": 8, "colour_jitter": 0.0, "crop_scale": 1.0}


@pytest.fixture(scope="module")
def alone(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    settings = {**TINY, **LEARNING, "ema_decay": 0.9, "patience": 9, **SETTINGS, "encoder": ENCODER}
    train_run(make_recipe(settings, "the test"), drawn.competition, out)
    return out


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.run([*map(str, command), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(drawn, alone, tmp_path):
    done = torchrun(2, *train(tmp_path / "run", drawn, **SETTINGS, encoder=ENCODER))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nepoch 1:") == 1  # only rank 0 prints
    one, two = (json.loads((run / "metrics.json").read_text())["validation"] for run in (alone, tmp_path / "run"))
    for name in ("recall_at_1", "recall_at_5", "macro_f1"):
        assert two[name] == pytest.approx(one[name], abs=0.25)
    logs = [pd.read_csv(run / "log.csv") for run in (alone, tmp_path / "run")]
    assert logs[0]["loss"][1:].tolist() == pytest.approx(logs[1]["loss"][1:].tolist(), rel=1e-2)
    # The sums of gradients are rounded differently, and Adam divides by them; so not bit for bit.
    torch.manual_seed(0)
    before = load_encoder(ENCODER, False, TINY["image_size"])[0].state_dict()
    first, second = (read_checkpoint(run / CHECKPOINTS).part("encoder") for run in (alone, tmp_path / "run"))
    assert first.keys() == second.keys()
    moved = torch.cat([(first[name] - before[name]).flatten() for name in first])
    apart = torch.cat([(first[name] - second[name]).flatten() for name in first])
    assert apart.norm() < 0.1 * moved.norm()


@pytest.mark.slow
def test_when_one_process_dies_both_are_restarted_and_the_run_is_finished(drawn, alone, tmp_path):
    """The second process fails once, after the first checkpoint; torchrun then starts both again.

    Only the first process finds that a checkpoint is due, as its clock may be ahead of the other's.
    """
    script = changed_script(
        tmp_path / "fragile.py",
        "Trainer.is_save_due = lambda self: os.environ['RANK'] == '0' and self.batch == 2",
        "forward_backward = Trainer.forward_backward",
        "def fragile(self, *given):",
        "    if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and self.epoch == 2:",
        "        raise RuntimeError('this device is lost')",
        "    return forward_backward(self, *given)",
        "Trainer.forward_backward = fragile",
    )
    _, *arguments = train(tmp_path / "run", drawn, **SETTINGS, encoder=ENCODER)
    done = torchrun(2, "--max-restarts", "1", str(script), *arguments)
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: this device is lost" in done.stderr
    assert "continuing in epoch 1 after batch 2" in done.stdout
    assert (tmp_path / "run" / "manifest.json").is_file()

"""An ensemble is weighed by held-out answers, and has only members that pay."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernel.inputs import InputError
from local.banks.ensemble import weigh
from local.base.run_folder import VALIDATION_FILE

QUERIES, CLASSES = 400, 30


def answers(folder, noise, seed, truth, asked="the same"):
    """A run that sees the true class through noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.nn.functional.one_hot(truth, CLASSES) * 3.0 + noise * torch.randn(
        len(truth), CLASSES, generator=generator
    )
    folder.mkdir(parents=True)
    tensors = {
        "log_probabilities": logits.log_softmax(dim=1).half(),
        "truth": truth,
        "weights": torch.ones(len(truth), dtype=torch.float64),
    }
    save_file(tensors, folder / VALIDATION_FILE, metadata={"observations": json.dumps(asked)})
    return folder


@pytest.fixture
def truth():
    return torch.tensor(np.random.default_rng(0).integers(0, CLASSES, QUERIES))


def test_runs_that_err_differently_share_the_weight(truth, tmp_path, capsys):
    runs = [answers(tmp_path / str(seed), 1.6, seed, truth) for seed in range(3)]
    weights = weigh(runs, 10)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) > 0.15
    assert "gains +" in capsys.readouterr().out


def test_a_run_that_knows_nothing_is_left_out(truth, tmp_path, capsys):
    runs = [answers(tmp_path / "good", 1.2, 1, truth), answers(tmp_path / "blind", 1000.0, 2, truth)]
    assert weigh(runs, 10) == [1.0, 0.0]
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_ensemble_that_too_few_observations_speak_for_is_not_kept(count, tmp_path, capsys):
    # Each run prefers a wrong class of its own, and together they prefer the true one.
    runs = []
    for number in range(2):
        logits = torch.zeros(count, CLASSES)
        logits[:, 0], logits[:, 1 + number] = 3.0, 4.0
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        tensors = {
            "log_probabilities": logits.log_softmax(dim=1).half(),
            "truth": torch.zeros(count, dtype=torch.int64),
            "weights": torch.ones(count, dtype=torch.float64),
        }
        save_file(tensors, runs[-1] / VALIDATION_FILE, metadata={"observations": "the same"})
    assert sorted(weigh(runs, 1)) == [0.0, 1.0]
    assert "no evidence" in capsys.readouterr().out


def test_the_same_answers_twice_are_no_ensemble(truth, tmp_path):
    runs = [answers(tmp_path / name, 1.5, 1, truth) for name in ("a", "b")]
    assert sorted(weigh(runs, 10)) == [0.0, 1.0]


def test_runs_that_were_asked_different_things_get_equal_weights(truth, tmp_path, capsys):
    runs = [answers(tmp_path / "a", 1.5, 1, truth), answers(tmp_path / "b", 1.5, 2, truth, asked="another")]
    assert weigh(runs, 10) == [0.5, 0.5]
    assert "equal weights" in capsys.readouterr().out


def test_damaged_answers_are_one_line(truth, tmp_path):
    runs = [answers(tmp_path / name, 1.5, 1, truth) for name in ("a", "b")]
    (runs[1] / VALIDATION_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="train the run again"):
        weigh(runs, 10)

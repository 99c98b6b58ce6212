"""Weights of an ensemble are chosen on held-out predictions, and only runs that help have one.

python -m pytest tests/local/banks/test_ensemble.py
"""

import numpy as np
import pytest
import torch

from kernel.inputs import InputError
from local.banks.ensemble import STEPS, HeldOutPredictions, read_predictions, weigh_runs
from local.banks.evaluation import evaluate_predictions
from local.base.metrics import gained, mean_recall
from local.base.run_folder import VALIDATION_FILE

QUERIES, CLASSES = 400, 30
ENDS = ("", "_low", "_high")


def write_run(folder, logits, truth, weights=None, observations="the same"):
    """A run folder with predictions of held-out observations."""
    folder.mkdir(parents=True)
    weights = torch.ones(len(truth), dtype=torch.float64) if weights is None else weights
    classes = [str(label) for label in range(logits.shape[1])]
    ids = [f"{observations} {number}" for number in range(len(truth))]
    predictions = HeldOutPredictions(ids, classes, logits.log_softmax(dim=1), truth.numpy(), weights.numpy())
    predictions.write(folder / VALIDATION_FILE)
    return folder


def noisy_run(folder, noise, seed, truth, **options):
    """A run that prefers the true class, with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.nn.functional.one_hot(truth, CLASSES)
    return write_run(folder, logits + noise * torch.randn(*logits.shape, generator=generator), truth, **options)


@pytest.fixture
def truth():
    return torch.tensor(np.random.default_rng(0).integers(0, CLASSES, QUERIES))


def recalls_of(runs, weights, guesses):
    """(queries,) weighted mean recall of the weighted sum of log-probabilities."""
    predictions = [read_predictions(run) for run in runs]
    total = sum(weight * one.log_probabilities for weight, one in zip(weights, predictions, strict=True))
    first = predictions[0]
    return first.weights * mean_recall(evaluate_predictions(total, first.truth).hits, guesses)


@pytest.mark.parametrize("guesses", [1, 10])
@pytest.mark.parametrize("seed", range(6))
def test_weights_sum_to_one_and_never_score_below_the_best_single_run(seed, guesses, tmp_path, capsys):
    rng = np.random.default_rng(seed)
    truth, weights = torch.tensor(rng.integers(0, CLASSES, 120)), torch.tensor(rng.random(120))
    runs = [
        noisy_run(tmp_path / str(number), rng.uniform(0.5, 4), 10 * seed + number, truth, weights=weights)
        for number in range(rng.integers(2, 5))
    ]
    found = weigh_runs(runs, guesses).weights
    assert sum(found) == pytest.approx(1)
    assert all(0 <= weight <= 1 for weight in found)
    single = [recalls_of(runs, one, guesses).mean() for one in np.eye(len(runs))]
    assert recalls_of(runs, found, guesses).mean() >= max(single) - 1e-9
    assert capsys.readouterr().out.count("weight ") == len(runs)


@pytest.mark.parametrize("seed", range(4))
def test_two_runs_get_the_first_best_weights_of_the_greedy_path(seed, tmp_path):
    truth = torch.tensor(np.random.default_rng(seed).integers(0, CLASSES, QUERIES))
    runs = [noisy_run(tmp_path / str(number), 1.6 + 0.2 * number, 2 * seed + number, truth) for number in range(2)]

    def recall(counts):
        return recalls_of(runs, counts, 10).mean()

    best_single = max([(1, 0), (0, 1)], key=recall)
    path = [best_single]
    for _ in range(STEPS - 1):
        path.append(max([(path[-1][0] + 1, path[-1][1]), (path[-1][0], path[-1][1] + 1)], key=recall))
    best = max(path, key=recall)
    if not gained(recalls_of(runs, best, 10), recalls_of(runs, best_single, 10))["low"] > 0:
        best = best_single
    assert weigh_runs(runs, 10).weights == pytest.approx(np.array(best) / sum(best))


def test_runs_that_err_differently_all_get_weight(truth, tmp_path, capsys):
    runs = [noisy_run(tmp_path / str(seed), 1.6, seed, truth) for seed in range(3)]
    assert min(weigh_runs(runs, 10).weights) > 0.15
    assert "the ensemble gains +" in capsys.readouterr().out


def test_a_run_of_random_predictions_is_left_out(truth, tmp_path, capsys):
    runs = [noisy_run(tmp_path / "good", 1.2, 1, truth), noisy_run(tmp_path / "random", 1000.0, 2, truth)]
    assert weigh_runs(runs, 10).weights == [1.0, 0.0]
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_ensemble_is_not_used_on_the_evidence_of_too_few_observations(count, tmp_path, capsys):
    # Each run prefers a wrong class of its own, and together they prefer the true one.
    runs = []
    for number in range(2):
        logits = torch.zeros(count, CLASSES)
        logits[:, 0], logits[:, 1 + number] = 3.0, 4.0
        runs.append(write_run(tmp_path / str(number), logits, torch.zeros(count, dtype=torch.int64)))
    assert sorted(weigh_runs(runs, 1).weights) == [0.0, 1.0]
    said = capsys.readouterr().out
    assert "stays alone: an ensemble would gain +1.000 (no evidence" in said and "the ensemble gains" not in said


def test_the_same_predictions_twice_are_no_ensemble(truth, tmp_path, capsys):
    runs = [noisy_run(tmp_path / name, 1.5, 1, truth) for name in ("a", "b")]
    assert sorted(weigh_runs(runs, 10).weights) == [0.0, 1.0]
    said = capsys.readouterr().out
    assert "the best run stays alone: no ensemble of these runs is better" in said and "gains" not in said


def test_runs_with_different_held_out_observations_get_equal_weights(truth, tmp_path, capsys):
    runs = [noisy_run(tmp_path / "a", 1.5, 1, truth), noisy_run(tmp_path / "b", 1.5, 2, truth, observations="another")]
    assert weigh_runs(runs, 10).weights == [0.5, 0.5]
    assert "equal weights" in capsys.readouterr().out


def test_an_ensemble_is_scored_with_weights_that_other_observations_choose(tmp_path, truth):
    runs = [noisy_run(tmp_path / str(seed), 1.6 + 0.3 * seed, seed, truth) for seed in range(3)]
    scores = weigh_runs(runs, 10).scores(is_macro=False, seed=5)
    part, hits = np.random.default_rng(5).permutation(QUERIES) % 5, np.zeros(QUERIES)
    for number in range(5):
        others, own = torch.tensor(np.flatnonzero(part != number)), torch.tensor(np.flatnonzero(part == number))
        logs = [read_predictions(run).log_probabilities for run in runs]
        parts = [write_run(tmp_path / f"{number}-{at}", log[others], truth[others]) for at, log in enumerate(logs)]
        total = sum(weight * log for weight, log in zip(weigh_runs(parts, 10).weights, logs, strict=True))
        hits[own.numpy()] = (total[own].argmax(dim=1) == truth[own]).numpy()
    assert scores["recall_at_1"] == scores["unweighted_recall_at_1"] == pytest.approx(hits.mean())
    assert scores["unweighted_recall_at_1_low"] < hits.mean() < scores["unweighted_recall_at_1_high"]
    assert scores["recall_at_1"] not in [pytest.approx(recalls_of([run], [1.0], 1).mean()) for run in runs]


def test_the_score_of_an_ensemble_of_runs_that_cannot_be_compared_is_not_known(tmp_path, truth):
    runs = [noisy_run(tmp_path / name, 1.5, 1, truth, observations=name) for name in ("a", "b")]
    assert weigh_runs(runs, 10).scores(is_macro=False, seed=0) == {}


def test_without_the_classes_that_the_bank_lacks_the_macro_f1_of_an_ensemble_is_not_known(tmp_path, truth):
    runs = [noisy_run(tmp_path / str(seed), 1.6, seed, truth) for seed in range(2)]
    logs = [read_predictions(run).log_probabilities for run in runs]
    lacking = torch.where(torch.arange(QUERIES) < 3, -1, truth)
    runs = [write_run(tmp_path / f"lacking-{at}", log, lacking) for at, log in enumerate(logs)]
    scores = weigh_runs(runs, 10).scores(is_macro=False, seed=0)
    assert set(scores) == {
        f"{kind}recall_at_{count}{end}" for kind in ("", "unweighted_") for count in (1, 5, 10) for end in ENDS
    }


def test_runs_that_held_out_the_same_observations_in_another_order_or_more_are_weighted_by_these(truth, tmp_path):
    runs = [noisy_run(tmp_path / str(seed), 1.4 + 0.2 * seed, seed, truth) for seed in range(2)]
    expected = weigh_runs(runs, 10).weights
    other = read_predictions(runs[1])
    order = np.random.default_rng(0).permutation(QUERIES)
    other.of([other.observations[row] for row in order]).write(runs[1] / VALIDATION_FILE)
    assert weigh_runs(runs, 10).weights == expected

    first = read_predictions(runs[0])
    more = torch.cat([first.log_probabilities.flip(1)[:50], first.log_probabilities])  # 50 others, mostly wrong
    ids = [f"another {number}" for number in range(50)] + first.observations
    truths, weights = np.concatenate([first.truth[:50], first.truth]), np.ones(50 + QUERIES)
    HeldOutPredictions(ids, first.classes, more, truths, weights).write(runs[0] / VALIDATION_FILE)
    assert weigh_runs(runs, 10).weights == expected


def test_damaged_predictions_are_a_mistake_in_one_line(truth, tmp_path):
    runs = [noisy_run(tmp_path / name, 1.5, 1, truth) for name in ("a", "b")]
    (runs[1] / VALIDATION_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="train the run again"):
        weigh_runs(runs, 10)


def test_with_the_metric_log_loss_the_weights_and_the_score_are_those_of_the_log_loss(tmp_path, truth):
    """Of two runs with the same guesses, the overconfident one is left out; recalls do not see the difference."""
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.nn.functional.one_hot(truth, CLASSES) + 1.6 * torch.randn(
        QUERIES, CLASSES, generator=generator
    )
    runs = [write_run(tmp_path / str(scale), scale * logits, truth) for scale in (9.0, 1.0)]
    assert weigh_runs(runs, 1).weights == [1.0, 0.0]
    chosen = weigh_runs(runs, 1, "log_loss")
    assert chosen.weights == [0.0, 1.0]
    calm = read_predictions(runs[1]).log_probabilities.log_softmax(dim=1)
    scores = chosen.scores(is_macro=False, seed=0)
    assert scores["log_loss"] == pytest.approx(torch.nn.functional.nll_loss(calm, truth).item(), rel=1e-3)

"""Predictions are ranked and scored as the kernel and scikit-learn do it."""

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from kernel.ranking import classify, rank
from local.banks.estimators import class_means_bank, l2_normalize
from local.banks.evaluation import evaluate_predictions


@pytest.mark.parametrize("seed", range(10))
def test_the_rank_of_the_true_class_is_the_number_of_better_classes(seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(200, 15))).log_softmax(dim=1)
    truth = rng.integers(0, 15, 200)
    evaluation = evaluate_predictions(scores, truth)
    own = scores.numpy()[np.arange(200), truth]
    assert (evaluation.ranks == (scores.numpy() > own[:, None]).sum(axis=1)).all()
    assert (evaluation.losses == -own).all()
    assert (evaluation.top == np.argsort(-scores.numpy(), axis=1)[:, :10]).all()
    for count in (1, 5, 10):
        expected = top_k_accuracy_score(truth, scores.numpy(), k=count, labels=np.arange(15))
        assert (evaluation.ranks < count).mean() == pytest.approx(expected)


def test_predictions_are_evaluated_chunk_by_chunk_as_all_at_once():
    rng = np.random.default_rng(0)
    scores, truth = torch.tensor(rng.normal(size=(700, 15))).log_softmax(dim=1), rng.integers(-1, 15, 700)
    chunks, whole = (evaluate_predictions(one, truth) for one in (iter(scores.split([1, 299, 400])), scores))
    for name in ("top", "ranks", "losses"):
        assert np.array_equal(getattr(chunks, name), getattr(whole, name), equal_nan=name == "losses")
    assert chunks.smooth_hits == pytest.approx(whole.smooth_hits, rel=1e-14)


@pytest.mark.parametrize("seed", range(10))
def test_ranks_of_equal_scores_are_those_of_the_kernel(seed):
    rng = np.random.default_rng(seed)
    # Prototypes that are equal in pairs give equal scores.
    embeddings = l2_normalize(rng.normal(size=(12, 6)))[rng.integers(0, 12, 24)]
    bank, truth = class_means_bank(embeddings, np.arange(24), 24), rng.integers(0, 24, 50)
    queries = torch.tensor(rng.normal(size=(50, 6)), dtype=torch.float32)
    order = rank([[bank]], [1.0], [queries], 24)[0].numpy()
    evaluation = evaluate_predictions(torch.cat(list(classify([bank], queries))), truth)
    assert (order[np.arange(50), evaluation.ranks] == truth).all()
    assert (order[:, :10] == evaluation.top).all()


def test_a_class_that_the_bank_lacks_has_the_last_rank_and_no_loss():
    log_probabilities = torch.tensor([[0.1, 0.3, 0.3], [0.3, 0.1, 0.2], [0.5, 0.2, 0.1]])
    evaluation = evaluate_predictions(log_probabilities, np.array([2, 1, -1]))
    assert evaluation.ranks.tolist() == [1, 2, 3]
    assert evaluation.losses == pytest.approx([-0.3, -0.1, np.nan], nan_ok=True)
    assert evaluation.top[0].tolist() == [1, 2, 0]
    assert evaluation.smooth_hits[:, 0] == pytest.approx([0.5, 1 / (1 + np.exp(0.2)), 0])  # .3 beside .3, .1 beside .3
    assert evaluation.smooth_hits[:, 1:].tolist() == [[1, 1], [1, 1], [0, 0]]  # three classes


@pytest.mark.parametrize("seed", range(10))
def test_a_smooth_hit_compares_the_true_class_with_the_one_that_it_must_beat(seed):
    rng = np.random.default_rng(seed)
    probabilities, truth = rng.dirichlet(np.full(15, 0.3), size=200), rng.integers(0, 15, 200)
    evaluation = evaluate_predictions(torch.tensor(probabilities).log(), truth)
    own = probabilities[np.arange(200), truth]
    for row, target, true, hits in zip(probabilities, truth, own, evaluation.smooth_hits, strict=True):
        others = np.sort(np.delete(row, target))[::-1]
        assert hits == pytest.approx([true / (true + others[count - 1]) for count in (1, 5, 10)])
    assert ((evaluation.smooth_hits > 0.5) == (evaluation.hits == 1)).all()

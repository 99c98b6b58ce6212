"""Folds keep queries out of their reference set, and weights of queries add up.

python -m pytest tests/local/banks/test_folds.py
"""

import numpy as np
import pytest

from local.banks.folds import FOLDS, draw_queries, macro_weights, make_folds, shot_weights


def random_labels(seed: int) -> np.ndarray:
    """Classes of 1 to 12 observations, in random order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.repeat(np.arange(25), rng.integers(1, 13, 25)))


@pytest.mark.parametrize("seed", range(10))
def test_every_observation_of_a_class_with_another_is_a_query_of_one_fold(seed):
    labels = random_labels(seed)
    made = make_folds(labels, seed)
    assert not any((reference & queries).any() for reference, queries in made)
    assert all(np.isin(labels[queries], labels[reference]).all() for reference, queries in made)
    sizes = np.bincount(labels)[labels]
    assert np.sum([queries for _, queries in made], axis=0).tolist() == (sizes > 1).astype(int).tolist()
    assert all(reference[sizes == 1].all() for reference, _ in made)


@pytest.mark.parametrize("seed", range(10))
def test_the_observations_of_a_class_are_spread_over_the_folds_evenly(seed):
    labels = random_labels(seed)
    counts = np.stack([np.bincount(labels[queries], minlength=25) for _, queries in make_folds(labels, seed)])
    sizes = np.bincount(labels)
    assert (counts.max(axis=0) <= np.ceil(sizes / FOLDS)).all()


@pytest.mark.parametrize("seed", range(10))
def test_only_observations_of_the_mask_are_queries(seed):
    labels = random_labels(seed)
    mask = np.random.default_rng(seed).random(len(labels)) < 0.4
    made, sizes = make_folds(labels, seed, mask), np.bincount(labels)[labels]
    assert np.sum([queries for _, queries in made], axis=0).tolist() == (mask & (sizes > 1)).astype(int).tolist()
    assert all(reference[~mask].all() for reference, _ in made)


def test_folds_depend_on_the_seed_alone():
    labels = random_labels(0)
    same, other = make_folds(labels, 0), make_folds(labels, 1)
    assert all((one[1] == two[1]).all() for one, two in zip(make_folds(labels, 0), same, strict=True))
    assert any((one[1] != two[1]).any() for one, two in zip(same, other, strict=True))


def test_queries_are_drawn_from_the_first_folds_and_the_others_stay_out_of_the_reference_set():
    labels = random_labels(0)
    every = make_folds(labels, 0)
    assert draw_queries(every, 1000, 0) is every
    drawn = draw_queries(every, 30, 0)
    assert sum(queries.sum() for _, queries in drawn) == 30
    assert [queries.sum() for _, queries in drawn[:-1]] == [queries.sum() for _, queries in every[: len(drawn) - 1]]
    for (reference, queries), (whole_reference, whole_queries) in zip(drawn, every[: len(drawn)], strict=True):
        assert (reference == whole_reference).all()
        assert not (queries & ~whole_queries).any()
    fewer, more = (np.any([queries for _, queries in draw_queries(every, limit, 0)], axis=0) for limit in (20, 40))
    assert not (fewer & ~more).any()


@pytest.mark.parametrize("seed", range(20))
def test_each_number_of_shots_gets_its_part_of_the_reference_set_and_the_mean_weight_is_one(seed):
    rng = np.random.default_rng(seed)
    labels, shots = random_labels(seed), rng.integers(1, 9, 200)
    weights = shot_weights(shots, labels)
    assert weights.mean() == pytest.approx(1)
    sizes = np.minimum(np.bincount(labels), 4)
    observations = np.bincount(sizes, np.bincount(labels), minlength=5)[1:]  # by the size of their class
    found = np.bincount(np.minimum(shots, 4), weights, minlength=5)[1:]
    assert found / found.sum() == pytest.approx(observations / observations.sum())


def test_queries_of_few_shots_represent_the_classes_of_one_observation():
    labels = np.array([0, 1, 1, 2, 2, 3, 3, 3, 3])  # sizes 1, 2, 2, 4
    # One observation of nine has one shot and none has three: the queries of three shots count nothing.
    assert shot_weights(np.array([1, 1, 1, 1, 3, 3, 3, 3]), labels).tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    # 1, 2 and 4 observations are in classes of 1, 2 and 4.
    weights = shot_weights(np.array([1, 2, 4]), np.array([0, 1, 1, 2, 2, 2, 2]))
    assert weights.tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_queries_of_classes_that_all_have_one_size_have_equal_weights():
    assert shot_weights(np.array([2, 2, 2]), np.repeat([0, 1, 2], 3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_for_a_macro_score_all_classes_count_the_same_and_the_mean_weight_is_one(seed):
    truth = random_labels(seed)[:80]
    weights = macro_weights(truth, truth)
    assert weights.mean() == pytest.approx(1)
    totals = np.bincount(truth, weights)
    assert totals[totals > 0] == pytest.approx(80 / len(np.unique(truth)))


def test_drawn_queries_represent_all_classes_the_same_also_those_of_which_none_was_drawn():
    rng, classes = np.random.default_rng(0), np.arange(40)
    held_out, is_right = np.repeat(classes, classes + 1), (classes % 3 == 0) | (classes > 30)
    estimates = []
    for _ in range(2000):
        drawn = held_out[rng.choice(len(held_out), len(held_out) // 5, replace=False)]
        estimates.append(np.average(is_right[drawn], weights=macro_weights(drawn, held_out)))
    assert np.mean(estimates) == pytest.approx(is_right.mean(), abs=0.01)

"""Scores are what they are called, and their intervals are honest."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from local.base.metrics import (
    MIN_OBSERVATIONS,
    RESAMPLES,
    class_f1,
    describe,
    gained,
    held_out_scores,
    hit_matrix,
    hits_of,
    interval,
    losses_of,
    macro_f1,
    macro_f1_gain,
    mean_recall,
    objective,
    paired_gain,
    sample_f1,
    score,
    set_scores,
)


def ranked(first: list[str], classes: list[str]) -> list[list[str]]:
    """Guesses that begin with the given classes, followed by all others."""
    return [[name, *(other for other in classes if other != name)] for name in first]


def long_tail(seed: int, count: int = 400) -> tuple[list[str], list[list[str]]]:
    """A few common and many rare classes; two thirds of the first guesses are right."""
    rng = np.random.default_rng(seed)
    classes = [str(number) for number in range(120)]
    weights = 1 / np.arange(1, 121) ** 1.2
    truth = rng.choice(classes, count, p=weights / weights.sum())
    first = np.where(rng.random(count) < 0.66, truth, rng.choice(classes, count))
    return truth.tolist(), ranked(first.tolist(), classes)


def test_a_recall_is_the_fraction_of_observations_whose_class_is_among_the_first_guesses() -> None:
    order = [str(number) for number in range(12)]
    truth = ["0", "1", "4", "5", "9", "10", "11", "never"]
    scores = score(truth, [order] * len(truth))
    assert scores["recall_at_1"] == 1 / 8
    assert scores["recall_at_5"] == 3 / 8
    assert scores["recall_at_10"] == 5 / 8


def test_hits_are_those_of_each_observation() -> None:
    guesses = [["a", "b", "c", "d", "e", "f"], ["f", "e", "d", "c", "b", "a"], ["b"], ["a"]]
    assert hit_matrix(["a", "a", "a", "a"], guesses).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert hit_matrix([], []).shape == (0, 3)


def test_truth_and_guesses_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        score(["a", "b"], [["a"]])


def test_a_class_id_is_never_found_within_another() -> None:
    assert score(["1"], [["10", "11", "21"]])["recall_at_10"] == 0


def test_macro_f1_of_a_case_worked_by_hand() -> None:
    # a: precision 1/2, recall 1, F1 2/3; b: precision 1, recall 1/2, F1 2/3; c is guessed and never true: 0.
    scores = score(["a", "b", "b"], [["a"], ["b"], ["a"]])
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    scores = score(["a", "b", "b"], [["a"], ["b"], ["c"]])
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_weighted_scores_are_weighted_means_and_the_f1_of_weighted_counts() -> None:
    truth, guesses = long_tail(0)
    weights = np.random.default_rng(1).choice([0.0, 0.5, 3.0], len(truth))
    scores = score(truth, guesses, weights=weights)
    for index, count in enumerate((1, 5, 10)):
        hits = hit_matrix(truth, guesses)[:, index]
        assert scores[f"recall_at_{count}"] == pytest.approx((weights * hits).sum() / weights.sum())
        assert scores[f"recall_at_{count}_low"] <= scores[f"recall_at_{count}"] <= scores[f"recall_at_{count}_high"]
    present, firsts = weights > 0, np.array([row[0] for row in guesses])
    expected = f1_score(
        np.array(truth)[present], firsts[present], average="macro", sample_weight=weights[present], zero_division=0
    )
    assert scores["macro_f1"] == pytest.approx(expected, abs=1e-12)


def test_equal_weights_change_no_score_and_no_interval() -> None:
    truth, guesses = long_tail(0)
    assert score(truth, guesses, weights=np.full(len(truth), 2.0)) == pytest.approx(score(truth, guesses))


@pytest.mark.parametrize("is_macro", [False, True])
def test_a_run_keeps_the_weighted_scores_first_and_the_unweighted_ones_under_their_own_names(is_macro: bool) -> None:
    truth, guesses = long_tail(0)
    weights = np.random.default_rng(1).random(len(truth))
    scores, plain = held_out_scores(truth, guesses, weights, is_macro), score(truth, guesses)
    assert {name: scores[f"unweighted_{name}"] for name in plain} == plain
    weighted = score(truth, guesses, weights=weights)
    for name, value in weighted.items():
        # Macro-F1 weights all classes the same by itself.
        assert scores[name] == (plain[name] if is_macro and name.startswith("macro_f1") else value)
    assert scores["recall_at_1"] != plain["recall_at_1"]
    assert "Recall@1 " + format(plain["recall_at_1"], ".3f") in describe(scores, prefix="unweighted_")


@pytest.mark.parametrize("seed", range(3))
def test_there_is_one_macro_f1_and_a_class_that_is_only_predicted_counts_in_it(seed: int) -> None:
    truth, guesses = long_tail(seed)
    firsts = [row[0] for row in guesses]
    assert set(firsts) - set(truth)
    expected = f1_score(truth, firsts, average="macro", zero_division=0)
    assert macro_f1(truth, firsts) == pytest.approx(expected, abs=1e-12)
    assert len(class_f1(truth, firsts)) == len(set(truth) | set(firsts))
    assert macro_f1(np.array(truth, dtype=object), np.array(firsts)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_long_tail_every_interval_contains_its_score(seed: int) -> None:
    scores = score(*long_tail(seed))
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1"):
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]


def test_macro_f1_over_classes_of_one_observation_lies_within_its_interval() -> None:
    # Resampled observations would lose a third of such classes, and the interval with them.
    classes = [str(number) for number in range(200)]
    first = [name if number % 5 else "wrong" for number, name in enumerate(classes)]
    scores = score(classes, [[name] for name in first])
    assert scores["macro_f1"] == pytest.approx(160 / 201)
    assert scores["macro_f1_low"] < 160 / 201 < scores["macro_f1_high"]
    assert scores["macro_f1_high"] - scores["macro_f1_low"] < 0.15


def test_a_mean_recall_is_over_the_recalls_that_the_submission_has_room_for() -> None:
    hits = hits_of(np.array([0, 3, 7, 20]))
    assert mean_recall(hits).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert mean_recall(hits, 5).tolist() == pytest.approx([1, 1 / 2, 0, 0])
    assert mean_recall(hits, 1).tolist() == [1, 0, 0, 0]


def percentiles(samples, statistic, seed: int) -> tuple[float, float]:
    """The interval of scipy."""
    found = bootstrap(samples, statistic, paired=True, n_resamples=RESAMPLES, method="percentile", rng=seed)
    return pytest.approx(tuple(found.confidence_interval))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_the_bootstrap_percentiles_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample, weights = (rng.random(80) < 0.3).astype(float), rng.random(80)
    assert interval(sample, seed) == percentiles((sample,), np.mean, seed)

    def weighted_mean(values, by, axis=-1):
        return (values * by).sum(axis=axis) / by.sum(axis=axis)

    assert interval(sample, seed, weights) == percentiles((sample, weights), weighted_mean, seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_gain_in_macro_f1_has_the_bootstrap_percentiles_of_scipy(seed: int) -> None:
    truth, guesses = long_tail(seed)
    new, old = [row[0] for row in guesses], [row[0] for row in long_tail(seed + 1)[1]]
    classes = sorted(set(truth) | set(new) | set(old))
    counted = np.array([[one in {*truth, *firsts} for one in classes] for firsts in (new, old)])
    f1 = [f1_score(truth, firsts, labels=classes, average=None, zero_division=0) for firsts in (new, old)]

    def gain(new_f1, old_f1, in_new, in_old, axis=-1):
        return new_f1.sum(axis=axis) / in_new.sum(axis=axis) - old_f1.sum(axis=axis) / in_old.sum(axis=axis)

    found = macro_f1_gain(truth, new, old, seed=seed)
    assert found["value"] == pytest.approx(macro_f1(truth, new) - macro_f1(truth, old), abs=1e-12)
    assert (found["low"], found["high"]) == percentiles((*f1, *counted), gain, seed)
    assert macro_f1_gain(truth, new, new) == {"value": 0, "low": 0, "high": 0}


def test_if_all_observations_agree_the_interval_is_a_point() -> None:
    assert interval(np.ones(9)) == (1.0, 1.0)
    assert interval(np.zeros(9)) == (0.0, 0.0)


def test_a_gain_is_the_mean_difference_with_its_paired_standard_error() -> None:
    gain, error = paired_gain(np.array([1, 1, 0, 1]), np.array([0, 1, 0, 0]))
    assert gain == 0.5
    assert error == pytest.approx(np.sqrt(1 / 3) / 2)
    assert paired_gain(np.array([0, 1, 0, 0]), np.array([1, 1, 0, 1]))[0] == -0.5
    assert paired_gain(np.array([True, False, True]), np.array([True, False, True])) == (0.0, 0.0)


@pytest.mark.parametrize("count", range(MIN_OBSERVATIONS))
def test_too_few_observations_are_no_evidence_of_a_gain_even_where_all_agree(count: int) -> None:
    found = gained(np.ones(count), np.zeros(count))
    assert not found["low"] > 0
    assert not np.isnan(list(found.values())).any()
    if count < 2:
        gain, error = paired_gain(np.ones(count), np.zeros(count))
        assert not gain > error


def test_enough_observations_that_all_agree_are_evidence() -> None:
    assert gained(np.ones(MIN_OBSERVATIONS), np.zeros(MIN_OBSERVATIONS)) == {"value": 1, "low": 1, "high": 1}


def test_pairing_makes_a_small_constant_gain_certain() -> None:
    old = np.random.default_rng(0).random(100)
    gain, error = paired_gain(old + 0.01, old)
    assert gain == pytest.approx(0.01)
    assert error < 1e-6


def test_the_line_on_the_console_names_each_score_with_its_bounds() -> None:
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1")
    scores = {f"{name}{end}": 0.1 * number for number, name in enumerate(names, 1) for end in ("", "_low", "_high")}
    line = describe(scores | {"recall_at_5_low": 0.15, "recall_at_5_high": 0.25})
    assert line.count("\n") == 0
    assert "Recall@5 0.200 [0.150, 0.250]" in line
    assert "macro-F1 0.400 [0.400, 0.400]" in line


@pytest.mark.parametrize(
    ("guesses", "expected"),
    [(1, ["Recall@1", "macro-F1"]), (5, ["Recall@1", "Recall@5", "macro-F1"])],
)
def test_the_line_has_no_recall_at_more_guesses_than_were_made(guesses: int, expected: list[str]) -> None:
    scores = score(["a", "b"], [["a"] * guesses] * 2)
    assert [word for word in describe(scores, guesses).split() if word[0] in "Rm"] == expected


def test_log_loss_is_that_of_scikit_learn_and_finite_for_a_class_without_probability():
    truth, classes = ["a", "b", "a"], ["a", "b", "c"]
    values = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.5, 0.25]]
    answers = [dict(zip(classes, row, strict=True)) for row in values]
    assert losses_of(truth, answers).mean() == pytest.approx(metrics.log_loss(truth, values, labels=classes))
    assert losses_of(["d"], [{"a": 1.0}]) == pytest.approx(-np.log(1e-15))


def test_a_log_loss_has_an_interval_and_may_be_what_settings_are_chosen_by():
    hits, losses = hits_of(np.array([0, 1, 3])), np.array([0.1, np.nan, 99.0])
    capped = [0.1, -np.log(1e-15), -np.log(1e-15)]
    assert objective("log_loss", hits, losses, 5) == pytest.approx(-np.array(capped))
    assert objective("recall_at_5", hits, losses, 5).tolist() == mean_recall(hits, 5).tolist()
    scores = score(["a", "b", "c"], [["a"], ["a"], ["a"]], weights=np.array([2.0, 1, 1]), losses=losses)
    assert scores["log_loss"] == pytest.approx(np.average(capped, weights=[2, 1, 1]))
    assert scores["log_loss_low"] < scores["log_loss"] < scores["log_loss_high"]
    assert describe(scores).startswith("log-loss ")


def test_the_f1_of_sets_is_that_of_scikit_learn_over_samples():
    truth = [["a"], ["a", "b", "c"], ["b", "c"], ["c"]]
    answers = [["a", "b"], ["b", "d"], ["c", "b"], ["a"]]
    encode = MultiLabelBinarizer(classes=list("abcd")).fit_transform
    assert sample_f1(truth, answers).tolist() == pytest.approx([2 / 3, 0.4, 1, 0])
    expected = f1_score(encode(truth), encode(answers), average="samples")
    scores = set_scores(sample_f1(truth, answers))
    assert scores["sample_f1"] == pytest.approx(expected)
    assert scores["sample_f1_low"] < expected < scores["sample_f1_high"]
    assert describe(scores).startswith("F1 per observation 0.517 [")

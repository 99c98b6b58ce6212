"""What is kept of a training is decided by validation, and by more than chance."""

import numpy as np
import pytest

from kernel.bank import classify
from kernel.embeddings import embed_observations
from local.base.metrics import score
from local.data.competition import read_competition, sort_ids, split_for_validation
from local.training.evaluation import Judged, best_of, choose_share, judge, told_choice


def judged_with(right, of=200):
    """Judgements in which the first `right` observations are hits."""
    return Judged(None, np.repeat((np.arange(of) < right)[:, None].astype(float), 3, axis=1), {})


@pytest.mark.parametrize(
    ("right", "share"),
    [
        ([100, 110, 130, 120, 90], 0.5),
        ([100, 130, 130, 120, 90], 0.25),  # of equals the nearest to the encoder as it came
        ([100, 90, 80, 70, 120], 1.0),
        ([100, 100, 90, 80, 70], 0.0),
        ([100, 101, 101, 100, 100], 0.0),  # one hit is within its standard error
    ],
)
def test_the_best_share_is_chosen_where_it_gains_more_than_chance(right, share):
    assert choose_share([judged_with(count) for count in right]) == share


def test_the_macro_f1_of_an_epoch_is_that_of_a_run_also_where_the_bank_lacks_classes(encoder, drawn):
    fit, validation = split_for_validation(read_competition(drawn.competition), 0)
    lacking = sort_ids(validation.class_ids)[:2]
    classes = [class_id for class_id in sort_ids(fit.class_ids) if class_id not in lacking]
    fit = fit.subset(np.isin(fit.class_ids, classes))
    assert len(set(validation.class_ids) - set(classes)) == 2
    judged = judge(encoder, fit, validation, ("plain",), "mean")
    queries = embed_observations(encoder, validation.observations, ("plain",)).values
    firsts = [classes[one.argmax()] for chunk in classify([judged.bank], queries) for one in chunk]
    assert set(firsts) - set(validation.class_ids) or set(validation.class_ids) - set(firsts)
    expected = score(validation.class_ids, [[first] for first in firsts])["macro_f1"]
    assert judged.scores["macro_f1"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("of", [1, 2])
def test_a_training_that_a_single_observation_speaks_for_is_not_kept(of):
    judgements = [judged_with(right, of) for right in (0, 1, 1, 1, 1)]
    assert choose_share(judgements) == 0.0


@pytest.mark.parametrize(("monitor", "best"), [("recalls", 0), ("macro_f1", 1), ("recall_at_10", 2), ("log_loss", 2)])
def test_the_best_epoch_is_the_best_by_the_monitored_score(monitor, best):
    rows = [
        {"recall_at_1": 0.6, "recall_at_5": 0.8, "recall_at_10": 0.8, "macro_f1": 0.3, "log_loss": 2.0},
        {"recall_at_1": 0.5, "recall_at_5": 0.8, "recall_at_10": 0.8, "macro_f1": 0.4, "log_loss": 1.0},
        {"recall_at_1": 0.1, "recall_at_5": 0.7, "recall_at_10": 0.9, "macro_f1": 0.4, "log_loss": 0.5},
    ]
    assert best_of(rows, monitor) == best


@pytest.mark.parametrize(
    ("right", "of", "says"),
    [
        # 30 of 200 become right: a gain of .15, with the standard error of a proportion, sqrt(.15 * .85 / 199).
        ([100, 110, 130, 120, 90], 200, "chosen: 50% of epoch 3: it gains +0.150 ± 0.025 on the encoder as it came"),
        (
            [100, 100, 101, 90, 90],
            200,
            "as it came: 50% of epoch 3 gains +0.005 ± 0.005, no more than its standard error",
        ),
        ([100, 80, 90, 70, 60], 200, "as it came: no mixture is better; the best, 50% of epoch 3, gains -0.050"),
        ([0, 0, 1, 0, 0], 1, "as it came: 50% of epoch 3 gains +1.000, with no standard error to compare that with"),
    ],
)
def test_what_is_kept_of_a_training_is_told_with_its_reason(right, of, says, recwarn):
    judged = [judged_with(count, of) for count in right]
    share = choose_share(judged)
    assert share == (0.5 if says.startswith("chosen: 50%") else 0.0)
    line = told_choice(judged, share, 3)
    assert says in line
    assert f"in the mean of Recall@1, 5 and 10 over {of} validation observation" in line
    assert not list(recwarn)

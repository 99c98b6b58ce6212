"""The first lines of a training say which observations it uses."""

import pytest

from kernel.inputs import InputError
from local.data.observations import split_for_validation
from local.recipes.settings import TrainSettings
from local.training.inputs import describe_data, describe_subset, describe_training
from tests.labelled import of_rows

TRAIN = [("train", f"t{number}", "ab"[number % 2]) for number in range(6)] + [("train", "t6", "c")]
VAL = [("val", "v0", "a"), ("val", "v1", "b"), ("val", "v2", "d")]


def described(rows, **settings):
    return describe_training(split_for_validation(of_rows(rows), 0), TrainSettings(epochs=1, **settings))


def test_the_first_line_counts_observations_and_classes():
    splits = "7 observations of 3 classes in train, 3 observations of 3 classes in val"
    assert describe_data(of_rows(TRAIN + VAL)).endswith(splits)
    assert describe_data(of_rows(TRAIN)).endswith("7 observations of 3 classes in train, no val")


def test_a_training_says_what_it_learns_from_and_is_validated_on():
    assert described(TRAIN + VAL) == (
        "training: learns from 7 observations of train, is validated on 3 of val; 1 of val is of classes that train "
        "lacks, so never right"
    )
    assert described(TRAIN + VAL, max_classes=1) == (
        "training: learns from 3 observations of train, is validated on 1 of val; of 7 and 3, those of the 1 "
        "largest class"
    )
    assert described(TRAIN) == (
        "training: learns from 5 observations of train, is validated on 2 others, never the only one of a class"
    )


def test_a_training_that_nothing_could_validate_is_refused():
    with pytest.raises(InputError, match=r"no val, and every class has one observation in the subset of 3; set epochs"):
        described([TRAIN[0], TRAIN[1], TRAIN[6]], subset=3)
    with pytest.raises(InputError, match=r"no observation of val is of a class that train has; set epochs to 0$"):
        described([TRAIN[0], TRAIN[1], VAL[2]])


@pytest.mark.parametrize(
    ("subset", "says"),
    [
        (5, "subset = 5: 5 of the 7 observations in train and 1 of the 3 observations in val"),
        (300, "subset = 300: all 7 observations in train and all 3 observations in val"),
    ],
)
def test_a_subset_says_what_it_leaves(subset, says):
    labelled = of_rows(TRAIN + VAL)
    assert describe_subset(labelled, labelled.sample(subset, 0), subset) == says

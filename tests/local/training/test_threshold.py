"""The threshold of an answer that is a set is chosen on quadrats pasted from photos that the bank has not seen."""

import numpy as np
import pytest
from PIL import Image

from local.banks.selection import BankSelection, SelectedBank, plan_bank
from local.data.concatenated_encoders import ConcatenatedEncoders
from local.data.observations import split_for_validation
from local.recipes.settings import BankSettings
from local.training.threshold import (
    GRIDS,
    MOST_CLASSES,
    QUADRATS,
    UNCHOSEN,
    Quadrat,
    best_threshold,
    choose_threshold,
    draw_quadrats,
)
from tests.labelled import of_rows

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


@pytest.fixture
def photos(tmp_path):
    """One photo of each of four classes, in a colour of its own; not all are square."""
    paths = {}
    for label, colour in enumerate(COLOURS):
        paths[label] = [tmp_path / f"{label}.png"]
        Image.new("RGB", (90, 60 + 30 * (label % 2)), colour).save(paths[label][0])
    return paths


def test_a_threshold_that_is_too_low_or_too_high_is_worse():
    truth = [{0, 1}, {2}]
    answers = [{0: 0.9, 1: 0.6, 2: 0.3}, {2: 0.8, 1: 0.41, 0: 0.2}]
    threshold, f1 = best_threshold(truth, answers, 20)
    assert 0.41 < threshold <= 0.6
    assert threshold == pytest.approx(0.51, abs=0.01)  # in the middle of those that are as good
    assert f1.tolist() == [1, 1]
    _, fewer = best_threshold(truth, answers, 1)
    assert fewer.tolist() == [pytest.approx(2 / 3), 1]


def test_a_threshold_is_compared_by_the_mean_over_the_quadrats():
    answers = [{0: 0.9, 1: 0.7}, {0: 0.9, 1: 0.5}, {0: 0.9, 1: 0.5}]
    assert best_threshold([{0}, {0, 1}, {0, 1}], answers, 20)[0] <= 0.5
    assert best_threshold([{0, 1}, {0}, {0}], answers, 20)[0] > 0.5


@pytest.mark.parametrize("side", [120, 121])
def test_a_quadrat_shows_each_photo_in_a_square_of_its_own(photos, side):
    shown = [0, 1, 2, 3, 1, 1, 2, 0, 3]
    pixels = Quadrat(tuple(photos[label][0] for label in shown), frozenset(shown)).paste(side)
    assert pixels.shape == (side, side, 3)
    centres = [round(side * (index + 0.5) / 3) for index in range(3)]
    assert [tuple(pixels[y, x].tolist()) for y in centres for x in centres] == [COLOURS[label] for label in shown]
    assert set(map(tuple, pixels.reshape(-1, 3).tolist())) == set(COLOURS)  # nothing is left black


def test_quadrats_have_two_to_six_of_the_classes_and_a_seed_draws_the_same(photos):
    many = {label: [f"{label}-{number}" for number in range(3)] for label in range(9)}
    drawn = list(draw_quadrats(many, QUADRATS, 0))
    assert drawn == list(draw_quadrats(many, QUADRATS, 0)) != list(draw_quadrats(many, QUADRATS, 1))
    assert {len(one.photos) for one in drawn} == {grid**2 for grid in GRIDS}
    assert {len(one.classes) for one in drawn} == set(range(2, MOST_CLASSES + 1))
    for one in drawn:
        assert {int(path.split("-")[0]) for path in one.photos} == one.classes
    assert len({path for one in drawn for path in one.photos}) == 27
    assert {len(one.classes) for one in draw_quadrats({1: ["a"], 5: ["b"]}, 20, 0)} == {2}
    assert np.mean([len(one.classes) for one in drawn]) == pytest.approx(3.7, abs=0.4)


@pytest.mark.parametrize("classes", ["abc", "aab"])
def test_where_fewer_than_two_classes_are_held_out_nothing_is_chosen(tmp_path, capsys, classes):
    labelled = of_rows([("train", str(number), label) for number, label in enumerate(classes)])
    plan = plan_bank(split_for_validation(labelled, 0), "train", is_tuned=False)
    selection = BankSelection(BankSettings(), (), plan, ConcatenatedEncoders(()), tmp_path)
    assert choose_threshold(selection, SelectedBank(BankSettings())) == (UNCHOSEN, {})
    said = capsys.readouterr().out
    assert said.startswith(f"threshold: {UNCHOSEN}, since fewer than two classes have held-out photos")

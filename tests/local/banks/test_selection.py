"""What a run says of the observations that it is made of and judged by adds up."""

import re

import numpy as np
import pytest

from local.banks import folds
from local.banks.selection import Study
from local.data.competition import read_competition, split_for_validation
from local.recipes.settings import BankSettings


def numbers(line):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def study(drawn, encoder, tmp_path, reference="train+val", is_tuned=False, has_val=True, subset=0):
    competition = read_competition(drawn.competition)
    competition = competition if has_val else competition.without_val()
    competition = competition.sample(subset, 0) if subset else competition
    settings = BankSettings(reference=reference)
    return Study(
        settings, ["whitening"], competition, *split_for_validation(competition, 0), encoder, tmp_path, is_tuned
    )


@pytest.mark.parametrize("is_tuned", [False, True])
@pytest.mark.parametrize("has_val", [False, True])
def test_observations_held_out_and_left_out_are_those_of_train_and_val(drawn, encoder, tmp_path, has_val, is_tuned):
    own = study(drawn, encoder, tmp_path, has_val=has_val, is_tuned=is_tuned)
    train, val = int(own.is_fit.sum()), int((~own.is_fit).sum())
    held_out = sum(queries.sum() for _, queries in own.folds)
    line = own.told_folds()
    of = f"the {train} of train and {val} of val" if has_val else f"the {train + val} of train"
    assert line.startswith(f"{held_out} held-out observations, in {len(own.folds)} folds over {of} (left out: ")
    assert held_out + sum(numbers(line.partition("left out")[2])) == train + val
    assert (f"{train} kept for training" in line) == is_tuned
    assert sum(numbers(own.told_reference())) == (2 if has_val else 1) * (train + val)


def test_a_class_of_one_observation_is_told_as_left_out(drawn, encoder, tmp_path):
    own = study(drawn, encoder, tmp_path)
    alone = int((np.bincount(own.places) == 1).sum())
    assert alone > 0
    assert f"{alone} alone in {'its' if alone == 1 else 'their'} class" in own.told_folds()


def test_val_that_is_kept_out_of_the_bank_is_all_that_judges(drawn, encoder, tmp_path):
    own = study(drawn, encoder, tmp_path, reference="train")
    train, val = int(own.is_fit.sum()), int((~own.is_fit).sum())
    assert own.told_reference() == f"bank: made of the {train} observations of train, without the {val} of val"
    assert own.told_folds() == f"{val} held-out observations (val)"
    own.places[-2:] = -1
    assert own.told_folds() == f"{val} held-out observations (val; 2 of classes that the bank lacks)"


def test_queries_that_are_not_drawn_are_told(drawn, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(folds, "SCORES", 12 * 10)
    own = study(drawn, encoder, tmp_path)
    line = own.told_folds()
    assert line.startswith("10 held-out observations")
    assert "not drawn" in line
    assert 10 + sum(numbers(line.partition("left out")[2])) == len(own.is_fit)


def test_a_run_that_nothing_can_judge_says_why_and_what_it_does_not_choose(drawn, encoder, tmp_path, capsys):
    own = study(drawn, encoder, tmp_path, has_val=False, subset=2)
    settings, _, scores = own.choose(tmp_path)
    assert (settings, scores) == (own.settings, {})
    assert capsys.readouterr().out.splitlines() == [
        "bank: made of the 2 observations of train",
        "0 held-out observations, of the 2 of train (left out: 2 alone in their class): this run has no score, and "
        "cannot choose whitening",
    ]

"""The observations of a run add up: those of its bank, those it is evaluated on, and those left out."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from kernel.inputs import InputError
from local.banks import estimators
from local.banks import selection as selection_module
from local.banks.evaluation import evaluate_predictions
from local.banks.selection import BankSelection, plan_bank
from local.data.concatenated_encoders import ConcatenatedEncoders
from local.data.observations import split_for_validation
from local.recipes.settings import BankSettings
from tests.labelled import of_rows

TRAIN = [("train", f"t{number}", "aaaabbbccd"[number % 10]) for number in range(30)] + [("train", "t30", "e")]
VAL = [("val", f"v{number}", "abc"[number % 3]) for number in range(9)]


def numbers(line):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def plan(rows, reference="train+val", is_tuned=False):
    return plan_bank(split_for_validation(of_rows(rows), 0), reference, is_tuned)


@pytest.mark.parametrize("is_tuned", [False, True])
@pytest.mark.parametrize("rows", [TRAIN, TRAIN + VAL])
def test_observations_held_out_and_left_out_are_those_of_train_and_val(rows, is_tuned):
    own = plan(rows, is_tuned=is_tuned)
    train, val = int(own.split.train.sum()), int(own.split.validation.sum())
    held_out = sum(queries.sum() for _, queries in own.folds)
    line = own.describe_folds()
    of = f"the {train} of train and {val} of val" if len(rows) > len(TRAIN) else f"the {train + val} of train"
    assert line.startswith(f"{held_out} held-out observations, in {len(own.folds)} folds over {of} (left out: ")
    assert held_out + sum(numbers(line.partition("left out")[2])) == len(rows)
    assert (f"{train} kept for training" in line) == is_tuned
    assert sum(numbers(own.describe_reference())) == (2 if len(rows) > len(TRAIN) else 1) * len(rows)


def test_an_encoder_is_evaluated_by_no_observation_that_it_was_trained_on():
    for rows in (TRAIN, TRAIN + VAL):
        own = plan(rows, is_tuned=True)
        assert own.folds
        assert all(not (queries & own.split.train).any() for _, queries in own.folds)


def test_a_class_of_one_observation_is_counted_as_left_out():
    assert "1 alone in its class" in plan(TRAIN + VAL).describe_folds()


def test_val_that_is_kept_out_of_the_bank_is_all_that_evaluates_it():
    own = plan([*TRAIN, *VAL], reference="train")
    assert own.describe_reference() == "bank: made of the 31 observations of train, without the 9 of val"
    assert own.describe_folds() == "9 held-out observations (val)"
    [(reference, queries)] = own.folds
    assert not (reference & queries).any()
    lacking = plan([*TRAIN, *VAL, ("val", "v9", "x"), ("val", "v10", "y")], reference="train")
    assert lacking.describe_folds() == "11 held-out observations (val; 2 of classes that the bank lacks)"
    assert "x" not in lacking.classes
    assert lacking.labels[-2:].tolist() == [-1, -1]


@pytest.mark.parametrize("reference", ["train", "train+val"])
def test_with_many_classes_some_observations_choose_and_all_are_scored(
    reference, encoder, drawn, tmp_path, monkeypatch, capsys
):
    from local.data.competition import read_competition

    own = plan_bank(split_for_validation(read_competition(drawn.competition), 0), reference, is_tuned=False)
    settings = replace(BankSettings(), resize_mode="crop", views=("plain",))
    encoders = ConcatenatedEncoders((encoder,))
    every = BankSelection(settings, [], own, encoders, tmp_path).select()
    capsys.readouterr()
    monkeypatch.setattr(selection_module, "MAX_SCORES", 10 * len(own.classes))
    some = BankSelection(settings, [], own, encoders, tmp_path).select()
    assert (
        f"predictions are kept for 10 of the {len(every.predictions.truth)} held-out observations"
        in capsys.readouterr().out
    )
    assert some.scores == every.scores
    assert set(some.predictions.observations) < set(every.predictions.observations)
    assert len(some.predictions.observations) == 10
    monkeypatch.setattr(selection_module, "MAX_FINAL_SCORES", 12 * len(own.classes))
    assert BankSelection(settings, [], own, encoders, tmp_path).select().scores["observations"] == 12
    assert "scored on 12 held-out observations, drawn at random" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(selection_module, "MAX_SCORES", 10 * len(own.classes))
    chosen = BankSelection(settings, ["whitening"], own, encoders, tmp_path).select()
    other = BankSelection(chosen.settings, [], own, encoders, tmp_path).select()
    # The ten are predicted with the settings that the others of the ten choose, all the rest with those of all ten.
    differing = (other.scores["unweighted_recall_at_1"] - chosen.scores["unweighted_recall_at_1"]) * len(
        every.predictions.truth
    )
    assert abs(differing) <= 10


@pytest.mark.parametrize(
    ("settings", "choose", "limit", "refused"),
    [
        (BankSettings(matcher="logistic"), [], "MAX_LOGITS", "logistic"),
        (BankSettings(), ["matcher"], "MAX_LOGITS", "logistic"),
        (BankSettings(matcher="projection"), [], "MAX_LOGITS", ""),
        (BankSettings(matcher="projection"), [], "MAX_VALUES", "projection"),
        (BankSettings(), ["whitening"], "MAX_LOGITS", ""),
        (BankSettings(matcher="head"), ["matcher"], "MAX_LOGITS", ""),
    ],
)
def test_a_matcher_that_does_not_fit_in_memory_is_refused_before_photos_are_embedded(
    settings, choose, limit, refused, encoder, tmp_path, monkeypatch
):
    embedded: list[int] = []
    monkeypatch.setattr(estimators, limit, 1)
    selection = BankSelection(settings, choose, plan(TRAIN), ConcatenatedEncoders((encoder,)), tmp_path)
    monkeypatch.setattr(selection, "embed", lambda *_: embedded.append(1))
    expected = pytest.raises(InputError, match=f"{refused} needs too much memory for 31 observations of 5 classes")
    with expected if refused else nullcontext():
        selection.embed_all()
    assert bool(embedded) == (not refused)


@pytest.mark.parametrize(
    ("own", "choose", "expected"),
    [
        ("squash", ["whitening"], [("squash", 1)]),
        ("squash", ["resize_mode"], [("squash", 3), ("crop", 2), ("pad", 1)]),
        ("encoder", ["resize_mode"], [("encoder", 4), ("crop", 3), ("squash", 2), ("pad", 1)]),
    ],
)
def test_every_resize_mode_that_may_be_selected_is_embedded(own, choose, expected, encoder, tmp_path, monkeypatch):
    embedded = []
    settings = BankSettings(resize_mode=own)
    selection = BankSelection(settings, choose, plan(TRAIN), ConcatenatedEncoders((encoder,)), tmp_path)
    monkeypatch.setattr(selection, "embed", lambda *mode: embedded.append(mode))
    selection.embed_all()
    assert embedded == expected


def test_a_class_without_a_readable_photo_is_named_and_never_predicted(encoder, drawn, tmp_path, capsys):
    from local.data.competition import read_competition

    whole = read_competition(drawn.competition).in_splits("train")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a photo")
    names, sizes = np.unique(whole.class_ids, return_counts=True)
    one, other = names[np.argsort(-sizes, kind="stable")][:2]
    observations = list(whole.observations)
    for index in np.flatnonzero(whole.class_ids == one):
        observations[index] = replace(observations[index], photos=(broken,))
    partly = np.flatnonzero(whole.class_ids == other)[0]  # the other photos of its class can be read
    observations[partly] = replace(observations[partly], photos=(broken,))
    own = plan_bank(split_for_validation(replace(whole, observations=observations), 0), "train", is_tuned=False)
    selection = BankSelection(BankSettings(resize_mode="crop"), [], own, ConcatenatedEncoders((encoder,)), tmp_path)
    selection.embed_all()
    said = f"1 class without a readable photo, never predicted: {one!r}; download these photos again"
    assert said in capsys.readouterr().out.splitlines()
    bank = selection.select().banks[0][0]
    assert (bank.bias < -1).tolist() == [name == one for name in own.classes]


def test_a_run_that_nothing_can_evaluate_says_why_and_what_it_does_not_choose(encoder, drawn, tmp_path, capsys):
    from local.data.competition import read_competition

    labelled = read_competition(drawn.competition).in_splits("train").sample(2, 0)
    own = plan_bank(split_for_validation(labelled, 0), "train", is_tuned=False)
    selection = BankSelection(
        BankSettings(resize_mode="crop"), ["whitening"], own, ConcatenatedEncoders((encoder,)), tmp_path
    )
    selection.embed_all()
    capsys.readouterr()
    selected = selection.select()
    assert (selected.settings, selected.scores, selected.predictions) == (selection.settings, {}, None)
    assert len(selected.banks[0][0].bias) == len(own.classes)
    assert capsys.readouterr().out.splitlines() == [
        "bank: made of the 2 observations of train",
        "0 held-out observations, of the 2 of train (left out: 2 alone in their class): this run has no score, and "
        "cannot choose whitening",
    ]


def test_the_answers_are_to_the_held_out_observations_in_the_order_of_the_folds(encoder, drawn, tmp_path):
    from local.banks.ensemble import read_predictions
    from local.base.run_folder import VALIDATION_FILE
    from local.data.competition import read_competition

    own = plan_bank(split_for_validation(read_competition(drawn.competition), 0), "train+val", is_tuned=False)
    settings = replace(BankSettings(), resize_mode="crop", views=("plain",))
    answers = BankSelection(settings, [], own, ConcatenatedEncoders((encoder,)), tmp_path).select().predictions
    queries = np.concatenate([np.flatnonzero(queries) for _, queries in own.folds])
    assert answers.observations == [own.split.labelled.ids[index] for index in queries]
    assert [own.classes[label] for label in answers.truth] == own.split.labelled.class_ids[queries].tolist()
    answers.write(tmp_path / VALIDATION_FILE)
    read = read_predictions(tmp_path)
    assert read.log_probabilities.exp().sum(dim=1).numpy() == pytest.approx(1, abs=0.01)
    assert read.truth.tolist() == answers.truth.tolist()
    assert read.view_votes.tolist() == answers.view_votes.tolist()


def test_the_optimistic_scores_are_those_of_the_selected_settings(encoder, drawn, tmp_path):
    from local.data.competition import read_competition

    own = plan_bank(split_for_validation(read_competition(drawn.competition), 0), "train+val", is_tuned=False)
    settings = replace(BankSettings(), resize_mode="crop", views=("plain",))
    selected = BankSelection(settings, ["whitening"], own, ConcatenatedEncoders((encoder,)), tmp_path).select()
    again = BankSelection(selected.settings, [], own, ConcatenatedEncoders((encoder,)), tmp_path).select()
    assert selected.optimistic_scores == again.scores
    assert again.optimistic_scores == {}
    assert again.inverse_temperature == selected.inverse_temperature != 1
    hits = evaluate_predictions(selected.predictions.log_probabilities, selected.predictions.truth).ranks < 1
    assert selected.scores["unweighted_recall_at_1"] == pytest.approx(hits.mean())

"""Near-duplicates of held-out photos are found among the photos of other observations in the reference set."""

import numpy as np
import pytest

from local.data import duplicates
from local.data.duplicates import find_near_duplicates, measure_background

ALL = np.ones(3, dtype=bool)
ONE_CLASS = np.zeros(200, dtype=int)


def test_a_copy_in_another_observation_is_found_and_one_in_the_same_is_not():
    photos = np.eye(4)[[0, 0, 1, 2, 1]]
    found = find_near_duplicates(photos, np.array([0, 0, 1, 1, 2]), ONE_CLASS, ALL, ALL)
    assert found.photos.tolist() == [2, 4]
    assert found.matches.tolist() == [4, 2]
    assert found.cosines == pytest.approx(1)


def test_only_held_out_photos_are_compared_and_only_with_the_reference():
    photos, observations = np.ones((3, 2)), np.arange(3)
    masks = (np.array([True, True, False]), np.array([False, False, True]))
    found = find_near_duplicates(photos, observations, ONE_CLASS, *masks)
    assert found.photos.tolist() == [0, 1]
    assert found.matches.tolist() == [2, 2]


def test_the_most_similar_photo_is_the_match_if_its_cosine_is_at_least_the_threshold():
    def at(degrees: float) -> list[float]:
        return [5 * np.cos(np.radians(degrees)), 5 * np.sin(np.radians(degrees))]

    photos = np.array([at(0), at(11), at(7), at(40)])  # cos 11° = .9816, cos 7° = .9925, cos 33° = .8387
    found = find_near_duplicates(
        photos, np.arange(4), ONE_CLASS, np.array([True, False, False, True]), np.array([False, True, True, False])
    )
    assert (found.photos.tolist(), found.matches.tolist()) == ([0], [2])
    assert found.cosines == pytest.approx(np.cos(np.radians(7)))


def test_chunks_of_half_precision_give_what_all_pairs_at_once_give(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 8))
    photos = centres[rng.integers(20, size=150)] + rng.normal(size=(150, 8)) * 0.1
    observations = np.sort(rng.integers(60, size=150))
    query_mask, reference = rng.random(60) < 0.7, rng.random(60) < 0.7
    monkeypatch.setattr(duplicates, "HELD_OUT_ROWS", 13)
    monkeypatch.setattr(duplicates, "REFERENCE_ROWS", 17)
    found = find_near_duplicates(photos.astype(np.float16), observations, ONE_CLASS, query_mask, reference)
    unit = photos.astype(np.float16).astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    cosines[observations[:, None] == observations] = -1
    cosines[:, ~reference[observations]] = -1
    expected = np.flatnonzero(query_mask[observations] & (cosines.max(axis=1) >= 0.98))
    assert 0 < len(expected) < query_mask[observations].sum()
    assert found.photos.tolist() == expected.tolist()
    assert found.matches.tolist() == cosines[expected].argmax(axis=1).tolist()
    assert found.cosines == pytest.approx(cosines[expected].max(axis=1), abs=1e-6)


def test_without_held_out_photos_nothing_is_found():
    found = find_near_duplicates(np.zeros((0, 4)), np.zeros(0, dtype=int), ONE_CLASS, ALL, ALL)
    assert len(found.photos) == len(found.matches) == len(found.cosines) == 0


def test_where_photos_of_different_classes_look_the_same_to_the_encoder_none_is_a_near_duplicate():
    rng = np.random.default_rng(0)
    photos, observations = 1 + rng.random((40, 8)) / 10, np.arange(40)
    masks = np.ones((2, 40), dtype=bool)
    weak = find_near_duplicates(photos, observations, np.arange(40) % 4, *masks)
    assert weak.background > 0.9
    assert len(weak.photos) == 0
    alike = find_near_duplicates(photos, observations, ONE_CLASS, *masks)
    assert alike.background == 0
    assert len(alike.photos) == 40


def test_the_background_is_counted_over_pairs_of_different_classes():
    photos = np.array([[1, 0], [1, 0], [0, 1], [1, 0.01]])
    assert measure_background(photos, np.array([0, 0, 1, 2]), 0.98) == pytest.approx(2 / 5)

"""Fitting from embeddings on disk, part by part, gives the bank of fitting from all of them in memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from local.banks import estimators
from local.banks.estimators import Whitening, l2_normalize, pool
from local.banks.fitting import Embedded, fit_banks
from local.banks.folds import FOLDS, make_folds
from local.banks.search import Search
from local.base import scratch
from local.data.concatenated_encoders import FeatureBlock
from local.data.observations import Taxonomy
from local.recipes.settings import BankSettings
from tests.local.data.test_stored_embeddings import stored

VIEWS = ("plain", "hflip")
SETTINGS = BankSettings(views=VIEWS, resize_mode="crop")


def in_memory() -> Embedded:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), np.arange(1, 11))
    observations = np.repeat(np.arange(len(labels)), rng.integers(1, 3, len(labels)))
    centres = rng.normal(size=(10, 8))
    photos = centres[labels[observations]][:, None] + rng.normal(size=(len(observations), 2, 8))
    genus = np.arange(10) // 3
    return Embedded(
        l2_normalize(photos + 1).astype(np.float16),
        VIEWS,
        observations,
        labels,
        Taxonomy(genus, genus // 2),
        blocks=(FeatureBlock(0, "token", 2), FeatureBlock(0, "avg", 3), FeatureBlock(1, "", 3)),
    )


@pytest.fixture
def whole():
    return in_memory()


@pytest.fixture
def on_disk(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(estimators, "ROWS", 7)
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    return replace(whole, values=stored(tmp_path, whole.values))


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, whitening=0.75, genus_weight=0.5, family_weight=0.25),
        replace(SETTINGS, whitening=0.5, nearest_neighbour_weight=0.3),
        replace(SETTINGS, pooling="max", views=("hflip",), whitening=1.0),
        replace(SETTINGS, matcher="logistic", whitening=0.5),
        replace(SETTINGS, matcher="projection", whitening=0.5),
        replace(SETTINGS, whitening=0.5, encoder_weights=(0.5, 1.0), pool_part="avg"),
        replace(SETTINGS, matcher="projection", encoder_weights=(0.5, 1.0), pool_part="avg"),
    ],
    ids=lambda settings: (
        f"{settings.matcher} {settings.pooling} {settings.nearest_neighbour_weight} {settings.pool_part}"
    ),
)
def test_the_banks_are_the_same(whole, settings, tmp_path, monkeypatch):
    reference = np.arange(len(whole.labels)) % 4 != 1
    expected = fit_banks(settings, whole, reference, (20.0,) * (1 + (settings.nearest_neighbour_weight > 0)))
    monkeypatch.setattr(estimators, "ROWS", 7)
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    on_disk = replace(whole, values=stored(tmp_path, whole.values))
    found = fit_banks(settings, on_disk, reference, (20.0,) * (1 + (settings.nearest_neighbour_weight > 0)))
    for bank, other in zip(expected, found, strict=True):
        queries = torch.tensor(whole.pooled(settings)[~reference])
        scores, other_scores = (
            one.log_probabilities(one.similarities(one.transform(queries))) for one in (bank, other)
        )
        assert torch.allclose(scores, other_scores, atol=1e-5, rtol=1e-5)
        assert torch.allclose(bank.counts, other.counts, atol=1e-5)


def test_the_search_is_the_same(whole, on_disk):
    folds, every = make_folds(whole.labels, 0), np.ones(len(whole.labels), dtype=bool)
    settings = replace(SETTINGS, whitening=0.75, class_prior_exponent=0.5)
    losses = []
    for embedded in (whole, on_disk):
        losses.append(Search(lambda _, one=embedded: one, "crop", folds, 10, every).evaluate(settings).losses)
    assert np.allclose(*losses, atol=1e-4)


def test_the_whitening_is_the_same(whole, on_disk):
    labels = whole.labels[whole.observations]
    expected, found = Whitening().fit(whole.values, labels), Whitening().fit(on_disk.values, labels)
    assert np.allclose(expected.variances_, found.variances_, rtol=1e-9)


def test_pooling_is_the_mean_over_views_and_photos(whole, on_disk):
    photos = whole.values.mean(axis=1, dtype=np.float64)
    sums = np.stack([photos[whole.observations == number].sum(axis=0) for number in range(len(whole.labels))])
    assert np.allclose(pool(on_disk.values, whole.observations), l2_normalize(sums), atol=1e-6)


def test_a_large_array_is_on_disk_and_starts_with_zeros(monkeypatch):
    monkeypatch.setattr(scratch, "IN_MEMORY", 100)
    large, small = scratch.scratch_array((100, 3), np.float32), scratch.scratch_array((2, 3))
    assert (large.dtype, large.shape, large.any()) == (np.float32, (100, 3), False)
    assert isinstance(large.base, np.memmap)
    assert small.base is None
    large += 1
    assert large.sum() == 300


def test_without_room_on_the_disk_it_is_in_memory(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "IN_MEMORY", 100)
    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    assert scratch.scratch_array((100, 3)).base is None


@pytest.mark.parametrize("seed", range(5))
def test_folds_draw_as_one_class_after_another_would(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(25), rng.integers(1, 13, 25)))
    query_mask = rng.random(len(labels)) < 0.8
    rng, fold = np.random.default_rng(seed), np.full(len(labels), -1)
    for label in rng.permutation(np.unique(labels)):
        own = labels == label
        queries = rng.permutation(np.flatnonzero(own & query_mask))
        if len(queries) and own.sum() > 1:
            fold[queries] = (np.arange(len(queries)) + rng.integers(FOLDS)) % FOLDS
    made = make_folds(labels, seed, query_mask)
    assert [np.flatnonzero(queries).tolist() for _, queries in made] == [
        np.flatnonzero(fold == number).tolist() for number in range(FOLDS)
    ]

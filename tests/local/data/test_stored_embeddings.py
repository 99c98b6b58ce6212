"""Embeddings on disk are indexed as an array in memory is."""

import numpy as np
import pytest

from local.data.shards import ShardFolder
from local.data.stored_embeddings import Block, StoredEmbeddings, concatenate_features

PHOTOS, VIEWS, FEATURES = 9, 3, 8


def stored(folder, values, size=4):
    """The embeddings on disk, in files of `size` rows, in another order than that of the photos."""
    rng = np.random.default_rng(0)
    keys, tables, rows = rng.integers(256, size=(len(values), 32), dtype=np.uint8), [], []
    for view in range(values.shape[1]):
        shards, order = ShardFolder(folder / str(view), values.shape[2], np.float16), rng.permutation(len(values))
        for part in np.split(order, range(size, len(order), size)):
            shards.add(keys[part], values[part, view])
        tables.append(shards.read())
        rows.append(tables[-1].find(keys))
    return StoredEmbeddings([Block(tuple(tables), np.stack(rows, axis=1), values.shape[2])])


@pytest.fixture
def values():
    return np.random.default_rng(1).normal(size=(PHOTOS, VIEWS, FEATURES)).astype(np.float16)


INDICES = [
    np.s_[:],
    np.s_[2:7],
    np.s_[np.arange(PHOTOS) % 2 == 0],
    np.s_[np.array([5, 5, 0])],
    np.s_[np.array([], dtype=int)],
    np.s_[:, [2, 0]],
    np.s_[1:, 1:],
    np.s_[:, 0],
    np.s_[3],
    np.s_[3, 1],
    np.s_[-1, :, :5],
    np.s_[:, :, :5],
    np.s_[np.array([1, 8]), 2],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_selects_what_it_selects_in_memory(values, tmp_path, index):
    found = stored(tmp_path, values)[index]
    assert found.shape == values[index].shape
    assert np.array_equal(found, values[index])
    assert np.asarray(found).dtype == np.float16


def test_indices_follow_one_another(values, tmp_path):
    assert np.array_equal(stored(tmp_path, values)[2:][:, [1, 2]][1], values[2:][:, [1, 2]][1])


def test_two_arrays_at_once_are_refused_because_numpy_would_pair_them(values, tmp_path):
    with pytest.raises(TypeError, match="one axis after another"):
        stored(tmp_path, values)[np.array([0, 1]), [0, 1]]


@pytest.mark.parametrize("factor", [0.6, np.float64(0.8)])
def test_they_are_scaled_as_in_memory(values, tmp_path, factor):
    found = stored(tmp_path, values)
    assert np.array_equal((found * factor).astype(np.float16), (values * np.float64(factor)).astype(np.float16))


def test_features_of_several_encoders_are_concatenated(values, tmp_path):
    other = values[:, :, :5] * 2
    first, second = stored(tmp_path / "a", values), stored(tmp_path / "b", other)
    both, found = np.concatenate([values, other], axis=2), concatenate_features([first, second])
    assert isinstance(found, StoredEmbeddings)
    assert np.array_equal(found, both)
    assert np.array_equal(found[1:, :, :10], both[1:, :, :10])
    assert np.array_equal(found[:, 0, : FEATURES - 1], both[:, 0, : FEATURES - 1])
    assert np.array_equal(concatenate_features([values, second]), both)


def test_encoders_with_other_photos_are_refused(values, tmp_path):
    with pytest.raises(ValueError, match="same photos and views"):
        concatenate_features([stored(tmp_path / "a", values), stored(tmp_path / "b", values[1:])])

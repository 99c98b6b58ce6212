"""What training sees depends only on the seed, the epoch and the position in it."""

import multiprocessing

import numpy as np
import pytest
import torch

from kernel.inputs import InputError
from local.recipes.settings import AugmentSettings, TrainSettings
from local.training.batches import BatchAugmentation, ObservationBatchSampler, PhotoDataset, collate, make_loader
from tests.conftest import photo

LABELS = np.repeat(np.arange(6), [1, 1, 2, 3, 9, 20])


def sampler(rank=0, world_size=1, **settings):
    return ObservationBatchSampler(LABELS, TrainSettings(**{"batch_size": 5, **settings}), rank, world_size)


def test_an_epoch_shows_every_observation_once_and_the_next_in_another_order():
    one, other = ([sample.index for batch in sampler().set_epoch(epoch) for sample in batch] for epoch in (1, 2))
    assert sorted(one) == sorted(other) == list(range(len(LABELS)))
    assert one != other


@pytest.mark.parametrize("settings", [{}, {"balance": 1.0}, {"prototypes": "episodic", "ways": 3, "queries": 2}])
def test_the_rest_of_an_epoch_is_the_same_from_wherever_it_is_resumed(settings):
    whole = list(sampler(**settings).set_epoch(3))
    assert list(sampler(**settings).set_epoch(3, 2)) == whole[2:]
    assert len(whole) == len(sampler(**settings))


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [5] * 6 + [6]), (35, [36]), (36, [36]), (34, [34, 2]), (1, [1] * 36)]
)
def test_a_rest_of_one_observation_is_joined_to_the_batch_before_it(batch_size, sizes):
    batches = sampler(batch_size=batch_size)
    assert [len(batch) for batch in batches] == sizes
    assert len(batches) == len(sizes)


def test_balanced_classes_are_drawn_equally_often():
    epochs = [list(sampler(balance=1.0).set_epoch(epoch)) for epoch in range(60)]
    drawn = LABELS[[sample.index for epoch in epochs for batch in epoch for sample in batch]]
    counts = np.bincount(drawn, minlength=6) / len(drawn)
    assert counts.min() > 0.5 / 6
    assert counts.max() < 1.5 / 6


def test_processes_divide_every_batch():
    alone = [[sample.index for sample in batch] for batch in sampler()]
    parts = [[[sample.index for sample in batch] for batch in sampler(rank, 2)] for rank in range(2)]
    for whole, one, other in zip(alone, *parts, strict=True):
        assert set(one) | set(other) == set(whole)
        assert not set(one) & set(other) or len(whole) == 1
    assert all(batch for batch in sampler(7, 8))  # none is left out, since the others would wait for it


def test_support_and_query_sets_of_an_episode_are_disjoint_and_small_classes_have_smaller_ones():
    for batch in sampler(prototypes="episodic", ways=6, support=2, queries=4).set_epoch(1):
        support, queries = (
            [sample.index for sample in batch if sample.is_query == is_query] for is_query in (False, True)
        )
        assert not set(support) & set(queries)
        assert set(LABELS[queries]) <= set(LABELS[support]) == set(range(6))
        assert np.bincount(LABELS[support]).tolist() == [1, 1, 1, 2, 2, 2]
        assert np.bincount(LABELS[queries], minlength=6).tolist() == [0, 0, 1, 1, 4, 4]


def test_the_same_sample_gives_the_same_pixels_whatever_came_before(drawn, encoder):
    from local.data.competition import read_competition

    settings = {"rand_augment": 9, "rotate": 20, "translate": 0.1, "hue": 0.1}
    part = read_competition(drawn.competition).in_splits("train")
    photos = PhotoDataset(part.observations, encoder.preprocessing, AugmentSettings(**settings), 4)
    sample = next(iter(ObservationBatchSampler(np.zeros(len(part), dtype=int), TrainSettings())))[0]
    first, _ = photos[sample]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(photos[sample][0], first)


def test_an_unreadable_photo_costs_only_itself(tmp_path, encoder):
    from kernel.observations import Observation

    good, bad = photo(tmp_path / "good.jpg"), tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    observations = [Observation("one", (bad, good)), Observation("two", (bad,)), Observation("three", (good, good))]
    photos = PhotoDataset(observations, encoder.preprocessing, AugmentSettings(), 1)
    batch = collate([photos[sample] for sample in next(iter(ObservationBatchSampler(np.arange(3), TrainSettings())))])
    assert batch.photos.shape == (2, 3, 64, 64)
    assert sorted(batch.indices.tolist()) == [0, 2]


@pytest.mark.parametrize("photos", [4, 5])
@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mixed_photos_have_mixed_targets(photos, settings):
    np.random.seed(0)
    augment = BatchAugmentation(6, AugmentSettings(**settings), torch.device("cpu"))
    numbers = torch.arange(photos)
    pixels, targets = augment(numbers.float().view(-1, 1, 1, 1).repeat(1, 3, 8, 8), numbers)
    assert torch.allclose(targets.sum(dim=1), torch.ones(photos))
    assert torch.allclose(targets[:, :photos] @ numbers.float(), pixels.mean(dim=(1, 2, 3)), atol=1e-4)
    assert (targets.amax(dim=1) < 1).any()


def test_temporary_files_in_a_folder_of_too_long_a_name_are_refused_before_the_first_batch(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", f"/{'x' * 89}")
    with pytest.raises(InputError, match="set TMPDIR to a shorter one"):
        make_loader([], sampler(), torch.device("cpu"))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", f"/{'x' * 88}")
    make_loader([], sampler(), torch.device("cpu"))

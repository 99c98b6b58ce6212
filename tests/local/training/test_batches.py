"""What training sees is a function of the seed, the epoch and the place in it, and of nothing else."""

import numpy as np
import pytest
import torch

from local.recipes.settings import AugmentSettings, TrainSettings
from local.training.batches import Draws, Mixing, Photos, collate
from tests.conftest import photo

CLASSES = np.repeat(np.arange(6), [1, 1, 2, 3, 9, 20])


def draws(share=(0, 1), **settings):
    return Draws(CLASSES, TrainSettings(**{"batch_size": 5, **settings}), share)


def test_an_epoch_shows_every_observation_once_and_the_next_in_another_order():
    one, other = ([draw.index for batch in draws().start(epoch) for draw in batch] for epoch in (1, 2))
    assert sorted(one) == sorted(other) == list(range(len(CLASSES)))
    assert one != other


@pytest.mark.parametrize("settings", [{}, {"balance": 1.0}, {"prototypes": "episodic", "ways": 3, "queries": 2}])
def test_the_rest_of_an_epoch_is_the_same_wherever_it_is_taken_up(settings):
    whole = list(draws(**settings).start(3))
    assert list(draws(**settings).start(3, 2)) == whole[2:]
    assert len(whole) == len(draws(**settings))


def test_balanced_classes_are_drawn_alike():
    epochs = [list(draws(balance=1.0).start(epoch)) for epoch in range(60)]
    drawn = CLASSES[[draw.index for epoch in epochs for batch in epoch for draw in batch]]
    counts = np.bincount(drawn, minlength=6) / len(drawn)
    assert counts.min() > 0.5 / 6
    assert counts.max() < 1.5 / 6


def test_processes_share_every_batch():
    alone = [[draw.index for draw in batch] for batch in draws()]
    shares = [[[draw.index for draw in batch] for batch in draws((rank, 2))] for rank in range(2)]
    for whole, one, other in zip(alone, *shares, strict=True):
        assert set(one) | set(other) == set(whole)
        assert not set(one) & set(other) or len(whole) == 1
    assert all(batch for batch in draws((7, 8)))  # none is left out, since the others would wait for it


def test_an_episode_never_asks_what_made_a_prototype_and_copes_with_small_classes():
    for batch in draws(prototypes="episodic", ways=6, support=2, queries=4).start(1):
        support, asked = ([draw.index for draw in batch if draw.is_asked == is_asked] for is_asked in (False, True))
        assert not set(support) & set(asked)
        assert set(CLASSES[asked]) <= set(CLASSES[support]) == set(range(6))
        assert np.bincount(CLASSES[support]).tolist() == [1, 1, 1, 2, 2, 2]
        assert np.bincount(CLASSES[asked], minlength=6).tolist() == [0, 0, 1, 1, 4, 4]


def test_the_same_draw_gives_the_same_pixels_whatever_came_before(drawn, encoder):
    from local.data.competition import labelled, read_competition

    settings = {"rand_augment": 9, "rotate": 20, "translate": 0.1, "hue": 0.1}
    part = labelled(read_competition(drawn.competition), "train")
    photos = Photos(part.observations, encoder.preprocessing, AugmentSettings(**settings), 4)
    draw = next(iter(Draws(np.zeros(len(part), dtype=int), TrainSettings())))[0]
    first, _ = photos[draw]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(photos[draw][0], first)


def test_an_unreadable_photo_costs_only_itself(tmp_path, encoder):
    from kernel.observations import Observation

    good, bad = photo(tmp_path / "good.jpg"), tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    observations = [Observation("one", (bad, good)), Observation("two", (bad,)), Observation("three", (good, good))]
    photos = Photos(observations, encoder.preprocessing, AugmentSettings(), 1)
    batch = collate([photos[draw] for draw in next(iter(Draws(np.arange(3), TrainSettings())))])
    assert batch.photos.shape == (2, 3, 64, 64)
    assert sorted(batch.index.tolist()) == [0, 2]


@pytest.mark.parametrize("photos", [4, 5])
@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mixed_photos_have_mixed_targets(photos, settings):
    np.random.seed(0)
    mixing = Mixing(6, AugmentSettings(**settings), torch.device("cpu"))
    numbers = torch.arange(photos)
    pixels, targets = mixing(numbers.float().view(-1, 1, 1, 1).repeat(1, 3, 8, 8), numbers)
    assert torch.allclose(targets.sum(dim=1), torch.ones(photos))
    assert torch.allclose(targets[:, :photos] @ numbers.float(), pixels.mean(dim=(1, 2, 3)), atol=1e-4)
    assert (targets.amax(dim=1) < 1).any()

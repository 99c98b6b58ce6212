"""An observation's embedding is the mean over its photos and views, whatever the batches and the order."""

import pytest
import torch

from kernel.budget import Budget
from kernel.observations import Observation
from kernel.photos import decode
from kernel.views import embed_observations, embed_photos
from tests.conftest import photo


@pytest.fixture(scope="module")
def observations(tmp_path_factory):
    """40 observations of 1 to 3 photos: more than two batches."""
    folder, seed, result = tmp_path_factory.mktemp("photos"), 0, []
    for number in range(40):
        paths = []
        for _ in range(1 + number % 3):
            paths.append(photo(folder / f"{seed}.jpg", seed))
            seed += 1
        result.append(Observation(str(number), tuple(paths)))
    return result


def by_hand(encoder, path, views=("plain",)):
    pixels = torch.from_numpy(decode(path, encoder.preprocessing).copy()).permute(2, 0, 1)[None]
    return embed_photos(encoder, pixels, views)[0]


def test_an_observation_is_the_normalised_mean_of_its_photos(encoder, observations):
    found = embed_observations(encoder, observations, ["plain"])
    for index in (0, 2, 17, 39):
        mean = torch.stack([by_hand(encoder, path) for path in observations[index].photos]).mean(dim=0)
        assert torch.allclose(found.values[index], mean / mean.norm(), atol=1e-5)
    assert found.photos.tolist() == [1 + number % 3 for number in range(40)]


def test_max_pooling_takes_the_largest_of_each_feature(encoder, observations):
    found = embed_observations(encoder, observations, ["plain"], pooling="max")
    largest = torch.stack([by_hand(encoder, path) for path in observations[2].photos]).amax(dim=0)
    assert torch.allclose(found.values[2], largest / largest.norm(), atol=1e-5)


def test_views_are_averaged_and_hflip_of_a_mirrored_photo_is_the_photo(encoder, observations):
    path = observations[0].photos[0]
    pixels = torch.from_numpy(decode(path, encoder.preprocessing).copy()).permute(2, 0, 1)[None]
    plain, flipped = embed_photos(encoder, pixels, ["plain"]), embed_photos(encoder, pixels, ["hflip"])
    assert torch.allclose(flipped, embed_photos(encoder, pixels.flip(-1), ["plain"]), atol=1e-5)
    assert torch.allclose(embed_photos(encoder, pixels, ["plain", "hflip"]), (plain + flipped) / 2, atol=1e-6)


def test_the_order_of_the_table_does_not_change_an_observation(encoder, observations):
    forward = embed_observations(encoder, observations, ["plain", "hflip"]).values
    backward = embed_observations(encoder, observations[::-1], ["plain", "hflip"]).values
    assert torch.allclose(forward, backward.flip(0), atol=1e-5)


def test_an_unreadable_photo_leaves_its_observation_to_the_others(encoder, observations, tmp_path):
    missing = tmp_path / "missing.jpg"
    mixed = Observation("mixed", (*observations[1].photos, missing))
    found = embed_observations(encoder, [mixed, Observation("none", (missing,))], ["plain"])
    expected = embed_observations(encoder, [observations[1]], ["plain"])
    assert torch.allclose(found.values[0], expected.values[0], atol=1e-6)
    assert found.seen.tolist() == [True, False]
    assert found.values[1].abs().sum() == 0
    assert found.failures == {"FileNotFoundError": 2}


def test_when_the_budget_is_spent_no_observation_is_half_done(encoder, observations):
    readings = iter([0.0, 96.0])  # the first batch is in time, the second is not
    found = embed_observations(encoder, observations, ["plain"], budget=Budget(100, 0, lambda: next(readings)))
    complete = found.seen.tolist().index(False)
    assert not any(found.seen[complete:])
    assert found.late == len(observations) - complete
    assert found.photos[:complete].tolist() == [1 + number % 3 for number in range(complete)]
    assert 0 < sum(1 + number % 3 for number in range(complete)) <= 32


def test_no_observations_are_no_error(encoder):
    assert embed_observations(encoder, [], ["plain"]).values.shape == (0, encoder.features)

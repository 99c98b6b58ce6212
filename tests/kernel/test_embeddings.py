"""An observation's embedding is the mean over its photos and views, whatever the batches and the order."""

import itertools
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from kernel.budget import Budget
from kernel.embeddings import Embeddings, Limits, embed_observations
from kernel.encoders import open_encoder
from kernel.forward import Encoder
from kernel.loader import PhotoLoader
from kernel.manifest import read_weights
from kernel.observations import Observation
from kernel.photos import DRAFT, decode
from kernel.views import ALL_VIEWS, CROP, VIEWS
from local.drawing.fungi import draw, traits
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


def pixels_of(encoder, path):
    return torch.from_numpy(decode(path, encoder.preprocessing).copy()).permute(2, 0, 1)[None]


def by_hand(encoder, path, views=("plain",)):
    return encoder.embed(pixels_of(encoder, path), [ALL_VIEWS[view] for view in views])[0].mean(dim=0)


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


def test_without_pooling_every_view_has_a_row_and_those_without_a_photo_are_zero(encoder, observations, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    shown = [
        Observation("a", observations[0].photos[:1]),
        Observation("broken", (tmp_path / "broken.jpg",)),
        Observation("none", ()),
        Observation("b", observations[1].photos[:1]),
    ]
    views = ["plain", "hflip", "tile-2-0-1"]
    found = embed_observations(encoder, shown, views, pooling="none")
    assert found.has_embedding.tolist() == [True] * 3 + [False] * 6 + [True] * 3
    assert not found.values[3:9].any()
    rows = found.values.view(4, 3, -1)
    for index in (0, 3):
        for column, view in enumerate(views):
            assert torch.allclose(rows[index, column], by_hand(encoder, shown[index].photos[0], [view]), atol=1e-5)


def test_an_embedding_is_the_mean_over_the_views(encoder, observations):
    path = observations[0].photos[0]
    each = [by_hand(encoder, path, [view]) for view in VIEWS]
    assert torch.allclose(by_hand(encoder, path, list(VIEWS)), torch.stack(each).mean(dim=0), atol=1e-6)
    flipped = encoder.embed(pixels_of(encoder, path).flip(-1), [VIEWS["plain"]])[0, 0]
    assert torch.allclose(by_hand(encoder, path, ["hflip"]), flipped, atol=1e-5)


def test_the_larger_view_sees_the_photo_decoded_larger_and_the_others_see_it_at_the_encoders_size(encoder, tmp_path):
    def encoder_with(**sizes: int) -> Encoder:
        preprocessing = replace(encoder.preprocessing, **sizes)
        return Encoder(encoder.module, preprocessing, encoder.features, [encoder.device])

    path = photo(tmp_path / "a.jpg", size=(400, 300))
    both, at_96 = encoder_with(larger_size=96), encoder_with(size=96)
    assert torch.allclose(by_hand(both, path, ["larger"]), by_hand(at_96, path), atol=1e-6)
    for view in ("plain", "rotate90"):
        assert by_hand(both, path, [view]) @ by_hand(encoder, path, [view]) > 0.999
    found = embed_observations(both, [Observation("a", (path,))], ["plain", "larger"]).values[0]
    mean = by_hand(both, path) + by_hand(at_96, path)
    assert torch.allclose(found, mean / mean.norm(), atol=1e-6)


def test_a_crop_has_the_detail_of_the_photo_and_the_other_views_stay_as_they_are(encoder, tmp_path):
    preprocessing = replace(encoder.preprocessing, cropped_size=round(64 / CROP))
    detailed = Encoder(encoder.module, preprocessing, encoder.features, [encoder.device])
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(98, 98, 3), dtype=np.uint8))
    noise.resize((400, 400), Image.Resampling.BILINEAR).save(path := tmp_path / "a.png")
    with Image.open(path) as whole:
        whole.resize((98, 98), Image.Resampling.BILINEAR).crop((0, 0, 64, 64)).save(tmp_path / "cut.png")
    assert by_hand(detailed, path, ["top-left"]) @ by_hand(encoder, tmp_path / "cut.png") > 0.999
    assert by_hand(encoder, path, ["top-left"]) @ by_hand(encoder, tmp_path / "cut.png") < 0.998
    for view in ("plain", "rotate90"):
        assert by_hand(detailed, path, [view]) @ by_hand(encoder, path, [view]) > 0.999


def test_photos_decoded_small_embed_as_if_they_had_been_decoded_whole(trained, tmp_path, monkeypatch):
    weights = read_weights(trained)
    spec = weights.manifest.members[0].encoders[0]
    encoder = open_encoder(weights.file(spec.file), spec, [torch.device("cpu")])
    paths = []
    for seed, size in enumerate([(400, 300), (640, 480), (750, 500), (1600, 1200), (2000, 3000), (3000, 2000)]):
        paths.append(tmp_path / f"{size[0]}.jpg")
        draw(traits("Russulaceae", "Russula", str(seed)), seed, seed, size).save(paths[-1], quality=88)

    def embed(draft: float) -> torch.Tensor:
        monkeypatch.setattr("kernel.photos.DRAFT", draft)
        return torch.stack([by_hand(encoder, path) for path in paths])

    def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(one, other)

    exact, small, too_small = embed(1000.0), embed(DRAFT), embed(0.5)
    assert 0 < distances(small, exact).max() < 0.002
    # An encoder that has learnt little finds all photos alike: their own distances say how much another one means.
    apart = distances(exact, exact.roll(1, dims=0)).mean()
    assert distances(small, exact).max() < 0.002 * apart < distances(too_small, exact).max()


def test_the_order_of_the_table_does_not_change_an_observation(encoder, observations):
    forward = embed_observations(encoder, observations, ["plain", "hflip"]).values
    backward = embed_observations(encoder, observations[::-1], ["plain", "hflip"]).values
    assert torch.allclose(forward, backward.flip(0), atol=1e-5)


def test_an_observation_with_an_unreadable_photo_is_embedded_by_its_other_photos(encoder, observations, tmp_path):
    missing = tmp_path / "missing.jpg"
    mixed = Observation("mixed", (*observations[1].photos, missing))
    found = embed_observations(encoder, [mixed, Observation("none", (missing,))], ["plain"])
    expected = embed_observations(encoder, [observations[1]], ["plain"])
    assert torch.allclose(found.values[0], expected.values[0], atol=1e-6)
    assert found.has_embedding.tolist() == [True, False]
    assert found.values[1].abs().sum() == 0
    assert found.failures == {"FileNotFoundError": 2}


@dataclass
class Result:
    """What `Machine.submit` returns: complete from the start."""

    embedded: torch.Tensor
    seconds: float

    def result(self) -> torch.Tensor:
        return self.embedded


class Machine:
    """An encoder with a clock that only its work moves: every view of a photo takes so many seconds."""

    def __init__(self, encoder: Encoder, seconds: float, slower: tuple[int, float] = (10**9, 1.0)):
        self.now, self.seconds, self.calls, self.slower, self.inner = 0.0, seconds, 0, slower, encoder
        self.device, self.batch_size, self.features = encoder.device, 4, encoder.features  # many batches
        self.preprocessing, self.shares_cores = encoder.preprocessing, True

    def submit(self, photos, views):
        self.calls += 1
        factor = self.slower[1] if self.calls > self.slower[0] else 1.0
        seconds = len(photos) * len(views) * self.seconds * factor
        self.now += seconds
        return Result(self.inner.embed(photos, views), seconds)

    def embed(self, photos, views):
        return self.submit(photos, views).result()

    def cancel(self):
        """Nothing is being embedded."""

    def budget(self, limit: float) -> Budget:
        return Budget(limit, 0.0, lambda: self.now)


FOUR = ["plain", "hflip", "rotate90", "rotate270"]
PHOTOS = 79  # of the 40 observations


def test_with_time_enough_every_photo_gets_every_view(encoder, observations, capsys):
    machine = Machine(encoder, 1.0)
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(10_000)), name="tiny")
    assert found.views == {4: PHOTOS}
    assert torch.allclose(found.values, embed_observations(encoder, observations, FOUR).values, atol=1e-6)
    assert "tiny: 4 of 4 views of 79 photos, about 316 s" in capsys.readouterr().out


class Gpu(Machine):
    """A device that works beside the program: a batch is ready once the result of it is waited for.

    Attributes:
        log: "submitted" and "waited for", with the number of the batch.
    """

    def __init__(self, encoder: Encoder, seconds: float):
        super().__init__(encoder, seconds)
        self.shares_cores, self.log = False, []

    def submit(self, photos, views):
        number = len([event for event, _ in self.log if event == "submitted"])
        self.log.append(("submitted", number))
        done, log = super().submit(photos, views), self.log

        class Running(Result):
            def result(self) -> torch.Tensor:
                log.append(("waited for", number))
                return self.embedded

        return Running(done.embedded, done.seconds)


def test_beside_a_gpu_the_next_batch_is_queued_before_the_result_of_one_is_waited_for(encoder, observations):
    gpu = Gpu(encoder, 1.0)
    found = embed_observations(gpu, observations, FOUR)
    assert torch.allclose(found.values, embed_observations(encoder, observations, FOUR).values, atol=1e-6)
    last = (PHOTOS - 1) // 4  # number of the last batch
    expected = [("submitted", 0)]
    for number in range(1, last + 1):
        expected += [("submitted", number), ("waited for", number - 1)]
    assert gpu.log == [*expected, ("waited for", last)]


def test_beside_a_gpu_the_budget_is_kept_too(encoder, observations):
    gpu = Gpu(encoder, 1.0)
    found = embed_observations(gpu, observations, FOUR, limits=Limits(gpu.budget(3 * PHOTOS)))
    assert set(found.views) <= {2, 3}
    assert (found.late, found.views.total()) == (0, PHOTOS)
    assert gpu.now <= 0.9 * 3 * PHOTOS
    short = Gpu(encoder, 1.0)
    found = embed_observations(short, observations, FOUR, limits=Limits(short.budget(0.7 * PHOTOS)))
    assert found.late > 0
    assert short.now <= 0.7 * PHOTOS


def test_a_limit_too_short_for_all_views_gives_every_photo_fewer(encoder, observations):
    machine = Machine(encoder, 1.0)
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(3 * PHOTOS)))
    assert set(found.views) == {2, 3}  # 2.7 after the reserve
    assert (found.late, found.views.total()) == (0, PHOTOS)
    assert torch.allclose(found.values[0], embed_observations(encoder, observations[:1], FOUR[:2]).values[0], atol=1e-6)
    assert 0.78 * 3 * PHOTOS < machine.now <= 0.9 * 3 * PHOTOS


def test_when_the_machine_slows_down_the_photos_to_come_get_fewer_views(encoder, observations):
    machine = Machine(encoder, 1.0, slower=(4, 3.0))
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(6 * PHOTOS)))
    assert found.late == 0
    assert found.has_embedding.all()
    assert found.views[4] > 0
    assert sum(count for views, count in found.views.items() if views < 4) > 0
    assert machine.now <= 6 * PHOTOS


def test_when_the_machine_speeds_up_the_photos_to_come_get_more_views(encoder, observations):
    machine = Machine(encoder, 4.0, slower=(3, 0.25))
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(6 * PHOTOS)))
    assert found.late == 0
    assert found.views[1] > 0
    assert found.views[4] > PHOTOS / 2
    assert machine.now <= 6 * PHOTOS


def test_last_batches_that_take_twice_as_long_are_still_embedded_in_time(encoder, observations):
    machine = Machine(encoder, 1.0, slower=(19, 2.0))  # two calls to measure, a batch of 8, and 18 of 4
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(3 * PHOTOS)))
    assert found.late == 0
    assert machine.now <= 0.9 * 3 * PHOTOS


def test_without_time_for_one_view_of_all_photos_the_last_observations_are_left_out(encoder, observations):
    machine = Machine(encoder, 1.0)
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(0.7 * PHOTOS)))
    complete = found.has_embedding.tolist().index(False)
    assert complete > 0
    assert not any(found.has_embedding[complete:])
    assert found.late == len(observations) - complete
    assert found.photos[:complete].tolist() == [1 + number % 3 for number in range(complete)]
    assert machine.now <= 0.7 * PHOTOS


def test_an_error_of_the_encoder_costs_only_what_is_not_embedded_yet(encoder, observations, capsys):
    class Breaking(Machine):
        def submit(self, photos, views):
            if self.calls == 9:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return super().submit(photos, views)

    found = embed_observations(Breaking(encoder, 1.0), observations, FOUR, limits=Limits(tolerates_errors=True))
    complete = found.has_embedding.tolist().index(False)
    assert complete > 10
    assert found.late == len(observations) - complete
    assert not any(found.has_embedding[complete:])
    assert torch.allclose(found.values[:complete], embed_observations(encoder, observations[:complete], FOUR).values)
    assert "unspecified launch failure" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        embed_observations(Breaking(encoder, 1.0), observations, FOUR)


def count_complete(found: Embeddings, whole: Embeddings) -> int:
    """The observations before an error, which have the embeddings of `whole`; those after it have none."""
    complete = found.has_embedding.tolist().index(False)
    assert found.late == len(found.has_embedding) - complete
    assert not found.has_embedding[complete:].any()
    assert torch.allclose(found.values[:complete], whole.values[:complete], atol=1e-6)
    return complete


def test_an_error_in_a_batch_costs_the_batches_after_it_too(encoder, observations, monkeypatch, capsys):
    """The next batch is embedded already, but observations of which a photo is missing are not complete."""
    whole, normalise, turns = embed_observations(encoder, observations, ["plain"]), Encoder.normalise, itertools.count()

    def fail_once(*arguments):
        if next(turns) == 5:
            raise RuntimeError("no such operator")
        return normalise(*arguments)

    monkeypatch.setattr(Encoder, "normalise", fail_once)
    found = embed_observations(encoder, observations, ["plain"], limits=Limits(tolerates_errors=True))
    assert 0 < count_complete(found, whole) < len(observations) - 5
    assert "no such operator" in capsys.readouterr().err


def test_an_error_while_loading_photos_costs_only_what_is_not_embedded_yet(encoder, observations, monkeypatch, capsys):
    whole, batches, take = embed_observations(encoder, observations, ["plain"]), [], PhotoLoader.take

    def fail_at_every_fourth(*arguments, **options):
        batches.append(arguments)
        if len(batches) % 4 == 0:
            raise MemoryError("no memory to pin")
        return take(*arguments, **options)

    monkeypatch.setattr(PhotoLoader, "take", fail_at_every_fourth)
    found = embed_observations(encoder, observations, ["plain"], limits=Limits(tolerates_errors=True))
    assert 10 < count_complete(found, whole) < len(observations) - 10
    assert "no memory to pin" in capsys.readouterr().err
    with pytest.raises(MemoryError, match="no memory to pin"):
        embed_observations(encoder, observations, ["plain"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe stands for a photo on a disk that hangs")
def test_a_photo_that_hangs_costs_the_remaining_time_and_no_embedding(encoder, observations, tmp_path):
    os.mkfifo(tmp_path / "hangs.jpg")
    hanging = Observation("hangs", (tmp_path / "hangs.jpg",))
    budget = Budget(2.0, 0.0, lambda: 0.0)  # a batch may take 1.8 s, as long as it lasts
    rows = [*observations[:20], hanging, *observations[20:]]
    found = embed_observations(encoder, rows, ["plain"], limits=Limits(budget))
    complete = found.has_embedding.tolist().index(False)
    assert 0 < complete <= 20
    assert found.late == 41 - complete
    whole = embed_observations(encoder, observations, ["plain"])
    assert torch.allclose(found.values[:complete], whole.values[:complete], atol=1e-6)


def test_without_any_time_nothing_is_embedded(encoder, observations):
    machine = Machine(encoder, 1.0)
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(0)))
    assert (machine.calls, found.late, found.has_embedding.any().item()) == (0, len(observations), False)


def test_an_optional_encoder_without_time_for_one_view_stops_at_once(encoder, observations):
    machine = Machine(encoder, 1.0)
    budget = machine.budget(0.7 * PHOTOS)
    found = embed_observations(machine, observations, FOUR, limits=Limits(budget, is_optional=True))
    assert found.late == len(observations)
    assert not found.has_embedding.any()
    assert machine.calls == 2  # to measure one view, and nothing else


def test_views_are_planned_within_the_encoders_fraction_of_the_time(encoder, observations):
    machine = Machine(encoder, 1.0)
    found = embed_observations(machine, observations, FOUR, limits=Limits(machine.budget(5 * PHOTOS), fraction=0.5))
    assert set(found.views) == {1, 2}
    assert machine.now <= 0.5 * 0.9 * 5 * PHOTOS


def test_no_observations_are_no_error(encoder):
    assert embed_observations(encoder, [], ["plain"]).values.shape == (0, encoder.features)

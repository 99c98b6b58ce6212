"""The benchmark measures other pipelines too, and leaves out those that are not installed."""

import sys
from dataclasses import replace

import pytest
import torch

from kernel.forward import Encoder
from local.benchmarks.speed import (
    pybioclip_embedding,
    speed_row,
    table_row,
    ways_on_gpus,
    ways_to_decode,
    ways_to_embed,
)
from tests.conftest import photo


@pytest.fixture
def at_224(encoder) -> Encoder:
    return Encoder(encoder.module, replace(encoder.preprocessing, size=224), encoder.features, encoder.devices)


def test_without_pybioclip_its_cell_is_empty(at_224, monkeypatch):
    monkeypatch.setitem(sys.modules, "bioclip", None)
    assert pybioclip_embedding(at_224) is None


def test_the_limit_is_what_the_fastest_parts_allow_on_shared_cores_or_beside_a_gpu():
    rates = {"decode, 1 threads": 60.0, "decode, 2 processes": 100.0, "forward, batches of 8": 50.0}
    rates |= {"end_to_end": 25.0, "all_views": 4.0, "plain_pipeline": 5.0, "one_by_one": 10.0}
    row = speed_row([rates], 1, "end_to_end", on_cpu=True)
    assert row["share_of_limit"] == pytest.approx(25 / (1 / (1 / 100 + 1 / 50)))
    assert row["fastest"] == {"decode": "2 processes", "forward": "batches of 8"}
    assert table_row(row | {"photos": "300p"}) == "| 300p | 100.0 | 50.0 | 25.0 | 0.75 | 5.0 (5.0×) | 10.0 (2.5×) |  |"
    assert speed_row([rates], 1, "end_to_end", on_cpu=False)["share_of_limit"] == pytest.approx(25 / 50)
    views = speed_row([rates], 10, "all_views", on_cpu=False)
    assert (views["share_of_limit"], views["plain_pipeline"]) == (pytest.approx(4 / 5), None)


def test_a_machine_that_becomes_slower_does_not_change_the_share_of_the_limit():
    rates = {"decode, 1 threads": 100.0, "forward, batches of 8": 50.0, "end_to_end": 25.0}
    rounds = [{name: rate / slower for name, rate in rates.items()} for slower in (1, 1, 1, 2, 4)]
    row = speed_row(rounds, 1, "end_to_end", on_cpu=True)
    assert (row["share_of_limit"], row["end_to_end"]) == (pytest.approx(0.75), 25)
    disturbed = [*rounds[:4], rounds[4] | {"end_to_end": 1.0}]
    assert speed_row(disturbed, 1, "end_to_end", on_cpu=True)["share_of_limit"] == pytest.approx(0.75)


def test_of_ways_that_are_equally_fast_the_luckiest_of_each_round_is_no_limit():
    lucky = [(52.0, 48.0), (48.0, 52.0), (50.0, 50.0), (50.0, 49.0), (49.0, 51.0)]
    rounds = [
        {"decode, 1 threads": 1e9, "forward, batches of 4": one, "forward, batches of 8": two, "end_to_end": 45.0}
        for one, two in lucky
    ]
    assert speed_row(rounds, 1, "end_to_end", on_cpu=True)["share_of_limit"] == pytest.approx(45 / 50)


def test_every_way_to_decode_gives_the_same_photos_and_every_way_to_embed_runs(at_224, tmp_path, monkeypatch):
    monkeypatch.setattr("local.benchmarks.speed.CPU_PHOTOS", 32)
    paths = [photo(tmp_path / f"{seed}.jpg", seed) for seed in range(20)]
    for name, work in ways_to_decode(paths, at_224.preprocessing).items():
        photos = work.run()
        stacked = torch.cat(photos) if "processes" in name else torch.stack([torch.from_numpy(one) for one in photos])
        assert (work.photos, stacked.shape) == (20, (20, 224, 224, 3)), name
    for work in ways_to_embed(at_224).values():
        work.run()


def test_the_forward_passes_of_several_gpus_count_together(encoder, monkeypatch):
    monkeypatch.setattr("local.benchmarks.speed.GPU_PHOTOS", 300)
    monkeypatch.setattr("local.benchmarks.speed.gpu_batch_size", lambda _: 100)
    devices, passed = [torch.device("cpu"), torch.device("cpu", 0)], []

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels):
            passed.append(len(pixels))

    ways = ways_on_gpus(Encoder(Counting(), encoder.preprocessing, 1, devices))
    assert {name: work.photos for name, work in ways.items()} == {
        "forward, batches of 50": 600,
        "forward, batches of 100": 600,
        "forward, batches of 200": 800,
    }
    ways["forward, batches of 200"].run()
    assert passed == [200] * 4


def test_pybioclips_code_embeds_every_photo_offline(at_224, tmp_path):
    pytest.importorskip("bioclip.predict")
    seen = []
    hook = at_224.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    embedding = pybioclip_embedding(at_224)
    hook.remove()  # the copy that pybioclip runs keeps it
    embedding([photo(tmp_path / f"{seed}.jpg", seed) for seed in range(12)])
    assert seen == [torch.Size((10, 3, 224, 224)), torch.Size((2, 3, 224, 224))]

"""The benchmark measures other pipelines too, and leaves out those that are not installed."""

import sys
from dataclasses import replace

import pytest
import torch

from kernel.encoders import Encoder
from local.benchmarks.speed import pybioclip_embedding, table_row
from tests.conftest import photo


@pytest.fixture
def at_224(encoder) -> Encoder:
    return Encoder(encoder.module, replace(encoder.preprocessing, size=224), encoder.features, encoder.devices)


def test_without_pybioclip_its_cell_says_not_here(at_224, monkeypatch):
    monkeypatch.setitem(sys.modules, "bioclip", None)
    assert pybioclip_embedding(at_224) is None
    names = ("decode", "forward", "end_to_end", "share_of_limit", "plain_pipeline", "one_by_one")
    row = table_row({"photos": "300p", "pybioclip": None, "views_against_forwards": 1.0, **dict.fromkeys(names, 2.0)})
    assert row == "| 300p | 2.0 | 2.0 | 2.0 | 2.00 | 2.0 (1.0×) | 2.0 (1.0×) | not here | 1.00 |"


def test_pybioclips_code_embeds_every_photo_offline(at_224, tmp_path):
    pytest.importorskip("bioclip.predict")
    seen = []
    hook = at_224.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    embedding = pybioclip_embedding(at_224)
    hook.remove()  # the copy that pybioclip runs keeps it
    embedding([photo(tmp_path / f"{seed}.jpg", seed) for seed in range(12)])
    assert seen == [torch.Size((10, 3, 224, 224)), torch.Size((2, 3, 224, 224))]

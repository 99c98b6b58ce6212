"""What embedding costs is said before it starts, and how long it takes as soon as that is known."""

import pytest
import torch

from kernel.observations import Observation
from local.data.cache import EmbeddingCache
from local.data.cost import Cost, in_words
from tests.conftest import photo


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def cost(encoder, seconds, photos=1000, views=("plain", "hflip"), rounds=1, device="cpu"):
    """The cost of an encoder that takes some seconds for one view of one photo, and its clock."""
    clock = Clock()

    class Slow(type(encoder)):
        def forward(self, pixels, module):
            clock.now += seconds * len(pixels)

    slow = Slow(encoder.module, encoder.preprocessing, encoder.features, encoder.devices)
    slow.device = torch.device(device)
    return Cost(photos, views, slow, rounds, clock), clock


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (1, "1 second"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "2 hours"),
        (35 * 3600, "35 hours"),
        (36 * 3600, "2 days"),
        (60 * 86400, "60 days"),
    ],
)
def test_a_time_is_in_the_unit_that_fits(seconds, words):
    assert in_words(seconds) == words


def test_the_time_is_estimated_from_the_batches_after_the_first(encoder, capsys):
    measured, clock = cost(encoder, 0.01)
    measured.start()
    for seconds in (1, 2, 2):
        clock.now += seconds
        measured.advance(10)
    assert capsys.readouterr().out.splitlines() == [
        "to embed: 1,000 photos in 2 views of 64 pixels: 2,000 forward passes on cpu",
        "embedding takes about 3 minutes on cpu",  # 0.2 s each
    ]


def test_where_a_batch_takes_minutes_on_a_cpu_one_photo_is_timed_before_it(encoder, capsys):
    views = ("plain", "hflip", "rotate90", "rotate270")
    measured, clock = cost(encoder, 2.5, 10_000, views, rounds=2)
    measured.start()
    assert capsys.readouterr().out.splitlines() == [
        "to embed: 10,000 photos in 4 views of 64 pixels, in 2 resize modes: 80,000 forward passes on cpu",
        "embedding takes about 2 days on cpu: faster are a GPU, a smaller encoder (such as --encoder "
        "timm:mobilenetv2_100) or fewer views (--set views=plain,hflip)",
    ]
    clock.now += 80
    measured.advance(8)
    assert capsys.readouterr().out == ""


def test_a_gpu_is_timed_by_its_batches_and_gets_no_advice(encoder, capsys):
    measured, clock = cost(encoder, 100, 100_000, device="cuda")
    measured.start()
    clock.now += 60  # while CUDA starts
    measured.advance(10)
    clock.now += 10
    measured.advance(10)
    assert capsys.readouterr().out.splitlines()[1:] == ["embedding takes about 28 hours on cuda"]


def test_fewer_views_are_advised_only_where_there_are_many(encoder):
    assert (
        cost(encoder, 0)[0]
        .describe(60)
        .endswith("faster are a GPU or a smaller encoder (such as --encoder timm:mobilenetv2_100)")
    )


def test_what_is_cached_costs_nothing_and_is_not_mentioned(encoder, tmp_path, capsys):
    paths = tuple(photo(tmp_path / f"{number}.jpg", number) for number in range(12))
    for count, said in ((5, "5 photos"), (12, "7 photos"), (12, None)):
        EmbeddingCache(tmp_path / "cache", encoder).embed([Observation("a", paths[:count])], ("plain",))
        line = (
            f"to embed: {said} in 1 view of 64 pixels: {said.partition(' ')[0]} forward passes on cpu" if said else ""
        )
        assert [text for text in capsys.readouterr().out.splitlines() if text.startswith("to embed")] == [line] * bool(
            said
        )

"""The benchmark of scale goes the whole way from the cache to a submission."""

import numpy as np
import pytest

from kernel.inputs import InputError
from kernel.loader import shared_array
from local.benchmark import check_sizes
from local.benchmarks.scale import DrawnEmbeddings, Memory, describe_growth, draw_labels, scale


def test_every_step_of_every_size_has_its_time_and_memory(capsys):
    rows = scale([150, 300], classes=100, features=16)["rows"]
    assert [row["photos"] for row in rows] == [150] * (len(rows) // 2) + [300] * (len(rows) // 2)
    assert len({row["step"] for row in rows}) == len(rows) // 2
    assert set(rows[0]) == {"photos", "classes", "step", "seconds", "cpu_seconds", "peak_gb"}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)
    assert "2.0 times the photos (300)" in capsys.readouterr().out


def test_every_class_has_a_photo_and_the_first_ones_have_most():
    sizes = np.bincount(draw_labels(5000, 200, np.random.default_rng(0)))
    assert (len(sizes), sizes.sum(), sizes.min() >= 1) == (200, 5000, True)
    assert sizes[:5].sum() > 20 * sizes[-5:].sum()


def test_photos_of_a_class_resemble_each_other():
    labels = np.repeat(np.arange(50), 2)
    [(_, values)] = DrawnEmbeddings(labels, 50, 256).parts()
    correlations = np.corrcoef(values - values.mean(axis=0))
    same = (labels[:, None] == labels) & ~np.eye(100, dtype=bool)
    assert correlations[same].mean() > correlations[~same & ~np.eye(100, dtype=bool)].mean() + 0.05


def test_memory_counts_an_array_that_is_filled():
    before = Memory.now()
    array = shared_array((30_000_000,), np.float64)  # new pages: an ordinary array may get memory that was freed before
    array[:] = 1
    assert Memory.now() - before > 0.15
    assert len(array)


def test_growth_is_told_for_each_step():
    rows = [{"photos": photos, "step": "fit", "cpu_seconds": seconds} for photos, seconds in ((100, 2.0), (400, 7.0))]
    assert describe_growth(rows) == ["4.0 times the photos (400), times the seconds of CPU: fit 3.5"]


def test_fewer_photos_than_classes_are_refused():
    with pytest.raises(InputError, match="fewer than one of each"):
        check_sizes([200, 50], 100)

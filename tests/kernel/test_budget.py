"""The budget: what a photo costs is measured, and decides how many views the other photos get."""

import pytest

from kernel.budget import MARGIN, Budget, Pace


def pace(shares_cores: bool, *batches: tuple[int, int, float, float]) -> Pace:
    """The pace after some batches: photos, views, seconds that they were waited for, seconds of the forward passes."""
    result = Pace(shares_cores)
    for photos, views, waited, forward in batches:
        result.record_decode(photos, waited, waited + forward)
        result.record_forward(photos, views, forward)
    return result


def test_a_tenth_of_the_limit_is_kept_in_reserve():
    budget = Budget(100, 7, lambda: 30)
    assert budget.elapsed() == 23
    assert budget.remaining() == pytest.approx(100 * (1 - MARGIN) - 23)


def test_on_a_cpu_decode_and_views_add_up():
    measured = pace(True, (10, 1, 2.0, 3.0))  # .2 s to decode a photo, .3 s for a view of it
    assert measured.seconds(100, 1) == pytest.approx(50)
    assert measured.seconds(100, 4) == pytest.approx(140)


def test_on_a_cpu_the_sum_is_scaled_to_the_time_from_one_batch_to_the_next():
    """Beside each other, decoding and the forward passes each take longer than alone."""
    measured = pace(True, *[(10, 4, 2.0, 12.0)] * 30)
    assert measured.seconds(100, 4) == pytest.approx(140)
    for _ in range(30):
        measured.record_interval(10, 4, 12.5)
    assert measured.seconds(100, 4) == pytest.approx(125, rel=1e-3)
    assert measured.seconds(100, 1) == pytest.approx(125 * 5 / 14, rel=1e-3)


def test_beside_a_gpu_the_longer_of_decode_and_views_counts():
    measured = pace(False, (10, 1, 1.0, 1.0))  # .2 s for a photo, of which the forward passes hid half
    assert measured.seconds(100, 1) == pytest.approx(20)
    assert measured.seconds(100, 4) == pytest.approx(40)


def test_beside_a_gpu_waiting_shows_how_slow_decoding_is():
    measured = pace(False, (10, 1, 1.0, 1.0), *[(10, 2, 3.0, 2.0)] * 30)  # .5 s a photo, .2 s of it hidden
    assert measured.seconds(100, 1) == pytest.approx(50, rel=0.01)


def test_beside_a_gpu_no_waiting_shows_that_decoding_is_no_slower_than_the_views():
    measured = pace(False, (10, 1, 9.0, 1.0), *[(10, 2, 0.0, 2.0)] * 30)
    assert measured.seconds(100, 1) == pytest.approx(20, rel=0.01)


def test_as_many_views_are_affordable_as_fit_and_at_least_one():
    measured = pace(True, (10, 1, 1.0, 1.0))  # .1 s and .1 s
    assert measured.affordable_views(100, 11, 1000) == 11
    assert measured.affordable_views(100, 11, 60) == 5
    assert measured.affordable_views(100, 11, 59) == 4
    assert measured.affordable_views(100, 11, 0) == 1


def test_a_slower_machine_shows_within_a_few_batches():
    measured = pace(True, *[(10, 2, 1.0, 2.0)] * 20)
    assert measured.seconds(100, 2) == pytest.approx(30)
    for _ in range(5):
        measured.record_decode(10, 4.0, 12.0)
        measured.record_forward(10, 2, 8.0)
    assert measured.seconds(100, 2) > 100

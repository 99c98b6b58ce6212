"""The submission is whole or absent, and what the grader would refuse is caught before it."""

import os

import pytest

from kernel.competitions import competition_named
from kernel.inputs import InputError
from kernel.observations import Observation, TestTable, find_test_table
from kernel.submission import check_submission, fallback_answer, write_submission
from tests import layouts
from tests.manifests import manifest

CLASSES = [str(number) for number in range(20)]


def answer(*class_ids: str) -> dict[str, float]:
    """Class ids of equal probability."""
    return dict.fromkeys(class_ids, 1 / len(class_ids))


TEN = answer(*CLASSES[:10])
REVERSED = answer(*CLASSES[9::-1])


@pytest.fixture
def table(tmp_path):
    return TestTable(tmp_path, competition_named("fungiclef"), [Observation("9", ()), Observation("4", ())])


def test_what_is_written_passes_the_check(tmp_path, table):
    write_submission(tmp_path / "submission.csv", table, [TEN, REVERSED])
    check_submission(tmp_path / "submission.csv", table, CLASSES)
    assert (tmp_path / "submission.csv").read_text() == (
        "observationId,predictions\n9,0 1 2 3 4 5 6 7 8 9\n4,9 8 7 6 5 4 3 2 1 0\n"
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("observationID,predictions\n9,0 1 2 3 4 5 6 7 8 9\n4,0 1 2 3 4 5 6 7 8 9\n", "header"),
        ("observationId,predictions\n4,0 1 2 3 4 5 6 7 8 9\n9,0 1 2 3 4 5 6 7 8 9\n", "in order"),
        ("observationId,predictions\n9,0 1 2 3 4 5 6 7 8 9\n", "1 rows"),
        ("observationId,predictions\n9,0 1 2 3 4 5 6 7 8 8\n4,0 1 2 3 4 5 6 7 8 9\n", "observation 9"),
        ("observationId,predictions\n9,0 1 2 3 4 5 6 7 8 9\n4,0 1 2 3 4 5 6 7 8\n", "observation 4"),
        ("observationId,predictions\n9,0 1 2 3 4 5 6 7 8 9\n4,0 1 2 3 4 5 6 7 8 77\n", "observation 4"),
        ("observationId,predictions\n9,0 1 2 3 4 5 6 7 8 9\n4,\n", "observation 4"),
        ("", "not a CSV of 2 columns"),
        ("<html>Something went wrong</html>", "not a CSV of 2 columns"),
        ("observationId,predictions\n9\n", "not a CSV of 2 columns"),
        ("observationId,predictions\n9,\0\n", "observation"),
    ],
)
def test_what_the_grader_would_refuse_is_named(tmp_path, table, content, complaint):
    (tmp_path / "submission.csv").write_text(content)
    with pytest.raises(InputError, match=complaint):
        check_submission(tmp_path / "submission.csv", table, CLASSES)


def test_a_write_that_fails_leaves_the_earlier_submission(tmp_path, table):
    write_submission(tmp_path / "submission.csv", table, [TEN, TEN])
    before = (tmp_path / "submission.csv").read_bytes()
    with pytest.raises(ValueError):  # one row too few
        write_submission(tmp_path / "submission.csv", table, [TEN])
    assert (tmp_path / "submission.csv").read_bytes() == before


def test_what_the_grader_would_refuse_does_not_replace_the_earlier_submission(tmp_path, table):
    write_submission(tmp_path / "submission.csv", table, [TEN, TEN], CLASSES)
    before = (tmp_path / "submission.csv").read_bytes()
    with pytest.raises(InputError, match="observation 4"):
        write_submission(tmp_path / "submission.csv", table, [TEN, answer(*CLASSES[:9], "77")], CLASSES)
    assert (tmp_path / "submission.csv").read_bytes() == before


def test_with_fewer_than_ten_classes_all_of_them_are_guessed(tmp_path, table):
    write_submission(tmp_path / "submission.csv", table, [answer("a", "b"), answer("b", "a")])
    check_submission(tmp_path / "submission.csv", table, ["a", "b"])


def test_the_fallback_is_the_commonest_classes_and_without_weights_the_sample_submission(tmp_path, table):
    assert list(fallback_answer(table, manifest(fallback_classes=CLASSES[5:]))) == CLASSES[5:15]
    with pytest.raises(InputError, match="sample submission"):
        fallback_answer(table)
    (tmp_path / "FungiCLEF25-SAMPLE_SUBMISSION.csv").write_text("observationId,predictions\n9,1 2 3\n")
    assert list(fallback_answer(table)) == ["1", "2", "3"]


def test_a_photo_whose_name_is_not_utf_8_has_a_row_in_a_file_that_is(tmp_path):
    layouts.class_folders(tmp_path)
    (tmp_path / "test" / "carrot 0.jpg").rename(tmp_path / "test" / os.fsdecode(b"\xe9t.jpg"))
    table = find_test_table(tmp_path)
    write_submission(tmp_path / "submission.csv", table, [answer("apple")] * len(table.observations), ["apple"])
    lines = (tmp_path / "submission.csv").read_text(encoding="utf-8").splitlines()
    assert r"\udce9t,apple" in lines
    assert all(path.is_file() for one in table.observations for path in one.photos)

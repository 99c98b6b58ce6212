"""A solution that does not say one class for an observation is refused, since a score would count it as wrong."""

import re

import pytest

from kernel.inputs import InputError
from local.data.solution import read_solution


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("a,7\nb,12\na,12\n", "has two classes for observation 'a', '7' and '12': keep the right row"),
        ("a,7\nb,\n", "has no class for observation 'b': fill it in"),
        ("a,7\nb,  \nb,12\n", "has no class for observation 'b': fill it in"),
    ],
)
def test_an_unclear_class_is_reported_with_its_observation(tmp_path, rows, says):
    solution = tmp_path / "solution.csv"
    solution.write_text(f"id,label\n{rows}")
    with pytest.raises(InputError, match=re.escape(f"{solution} {says}")):
        read_solution(solution, ["a", "b"], ["7", "12"])


def test_equal_rows_and_rows_of_other_observations_are_accepted(tmp_path):
    solution = tmp_path / "solution.csv"
    solution.write_text("id,label\na,7\nb,12\na,7.0\nother,\nother,7\n")
    truth = read_solution(solution, ["a", "b"], ["7", "12"])
    assert (truth["a"], truth["b"]) == ("7", "12")


def test_without_the_ids_the_columns_are_a_guess_and_nothing_is_refused(tmp_path):
    solution = tmp_path / "solution.csv"
    solution.write_text("usage,id,label\nPublic,a,7\nPublic,b,12\n")
    read_solution(solution)


@pytest.mark.parametrize(("content", "says"), [("", "it is empty"), ("id\na\n", "its header has 1 column")])
def test_a_file_without_two_columns_is_refused_in_clear_words(tmp_path, content, says):
    solution = tmp_path / "solution.csv"
    solution.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"no solution in {solution} ({says}")):
        read_solution(solution)

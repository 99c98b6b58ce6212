"""The commands, links and pictures in the documents: what a reader pastes must work."""

import ast
import re
import shlex
from itertools import pairwise

import pytest

from local.recipes.recipe import read_recipe
from tests.conftest import ROOT

DOCUMENTS = ("README.md", "local/recipes/README.md", "local/benchmarks/RESULTS.md")
MOST_LINES = 150  # of the front page


def commands(document: str) -> list[list[str]]:
    """The words of every command of this repository in a document's code blocks, the script first, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]
    parts = [part for line in lines for part in split_at(line, "&&")]
    return [part[1:] for part in parts if part[:1] == ["python"]]


def split_at(words: list[str], separator: str) -> list[list[str]]:
    """The parts of a list between its separators."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def values(command: list[str], flag: str) -> list[str]:
    """What follows a flag, at each of its occurrences."""
    return [value for given, value in pairwise(command) if given == flag]


def test_the_readme_fits_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_there_and_knows_the_flags_that_it_is_given(document):
    found = commands(document)
    assert found
    for script, *words in found:
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert {word for word in words if word.startswith("--")} <= known, script


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_recipe_exists_and_takes_its_settings(document):
    for script, *words in commands(document):
        if script == "local/train.py":
            for recipe in values(words, "--recipe"):
                read_recipe(recipe, values(words, "--set"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_run_is_trained_before_it_is_used(document):
    trained = set()
    for script, *words in commands(document):
        if script == "local/train.py":
            trained.update(values(words, "--out") or [f"runs/{recipe}" for recipe in values(words, "--recipe")])
        used = {word for word in words if word.startswith("runs/")}
        assert used <= trained, f"{script} uses {used - trained}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_picture_of_a_document_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target


def test_every_heading_that_the_results_link_to_is_there():
    text = (ROOT / "local/benchmarks/RESULTS.md").read_text(encoding="utf-8")
    headings = {line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= headings

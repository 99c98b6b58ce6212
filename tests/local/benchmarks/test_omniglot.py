"""Episodes are asked of an alphabet that training never saw."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from local.benchmarks.omniglot import EPISODES, omniglot, play
from tests.conftest import command

QUICK = ["epochs=1", "encoder=timm:test_resnet", "image_size=32", "ways=5"]


@pytest.fixture
def alphabets(tmp_path):
    """Three alphabets of six characters of three strokes, each drawn by ten shaking hands."""
    rng = np.random.default_rng(0)
    for alphabet in "ABC":
        for character in range(6):
            strokes = rng.integers(10, 95, (3, 4))
            for hand in range(10):
                image = Image.new("1", (105, 105), 1)
                for stroke in strokes + rng.integers(-3, 4, strokes.shape):
                    ImageDraw.Draw(image).line(stroke.tolist(), fill=0, width=3)
                path = tmp_path / "small" / alphabet / f"character{character:02}" / f"{hand:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return tmp_path


def test_the_last_alphabet_is_asked_and_the_others_are_learnt(alphabets):
    report = omniglot(alphabets, QUICK)
    assert (report["learnt"], report["asked"]) == (["A", "B"], "C")
    assert [(row["ways"], row["shots"]) for row in report["tasks"]] == [(5, 1), (5, 5)]  # it has no twenty characters
    assert all(row["accuracy"] > 0.3 for row in report["tasks"])  # a fifth by chance
    assert report["tasks"][1]["accuracy"] > report["tasks"][0]["accuracy"]


def test_accuracy_is_what_it_should_be_where_the_answer_is_known():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(8), 10)
    assert play(np.eye(8)[classes], classes, 5, 1).mean() == 1
    chance = play(rng.standard_normal((80, 64)), classes, 5, 1)
    assert len(chance) == EPISODES
    assert chance.mean() == pytest.approx(0.2, abs=0.03)


def test_a_folder_without_alphabets_is_one_line(tmp_path):
    done = command("local/benchmark.py", "omniglot", "--data", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} holds 0 alphabets")

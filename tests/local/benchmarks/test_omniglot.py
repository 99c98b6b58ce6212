"""Episodes are drawn from an alphabet that training has not seen."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from local.benchmark import find_alphabets
from local.benchmarks.omniglot import EPISODES, omniglot, run_episodes
from tests.conftest import command

QUICK = ["epochs=1", "encoder=timm:test_resnet", "image_size=32", "ways=5"]


@pytest.fixture
def alphabets(tmp_path):
    """Three alphabets of six characters of three strokes, each drawn ten times with jitter."""
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


@pytest.mark.slow
def test_the_last_alphabet_is_held_out_and_the_others_are_trained_on(alphabets):
    report = omniglot(find_alphabets(alphabets), QUICK)
    assert (report["training"], report["held_out"]) == (["A", "B"], "C")
    assert [(row["ways"], row["shots"]) for row in report["tasks"]] == [(5, 1), (5, 5)]  # it has no twenty characters
    assert all(row["accuracy"] > 0.3 for row in report["tasks"])  # a fifth by chance
    assert report["tasks"][1]["accuracy"] > report["tasks"][0]["accuracy"]


def test_accuracy_is_what_it_should_be_where_the_answer_is_known():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(8), 10)
    assert run_episodes(np.eye(8)[classes], classes, 5, 1).mean() == 1
    chance = run_episodes(rng.standard_normal((80, 64)), classes, 5, 1)
    assert len(chance) == EPISODES
    assert chance.mean() == pytest.approx(0.2, abs=0.03)


def test_a_folder_without_alphabets_is_one_line(tmp_path):
    done = command("local/benchmark.py", "omniglot", "--data", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} holds 0 alphabets")

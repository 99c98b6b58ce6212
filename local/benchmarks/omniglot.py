"""Measure few-shot classification as in the literature: characters of an alphabet that training has not seen.

Called by local/benchmark.py. Training is from scratch in episodes, on all alphabets but the last.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from kernel.observations import Observation
from local.banks.estimators import l2_normalize
from local.base.console import counted, progress, say
from local.base.run_folder import CACHE
from local.data.concatenated_encoders import embed_with_run
from local.recipes.recipe import read_recipe
from local.training.run import train_run

ROTATIONS = (0, 90, 180, 270)  # degrees; a rotated character is another class (Snell et al. 2017)
QUERIES = 5  # of each class of an episode
EPISODES = 1000
PAPER = {(5, 1): 0.988, (5, 5): 0.997, (20, 1): 0.960, (20, 5): 0.989}  # by ways and shots; Snell et al. 2017, table 1


def omniglot(alphabets: list[Path], settings: list[str]) -> dict:
    """Train on all alphabets but the last, and print the accuracies on the last beside those of the paper.

    Args:
        alphabets: folders of `character/drawing.png`.
        settings: changes to the recipe `omniglot`, as `key=value`.

    Returns:
        The figures, for `--json`.
    """
    *training, held_out = alphabets
    with tempfile.TemporaryDirectory() as temporary:
        data, run = Path(temporary) / "data", Path(temporary) / "run"
        (data / "test").mkdir(parents=True)
        for alphabet in training:
            for drawing, degrees in itertools.product(sorted(alphabet.glob("*/*.png")), ROTATIONS):
                folder = data / "train" / f"{alphabet.name}-{drawing.parent.name}-{degrees}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.open(drawing).convert("L").rotate(degrees).save(folder / drawing.name)
        train_run(read_recipe("omniglot", settings), data, run)
        embeddings, classes = embed_alphabet(held_out, run)
    say(f"{held_out.name}, {counted(classes.max() + 1, 'character')} not seen in training, {EPISODES:,} episodes:\n")
    say("| ways | shots | accuracy | Snell et al. 2017 |\n|---|---|---|---|")
    rows = []
    for (ways, shots), paper in PAPER.items():
        if ways <= classes.max() + 1:
            accuracies = run_episodes(embeddings, classes, ways, shots)
            mean, half = accuracies.mean(), 1.96 * accuracies.std(ddof=1) / np.sqrt(len(accuracies))
            rows.append({"ways": ways, "shots": shots, "accuracy": float(mean), "half_width": float(half)})
            say(f"| {ways} | {shots} | {mean:.1%} ± {half:.1%} | {paper:.1%} |")
    names = [path.name for path in training]
    return {"training": names, "held_out": held_out.name, "episodes": EPISODES, "tasks": rows}


def embed_alphabet(alphabet: Path, run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(drawings, features) embeddings of length 1, and (drawings,) index of the character of each."""
    drawings = sorted(alphabet.glob("*/*.png"))
    single = [Observation(str(path), (path,)) for path in drawings]
    photos = embed_with_run(run, single, ["plain"], run.parent / CACHE)
    characters = np.array([path.parent.name for path in drawings])[photos.observations]
    return photos.values[:, 0].astype(float), np.unique(characters, return_inverse=True)[1]


def run_episodes(embeddings: np.ndarray, classes: np.ndarray, ways: int, shots: int) -> np.ndarray:
    """(EPISODES,) accuracies of QUERIES drawings of each of `ways` characters, by the means of `shots` others."""
    rng, accuracies = np.random.default_rng(0), []
    members = [np.flatnonzero(classes == index) for index in range(classes.max() + 1)]
    for _ in progress(range(EPISODES), f"{ways} ways, {shots} shots", unit="episode"):
        drawn = [rng.permutation(members[index])[: shots + QUERIES] for index in rng.permutation(len(members))[:ways]]
        support, queries = (np.stack([own[part] for own in drawn]) for part in (slice(shots), slice(shots, None)))
        prototypes = l2_normalize(l2_normalize(embeddings[support]).mean(axis=1))
        nearest = (l2_normalize(embeddings[queries]) @ prototypes.T).argmax(axis=2)
        accuracies.append((nearest == np.arange(ways)[:, None]).mean())
    return np.array(accuracies)

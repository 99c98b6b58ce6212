"""Choose the probability from which a class is in an answer, where test photos show several classes.

No labelled photo shows several. So quadrats are pasted from held-out photos of one class each, cut into tiles and
ranked as the kernel does it, by a bank that has none of these photos.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from kernel.embeddings import concatenate
from kernel.forward import Encoder
from kernel.manifest import tile_names, tiled
from kernel.photos import read_photo
from kernel.ranking import best_of_tiles, probable_classes, rank
from kernel.views import ALL_VIEWS
from local.banks.selection import BankSelection, SelectedBank
from local.base.console import Progress, counted, say
from local.base.metrics import describe, sample_f1, set_scores
from local.data.cost import Cost

QUADRATS = 200  # at most; with these the 95% interval of F1 is about ±.04
GRIDS, MOST_CLASSES = (2, 3, 4), 6  # n x n photos of 2 to 6 classes in a quadrat
AT_ONCE = 32  # quadrats that are embedded together
THRESHOLDS = np.round(np.arange(0.05, 1, 0.01), 2)  # with less, a tile could have more classes than are ranked
UNCHOSEN = 0.5  # the threshold where nothing is held out


@dataclass(frozen=True)
class Quadrat:
    """A photo pasted from others.

    Attributes:
        photos: in n rows of n.
        classes: indices of those that they show.
    """

    photos: tuple[Path, ...]
    classes: frozenset[int]

    def paste(self, side: int) -> np.ndarray:
        """(side, side, 3) uint8. Each photo fills a square of it, without its margins."""
        grid = round(len(self.photos) ** 0.5)
        edges, pixels = [round(side * edge / grid) for edge in range(grid + 1)], np.zeros((side, side, 3), np.uint8)
        for index, photo in enumerate(self.photos):
            rows, columns = (slice(*edges[first : first + 2]) for first in divmod(index, grid))
            size = columns.stop - columns.start, rows.stop - rows.start
            pixels[rows, columns] = np.asarray(ImageOps.fit(read_photo(photo, max(size)), size))
        return pixels


def draw_quadrats(photos: Mapping[int, Sequence[Path]], count: int, seed: int) -> Iterator[Quadrat]:
    """Quadrats of 2 to MOST_CLASSES classes, drawn at random.

    Args:
        photos: of each class; of two at least.
    """
    rng, known = np.random.default_rng(seed), sorted(photos)
    for _ in range(count):
        cells = int(rng.choice(GRIDS)) ** 2
        most = min(MOST_CLASSES, cells, len(known))
        classes = rng.choice(known, int(rng.integers(2, most + 1)), replace=False)
        shown = rng.permutation([*classes, *rng.choice(classes, cells - len(classes))]).tolist()
        yield Quadrat(tuple(photos[one][rng.integers(len(photos[one]))] for one in shown), frozenset(shown))


def choose_threshold(selection: BankSelection, selected: SelectedBank) -> tuple[float, dict[str, float]]:
    """The threshold with the highest mean F1 per quadrat.

    Returns:
        The threshold, and that F1 as `sample_f1` with its 95% interval; no F1 where nothing is held out.
    """
    plan, labelled = selection.plan, selection.labelled
    photos: dict[int, list[Path]] = {}
    held_out = plan.folds[0][1] & (plan.labels >= 0) if plan.folds else np.zeros(0, dtype=bool)
    for index in np.flatnonzero(held_out):
        readable = [path for path in labelled.observations[index].photos if path not in selection.unreadable]
        if readable:
            photos.setdefault(int(plan.labels[index]), []).extend(readable)
    if len(photos) < 2:
        say(f"threshold: {UNCHOSEN}, since fewer than two classes have held-out photos to choose it on")
        return UNCHOSEN, {}
    count = min(QUADRATS, sum(map(len, photos.values())))
    quadrats = list(draw_quadrats(photos, count, plan.seed))
    say(f"to choose a threshold: {counted(len(quadrats), 'quadrat')} of 2 to 6 classes, pasted from held-out photos")
    answers = rank_tiles(selection, selected, quadrats)
    threshold, f1 = best_threshold([one.classes for one in quadrats], answers, labelled.competition.guesses)
    scores = set_scores(f1)
    say(f"chosen: threshold = {threshold}, on the same quadrats with {describe(scores)}")
    return threshold, scores


def best_threshold(
    truth: Sequence[Collection[int]], answers: Sequence[dict[int, float]], most: int
) -> tuple[float, np.ndarray]:
    """The threshold with the highest mean F1, in the middle of equal ones, and (quadrats,) their F1.

    Args:
        truth, answers: of each quadrat its classes, and those found with their probabilities, most probable first.
        most: classes in an answer.
    """
    each = np.array([sample_f1(truth, [probable_classes(one, own, most) for one in answers]) for own in THRESHOLDS])
    means = each.mean(axis=1)
    best = np.flatnonzero(means == means.max())
    chosen = best[len(best) // 2]
    return float(THRESHOLDS[chosen]), each[chosen]


def rank_tiles(selection: BankSelection, selected: SelectedBank, quadrats: Sequence[Quadrat]) -> list[dict[int, float]]:
    """The classes of each quadrat with their probabilities, as the kernel ranks them; see `best_of_tiles`."""
    competition, encoders = selection.labelled.competition, selection.encoders
    each = [embed_tiles(encoder, quadrats, competition.grids) for encoder in encoders.encoders]
    values = concatenate(each)
    banks, device = selection.fit_fold(selected), encoders.encoders[0].device
    weights, guesses = [selected.inverse_temperature], competition.guesses
    ranked, probabilities = rank([banks], weights, [values], guesses, device=device)
    return list(best_of_tiles(ranked, probabilities, (values.norm(dim=1) > 0).view(len(quadrats), -1)))


def embed_tiles(encoder: Encoder, quadrats: Sequence[Quadrat], grids: Sequence[int]) -> torch.Tensor:
    """(quadrats x tiles, features) of length 1."""
    preprocessing, names = tiled(encoder.preprocessing, grids), tile_names(grids)
    whole = Encoder(encoder.module, preprocessing, encoder.features, encoder.devices)
    views, size = [ALL_VIEWS[name] for name in names], min(AT_ONCE, whole.batch_size)
    cost, parts = Cost(len(quadrats), names, whole), []
    cost.start()
    with Progress(f"embedding in {counted(len(names), 'tile')}", len(quadrats), "quadrat") as bar:
        for first in range(0, len(quadrats), size):
            own = quadrats[first : first + size]
            pixels = np.stack([quadrat.paste(preprocessing.decoded_size) for quadrat in own])
            parts.append(whole.embed(torch.from_numpy(pixels).permute(0, 3, 1, 2), views).flatten(0, 1))
            bar.advance(len(own))
            cost.advance(len(own))
    return torch.cat(parts)

"""Find near-duplicates: held-out photos of which another observation in the reference set has nearly the same photo.

A run recognises them by the copy, so its scores are too high where the test set has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from local.base.console import progress
from local.data.stored_embeddings import StoredEmbeddings

# Of the embeddings of single photos in one view: means over views hide near-duplicates. A copy that was resized
# or compressed again is mostly above it; one that was cropped, or much smaller, may be below.
NEAR_DUPLICATE = 0.98
# With a weak encoder, photos of different classes have such cosines too, and then they are no sign of a copy. At most
# this fraction of such pairs may have one; of plankton of 71 classes, none has with a MobileNetV2 trained on ImageNet.
MAX_BACKGROUND = 0.01
BACKGROUND_PHOTOS = 1000  # drawn to measure it
HELD_OUT_ROWS, REFERENCE_ROWS = 2048, 4096  # of one matrix product, whose result is 32 MiB


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """The held-out photos with a near-duplicate, and the most similar photo of each.

    Attributes:
        photos: (pairs,) int, index of the held-out photo, ascending.
        matches: (pairs,) int, index of the photo of another observation in the reference set.
        cosines: (pairs,).
        background: the fraction of such cosines among pairs of different classes. If it is above MAX_BACKGROUND, no
            photo counts as a near-duplicate.
    """

    photos: np.ndarray
    matches: np.ndarray
    cosines: np.ndarray
    background: float


def plain_column(views: Sequence[str]) -> int:
    """The index of the plain view, or of the first one if the photos were not embedded in it."""
    return list(views).index("plain") if "plain" in views else 0


def find_near_duplicates(
    embeddings: np.ndarray | StoredEmbeddings,
    observations: np.ndarray,
    labels: np.ndarray,
    query_mask: np.ndarray,
    reference: np.ndarray,
    threshold: float = NEAR_DUPLICATE,
) -> NearDuplicates:
    """Compare every held-out photo with every photo of other observations in the reference set.

    An observation that is held out in turn is in the reference set of all others. The memory does not grow with the
    number of pairs.

    Args:
        embeddings: (photos, features), or (photos, 1, features) of one view, of any precision and length.
        observations: (photos,) int, index of the observation of each.
        labels: (observations,) int, the class of each.
        query_mask: (observations,) bool, the held-out ones.
        reference: (observations,) bool, those of the reference set.
        threshold: the smallest cosine of a near-duplicate.
    """
    background = measure_background(embeddings, labels[observations], threshold)
    if background > MAX_BACKGROUND:
        none = np.zeros(0, dtype=np.int64)
        return NearDuplicates(none, none, np.zeros(0), background)
    held_out, others = (np.flatnonzero(mask[observations]) for mask in (query_mask, reference))
    best, matches = np.full(len(held_out), -np.inf), np.zeros(len(held_out), dtype=np.int64)
    for first in progress(range(0, len(held_out), HELD_OUT_ROWS), "looking for near-duplicates", unit="part"):
        rows = slice(first, first + HELD_OUT_ROWS)
        queries = _unit_rows(embeddings[held_out[rows]])
        for start in range(0, len(others), REFERENCE_ROWS):
            photos = others[start : start + REFERENCE_ROWS]
            cosines = queries @ _unit_rows(embeddings[photos]).T
            cosines[observations[held_out[rows], None] == observations[photos]] = -np.inf
            nearest = cosines.argmax(axis=1)
            highest = np.take_along_axis(cosines, nearest[:, None], axis=1)[:, 0]
            is_better = highest > best[rows]
            best[rows] = np.where(is_better, highest, best[rows])
            matches[rows] = np.where(is_better, photos[nearest], matches[rows])
    found = np.flatnonzero(best >= threshold)
    return NearDuplicates(held_out[found], matches[found], best[found], background)


def measure_background(embeddings: np.ndarray | StoredEmbeddings, labels: np.ndarray, threshold: float) -> float:
    """The fraction of pairs of photos of different classes with a cosine of `threshold` or more, among drawn photos.

    Args:
        embeddings: see `find_near_duplicates`.
        labels: (photos,) int, the class of each.
    """
    drawn = np.random.default_rng(0).permutation(len(labels))[:BACKGROUND_PHOTOS]
    values, labels = _unit_rows(embeddings[drawn]), labels[drawn]
    differ = labels[:, None] != labels
    return float(((values @ values.T)[differ] >= threshold).mean()) if differ.any() else 0.0


def _unit_rows(embeddings: np.ndarray | StoredEmbeddings) -> np.ndarray:
    """(rows, features) of length 1 in float32; rows of zeros stay."""
    values = np.asarray(embeddings, dtype=np.float32).reshape(len(embeddings), embeddings.shape[-1])
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

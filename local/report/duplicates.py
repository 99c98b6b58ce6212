"""Near-duplicates of held-out photos in the bank, and what the scores are without them."""

from dataclasses import dataclass

import numpy as np

from local.data.duplicates import NEAR_DUPLICATE, find_near_duplicates
from local.report.evidence import Evidence
from local.report.scores import Scores, score_answers

PAIRS = 60  # on the page


@dataclass(frozen=True)
class PhotoPair:
    """A held-out photo and the most similar photo of another observation in the bank."""

    observation: str
    photo: str
    label: int
    other_observation: str
    other_photo: str
    other_label: int
    cosine: float


@dataclass(frozen=True)
class DuplicateScores:
    """How many held-out photos have a near-duplicate in the bank, and the scores with and without them.

    Attributes:
        threshold: the smallest cosine of a near-duplicate, in the plain view.
        background: see `local.data.duplicates.NearDuplicates`.
        photos: held-out ones that could be read; `duplicates` those with a near-duplicate.
        observations: with such a photo; `same_class` those whose near-duplicate is of the true class.
        with_duplicates: the scores of these observations, weighted as the headline is; None if there are none.
        without_duplicates: of the others; None if there are none.
        pairs: the most similar ones, at most PAIRS; two held-out photos that match each other are one pair.
    """

    threshold: float
    background: float
    photos: int
    duplicates: int
    observations: int
    same_class: int
    with_duplicates: Scores | None
    without_duplicates: Scores | None
    pairs: list[PhotoPair]


def score_duplicates(evidence: Evidence) -> DuplicateScores:
    """Find the near-duplicates of the held-out photos among the bank's, and score the queries with and without one."""
    embedded, count = evidence.embedded, len(evidence.queries)
    query_mask = np.arange(len(embedded.observations)) < count
    found = find_near_duplicates(
        embedded.plain, embedded.photo_observations, embedded.classes, query_mask, embedded.is_reference
    )
    queries, others = embedded.photo_observations[found.photos], embedded.photo_observations[found.matches]
    has_duplicate = np.isin(np.arange(count), queries)
    is_same = embedded.classes[queries] == embedded.classes[others]
    pairs = {}
    for row in np.argsort(-found.cosines, kind="stable"):
        pairs.setdefault(frozenset((found.photos[row].item(), found.matches[row].item())), row)
    return DuplicateScores(
        threshold=NEAR_DUPLICATE,
        background=found.background,
        photos=int((embedded.photo_observations < count).sum()),
        duplicates=len(found.photos),
        observations=int(has_duplicate.sum()),
        same_class=len(np.unique(queries[is_same])),
        with_duplicates=score_some(evidence, has_duplicate),
        without_duplicates=score_some(evidence, ~has_duplicate),
        pairs=[
            PhotoPair(
                observation=embedded.observations[queries[row]].id,
                photo=evidence.path_of(embedded.photos[found.photos[row]]),
                label=int(embedded.classes[queries[row]]),
                other_observation=embedded.observations[others[row]].id,
                other_photo=evidence.path_of(embedded.photos[found.matches[row]]),
                other_label=int(embedded.classes[others[row]]),
                cosine=min(1.0, float(found.cosines[row])),
            )
            for row in list(pairs.values())[:PAIRS]
        ],
    )


def score_some(evidence: Evidence, mask: np.ndarray) -> Scores | None:
    """The scores of the queries where `mask`, (queries,) bool, is true; None if their weights are 0 or none is."""
    weights, outcome = evidence.weights[mask], evidence.outcome
    if not weights.any():
        return None
    some = outcome.of(mask)
    return score_answers(evidence.truth[mask], some, evidence.classes, weights, evidence.is_macro)

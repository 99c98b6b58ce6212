"""What the embeddings show beside the scores: similar photos, unreadable photos, a map."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from kernel.photos import decode
from local.banks.estimators import group_means, l2_normalize
from local.report.evidence import Evidence, Rank

EXAMPLES = 4  # observations
GUESSES = 5
POINTS = 2000  # of the map
COLOURS = 10  # groups of the map that have a colour of their own


@dataclass(frozen=True)
class Neighbour:
    """An observation of the bank that resembles a query, and its first photo."""

    observation: str
    photo: str
    cosine: float


@dataclass(frozen=True)
class Guess:
    """A guess, and the most similar observation of its class; None if the class has no other."""

    label: int
    probability: float
    nearest: Neighbour | None


@dataclass(frozen=True)
class Example:
    """A held-out observation with its five guesses.

    Attributes:
        position: of the true class among all guesses, from 1.
        probability: of the true class.
        votes: (label, views of the observation that alone have this class as first guess), the commonest first.
    """

    observation: str
    label: int
    position: int
    probability: float
    shots: int
    photos: list[str]
    guesses: list[Guess]
    votes: list[tuple[int, int]]


@dataclass(frozen=True)
class UnreadablePhoto:
    observation: str
    photo: str
    cause: str


@dataclass(frozen=True)
class Map:
    """Observations on a plane (t-SNE).

    Attributes:
        rank: that the colours show.
        groups: (name, observations) of those with a colour of their own.
        others: observations of the other groups.
        points: (x, y, index of the group or -1, whether it was held out as 0 or 1).
    """

    rank: str
    groups: list[tuple[str, int]]
    others: int
    points: list[tuple[float, float, int, int]]


class Closeup:
    """Looks at single observations. A query is never compared with itself."""

    def __init__(self, evidence: Evidence):
        self.evidence, self.embedded = evidence, evidence.embedded
        self.is_readable = self.embedded.readable > 0
        self.is_usable = self.embedded.is_reference & self.is_readable & (self.embedded.classes >= 0)

    def photos_of(self, label: int) -> list[str]:
        """The first photo of each observation of a class in the bank."""
        return [self.evidence.photo(self.embedded.observations[row]) for row in self._members(label)]

    def first_photos(self) -> dict[int, str]:
        """By label, a readable photo of the class, from the bank if it has one."""
        found = {}
        for is_reference in (True, False):
            for row in np.flatnonzero((self.embedded.is_reference == is_reference) & self.is_readable):
                found.setdefault(int(self.embedded.classes[row]), self.evidence.photo(self.embedded.observations[row]))
        return found

    def nearest(self, query: int, label: int) -> Neighbour | None:
        """The most similar observation of a class in the bank; None if there is no other than the query."""
        members = self._members(label)
        members = members[members != query]  # queries come first among the embedded observations
        if not len(members):
            return None
        cosines = self.embedded.pooled[members] @ self.embedded.pooled[query]
        best = self.embedded.observations[members[cosines.argmax()]]
        return Neighbour(best.id, self.evidence.photo(best), float(cosines.max()))

    def _members(self, label: int) -> np.ndarray:
        return np.flatnonzero(self.is_usable & (self.embedded.classes == label))

    @cached_property
    def class_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(classes, features) float32 sums of the observations in the bank, and (classes,) their numbers."""
        rows, classes = self.embedded.pooled[self.is_usable], self.embedded.classes[self.is_usable]
        means, sizes = group_means(rows, classes, len(self.evidence.classes))
        return (means * sizes[:, None]).astype(np.float32), sizes

    def resembling(self, label: int) -> list[tuple[int, float]]:
        """The classes whose means are nearest to the mean of a class: (label, cosine)."""
        sums, sizes = self.class_sums
        cosines = l2_normalize(sums) @ l2_normalize(sums[label])
        cosines[(sizes == 0) | (np.arange(len(sizes)) == label)] = -np.inf
        nearest = np.argsort(-cosines)[:GUESSES].tolist()
        return [(other, float(cosines[other])) for other in nearest if np.isfinite(cosines[other])]

    def worst(self) -> list[Example]:
        """The wrong answers with the lowest probability of the true class, one of each class that the bank has."""
        evidence, firsts = self.evidence, {}
        own = evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth]
        own = own - np.logaddexp.reduce(evidence.log_probabilities, axis=1)
        is_shown = self.is_readable[: len(own)] & (evidence.guesses != evidence.truth) & np.isfinite(own)
        for query in np.argsort(own, kind="stable"):
            if is_shown[query]:
                firsts.setdefault(int(evidence.truth[query]), int(query))
        return [self.example(query) for query in list(firsts.values())[:EXAMPLES]]

    def example(self, query: int) -> Example:
        evidence = self.evidence
        truth, probabilities = int(evidence.truth[query]), evidence.probabilities[query].tolist()
        return Example(
            observation=evidence.queries[query].id,
            label=truth,
            position=int(evidence.outcome.ranks[query]) + 1,
            probability=probabilities[truth],
            shots=int(evidence.shots[query]),
            photos=[evidence.path_of(path) for path in evidence.queries[query].photos],
            guesses=[
                Guess(label, probabilities[label], self.nearest(query, label))
                for label in evidence.outcome.top[query, :GUESSES].tolist()
            ],
            votes=self.evidence.votes(query),
        )

    def unreadable(self) -> list[UnreadablePhoto]:
        preprocessing = self.evidence.manifest.members[0].encoders[0].preprocessing
        found = []
        for observation, readable in zip(self.embedded.observations, self.embedded.readable, strict=True):
            for path in observation.photos if readable < len(observation.photos) else ():
                cause = decode(path, preprocessing)
                if isinstance(cause, str):
                    found.append(UnreadablePhoto(observation.id, self.evidence.path_of(path), cause))
        return found

    def map(self) -> Map | None:
        """Up to POINTS observations by t-SNE (van der Maaten and Hinton 2008); None for fewer than ten."""
        readable = np.flatnonzero(self.is_readable & (self.embedded.classes >= 0))
        chosen = np.sort(np.random.default_rng(0).permutation(readable)[:POINTS])
        if len(chosen) < 10:
            return None
        values = self.embedded.pooled[chosen]
        values = PCA(min(50, *values.shape), random_state=0).fit_transform(values)
        perplexity = min(30, len(values) // 4)
        plane = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(values)
        rank = self._rank_to_colour(self.embedded.classes[chosen])
        groups = rank.groups[self.embedded.classes[chosen]].tolist()
        common = Counter(sorted(groups)).most_common(COLOURS)
        colour = {group: index for index, (group, _) in enumerate(common)}
        return Map(
            rank=rank.name,
            groups=[(rank.names[group], size) for group, size in common],
            others=sum(group not in colour for group in groups),
            points=[
                (round(float(x), 2), round(float(y), 2), colour.get(group, -1), int(row < len(self.evidence.truth)))
                for (x, y), group, row in zip(plane, groups, chosen, strict=True)
            ],
        )

    def _rank_to_colour(self, classes: np.ndarray) -> Rank:
        """The rank at which most pairs of observations have different colours."""

        def pairs_apart(rank: Rank) -> float:
            fractions = np.sort(np.bincount(rank.groups[classes]) / len(classes))[::-1][:COLOURS]
            return fractions.sum() ** 2 - (fractions**2).sum()

        return max(self.evidence.ranks, key=pairs_apart)

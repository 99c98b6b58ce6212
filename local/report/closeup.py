"""What the embeddings show beside the scores: similar photos, disagreeing views, unreadable photos, a map."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from kernel.photos import decode
from local.banks.estimators import group_means, l2_normalize
from local.report.evidence import Evidence, Rank

SHOWN = 8  # photos of a class
EXAMPLES = 6  # observations, best and worst each
GUESSES = 5
POINTS = 2000  # of the map
COLOURS = 10  # groups of the map that have a colour of their own
CHUNK = 4096  # photos compared at once


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
        agreement: the fraction of a photo's views that vote for the same class, averaged over photos.
        votes: (label, views that are nearest to the mean of this class), the commonest first.
    """

    observation: str
    label: int
    position: int
    probability: float
    shots: int
    photos: list[str]
    guesses: list[Guess]
    agreement: float
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
        """The first photo of some observations of a class in the bank."""
        return [self.evidence.photo(self.embedded.observations[row]) for row in self._members(label)[:SHOWN]]

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

    @cached_property
    def view_labels(self) -> np.ndarray:
        """(photos, views) the class whose mean is nearest to each view of each photo of the queries."""
        sums, sizes = self.class_sums
        means, embedded = l2_normalize(sums), self.embedded
        photos, views, features = embedded.photos.shape
        found = np.zeros((photos, views), dtype=np.int64)
        for first in range(0, photos, CHUNK):
            part = slice(first, first + CHUNK)
            queries = embedded.query_index[part]
            cosines = (embedded.photos[part].reshape(-1, features) @ means.T).reshape(len(queries), views, -1)
            cosines[:, :, sizes == 0] = -np.inf
            # A query that is in the bank is taken out of the mean of its own class.
            own, is_own = embedded.classes[queries], embedded.is_reference[queries]
            rest = np.where(is_own[:, None], sums[own] - embedded.pooled[queries], sums[own])
            without = np.einsum("pvf,pf->pv", embedded.photos[part], l2_normalize(rest))
            without[sizes[own] - is_own <= 0] = -np.inf
            cosines[np.arange(len(queries)), :, own] = without
            found[part] = cosines.argmax(axis=2)
        return found

    def votes(self, query: int) -> Counter:
        """By label, how many views of a query's photos are nearest to the mean of the class."""
        return Counter(self.view_labels[self.embedded.query_index == query].ravel().tolist())

    @cached_property
    def agreement(self) -> np.ndarray:
        """(queries,) the largest fraction of a photo's views with one vote, averaged over photos; NaN without any."""
        count, (photos, views) = len(self.evidence.queries), self.view_labels.shape
        cells = np.arange(photos)[:, None] * len(self.evidence.classes) + self.view_labels
        values, votes = np.unique(cells, return_counts=True)
        most = np.zeros(photos)
        np.maximum.at(most, values // len(self.evidence.classes), votes)
        totals, owned = (np.bincount(self.embedded.query_index, one, minlength=count) for one in (most / views, None))
        return np.where(owned > 0, totals / np.maximum(owned, 1), np.nan)

    def best(self) -> list[Example]:
        """The right answers with the highest probability, one of each class."""
        is_right = self.evidence.guesses == self.evidence.truth
        return self._examples(query for query in self._by_probability[::-1] if is_right[query])

    def worst(self) -> list[Example]:
        """The wrong answers with the lowest probability of the true class, one of each class that the bank has."""
        is_wrong = (self.evidence.guesses != self.evidence.truth) & ~np.isnan(self.evidence.outcome.losses)
        return self._examples(query for query in self._by_probability if is_wrong[query])

    @cached_property
    def _by_probability(self) -> list[int]:
        """The queries with a readable photo, ordered by the probability of the true class."""
        evidence = self.evidence
        own = evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth]
        own = own - np.logaddexp.reduce(evidence.log_probabilities, axis=1)
        return [query for query in np.argsort(own, kind="stable").tolist() if self.is_readable[query]]

    def _examples(self, queries: Iterable[int]) -> list[Example]:
        firsts: dict[int, int] = {}
        for query in queries:
            firsts.setdefault(int(self.evidence.truth[query]), query)
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
            agreement=float(self.agreement[query]),
            votes=self.votes(query).most_common(3),
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

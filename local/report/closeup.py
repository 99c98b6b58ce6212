"""What the embeddings show beside the scores: similar photos, disagreeing views, unreadable photos, a map."""

from collections import Counter
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
    """An observation of the bank that resembles a query, and one of its photos."""

    observation: str
    photo: str
    cosine: float


@dataclass(frozen=True)
class ClassCosine:
    """A class and the cosine of its mean with that of another class."""

    label: int
    cosine: float


@dataclass(frozen=True)
class Guess:
    """A guess, and the most similar observation of its class; None if the class has no other."""

    label: int
    probability: float
    nearest: Neighbour | None


@dataclass(frozen=True)
class Votes:
    """How many views of an observation's photos are nearest to the mean of a class."""

    label: int
    views: int


@dataclass(frozen=True)
class Example:
    """A held-out observation with its five guesses.

    Attributes:
        position: of the true class among all guesses, from 1.
        probability: of the true class.
        agreement: the fraction of a photo's views that vote for the same class, averaged over photos.
    """

    observation: str
    label: int
    position: int
    probability: float
    shots: int
    photos: list[str]
    guesses: list[Guess]
    agreement: float
    votes: list[Votes]


@dataclass(frozen=True)
class UnreadablePhoto:
    """A photo that could not be decoded, and why."""

    observation: str
    photo: str
    cause: str


@dataclass(frozen=True)
class MapGroup:
    """A group with a colour of its own on the map."""

    name: str
    observations: int


@dataclass(frozen=True)
class Map:
    """Observations on a plane (t-SNE).

    Attributes:
        rank: that the colours show.
        others: observations of groups without a colour of their own.
        points: (x, y, index of the group or -1, whether it was held out as 0 or 1).
    """

    rank: str
    groups: list[MapGroup]
    others: int
    points: list[tuple[float, float, int, int]]


class Closeup:
    """Looks at single observations. A query is never compared with itself."""

    def __init__(self, evidence: Evidence):
        self.evidence, self.embedded = evidence, evidence.embedded

    def photo_of(self, query: int) -> str:
        """The first photo of a query."""
        return self.evidence.photo(self.evidence.queries[query].photos[0])

    def photos_of(self, label: int) -> list[str]:
        """The first photo of some observations of a class in the bank."""
        return [self.evidence.photo(self.embedded.observations[row].photos[0]) for row in self._members(label)[:SHOWN]]

    def first_photos(self) -> dict[int, str]:
        """By label, a readable photo of the class, from the bank if it has one."""
        embedded, found = self.embedded, {}
        for is_reference in (True, False):
            for row in np.flatnonzero((embedded.is_reference == is_reference) & (embedded.readable > 0)):
                found.setdefault(int(embedded.classes[row]), self.evidence.photo(embedded.observations[row].photos[0]))
        return found

    def nearest(self, query: int, label: int) -> Neighbour | None:
        """The most similar observation of a class in the bank; None if there is no other than the query."""
        members = self._members(label)
        members = members[members != query]  # queries come first among the embedded observations
        if not len(members):
            return None
        cosines = self.embedded.pooled[members] @ self.embedded.pooled[query]
        best = self.embedded.observations[members[cosines.argmax()]]
        return Neighbour(best.id, self.evidence.photo(best.photos[0]), float(cosines.max()))

    def _members(self, label: int) -> np.ndarray:
        """Indices of the observations of a class in the bank that have a readable photo."""
        return np.flatnonzero(self._is_usable & (self.embedded.classes == label))

    @cached_property
    def _is_usable(self) -> np.ndarray:
        return self.embedded.is_reference & (self.embedded.readable > 0) & (self.embedded.classes >= 0)

    @cached_property
    def class_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(classes, features) float32 sums of the observations in the bank, and (classes,) their numbers."""
        rows, usable = self._is_usable, self.embedded
        means, sizes = group_means(usable.pooled[rows], usable.classes[rows], len(self.evidence.classes))
        return (means * sizes[:, None]).astype(np.float32), sizes

    def resembling(self, label: int) -> list[ClassCosine]:
        """The classes whose means are nearest to the mean of a class."""
        sums, sizes = self.class_sums
        cosines = l2_normalize(sums) @ l2_normalize(sums[label])
        cosines[(sizes == 0) | (np.arange(len(sizes)) == label)] = -np.inf
        nearest = [other for other in np.argsort(-cosines)[:GUESSES].tolist() if np.isfinite(cosines[other])]
        return [ClassCosine(other, float(cosines[other])) for other in nearest]

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
            own = embedded.classes[queries]
            rest = np.where(embedded.is_reference[queries][:, None], sums[own] - embedded.pooled[queries], sums[own])
            is_alone = sizes[own] - embedded.is_reference[queries] <= 0
            without = np.einsum("pvf,pf->pv", embedded.photos[part], l2_normalize(rest))
            cosines[np.arange(len(queries)), :, own] = np.where(is_alone[:, None], -np.inf, without)
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

    def best_and_worst(self) -> tuple[list[Example], list[Example]]:
        """The right answers with the highest probability and the wrong ones with the lowest, one of each class."""
        evidence = self.evidence
        own = evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth]
        own = own - np.logaddexp.reduce(evidence.log_probabilities, axis=1)
        is_readable = self.embedded.readable[: len(own)] > 0
        is_right, order = evidence.guesses == evidence.truth, np.argsort(own, kind="stable")
        best = [query for query in order[::-1] if is_readable[query] and is_right[query]]
        worst = [query for query in order if is_readable[query] and not is_right[query] and np.isfinite(own[query])]
        return self._examples(best), self._examples(worst)

    def _examples(self, queries: list[int]) -> list[Example]:
        """The first queries, one of each class."""
        firsts: dict[int, int] = {}
        for query in queries:
            firsts.setdefault(int(self.evidence.truth[query]), query)
        return [self.example(query) for query in list(firsts.values())[:EXAMPLES]]

    def example(self, query: int) -> Example:
        """One query with its guesses, and with the votes of its views."""
        evidence = self.evidence
        guesses = evidence.outcome.top[query, :GUESSES].tolist()
        return Example(
            observation=evidence.queries[query].id,
            label=int(evidence.truth[query]),
            position=int(evidence.outcome.ranks[query]) + 1,
            probability=float(evidence.probabilities[query, evidence.truth[query]]),
            shots=int(evidence.shots[query]),
            photos=[evidence.photo(path) for path in evidence.queries[query].photos],
            guesses=[
                Guess(label, float(evidence.probabilities[query, label]), self.nearest(query, label))
                for label in guesses
            ],
            agreement=float(self.agreement[query]),
            votes=[Votes(label, views) for label, views in self.votes(query).most_common(3)],
        )

    def unreadable(self) -> list[UnreadablePhoto]:
        """The photos that could not be decoded."""
        preprocessing = self.evidence.manifest.members[0].encoder.preprocessing
        found = []
        for observation, readable in zip(self.embedded.observations, self.embedded.readable, strict=True):
            for path in observation.photos if readable < len(observation.photos) else ():
                cause = decode(path, preprocessing)
                if isinstance(cause, str):
                    found.append(UnreadablePhoto(observation.id, self.evidence.photo(path), cause))
        return found

    def map(self) -> Map | None:
        """Up to POINTS observations by t-SNE (van der Maaten and Hinton 2008); None for fewer than ten."""
        readable = np.flatnonzero((self.embedded.readable > 0) & (self.embedded.classes >= 0))
        chosen = np.sort(np.random.default_rng(0).permutation(readable)[:POINTS])
        if len(chosen) < 10:
            return None
        values = self.embedded.pooled[chosen]
        values = PCA(min(50, *values.shape), random_state=0).fit_transform(values)
        perplexity = min(30, len(values) // 4)
        plane = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(values)
        rank = self._rank_to_colour(self.embedded.classes[chosen])
        groups = rank.groups[self.embedded.classes[chosen]]
        sizes = np.bincount(groups, minlength=len(rank.names))
        common = [group for group in np.argsort(-sizes, kind="stable")[:COLOURS].tolist() if sizes[group]]
        colour = {group: index for index, group in enumerate(common)}
        return Map(
            rank=rank.name,
            groups=[MapGroup(rank.names[group], int(sizes[group])) for group in common],
            others=int(np.isin(groups, common, invert=True).sum()),
            points=[
                (round(float(x), 2), round(float(y), 2), colour.get(group, -1), int(row < len(self.evidence.truth)))
                for (x, y), group, row in zip(plane, groups.tolist(), chosen, strict=True)
            ],
        )

    def _rank_to_colour(self, classes: np.ndarray) -> Rank:
        """The rank at which most pairs of observations have different colours."""

        def pairs_apart(rank: Rank) -> float:
            fractions = np.sort(np.bincount(rank.groups[classes]) / len(classes))[::-1][:COLOURS]
            return fractions.sum() ** 2 - (fractions**2).sum()

        return max(self.evidence.ranks, key=pairs_apart)

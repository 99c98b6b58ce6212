"""What the embeddings tell beside the answers: nearest photos, views that disagree, photos that failed, a map."""

from collections import Counter
from functools import cached_property

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from kernel.photos import decode
from local.banks.estimators import group_means, unit
from local.report.evidence import Evidence

SHOWN = 8  # photos of a class
EXAMPLES = 6  # observations, best and worst each
GUESSES = 5
POINTS = 2000  # of the map
COLOURS = 10  # groups of the map with a colour of their own
CHUNK = 4096  # photos matched at once


class Closeup:
    """Looks at single observations of the evidence.

    Whatever a query is compared with, it is never compared with itself.
    """

    def __init__(self, evidence: Evidence):
        self.evidence, self.embedded = evidence, evidence.embedded

    def photo_of(self, query: int) -> str:
        """The first photo of a query."""
        return self.evidence.photo(self.evidence.queries[query].photos[0])

    def known(self, place: int) -> np.ndarray:
        """Places of the reference's observations of a class that have a readable photo."""
        is_known = self.embedded.is_reference & (self.embedded.classes == place) & (self.embedded.readable > 0)
        return np.flatnonzero(is_known)

    def photos_of(self, place: int) -> list[str]:
        """The first photo of some of a class's observations in the reference."""
        return [self.evidence.photo(self.embedded.observations[one].photos[0]) for one in self.known(place)[:SHOWN]]

    def first_photos(self) -> dict[int, str]:
        """A photo of each class that has a readable one, of the reference where it can be."""
        embedded, found = self.embedded, {}
        for is_reference in (True, False):
            for one in np.flatnonzero((embedded.is_reference == is_reference) & (embedded.readable > 0)):
                found.setdefault(int(embedded.classes[one]), self.evidence.photo(embedded.observations[one].photos[0]))
        return found

    def nearest(self, query: int, place: int) -> dict | None:
        """The observation of a class in the reference that resembles a query most; None where there is no other."""
        known = self.known(place)
        known = known[known != query]  # queries come first among what was embedded
        if not len(known):
            return None
        cosines = self.embedded.pooled[known] @ self.embedded.pooled[query]
        best = self.embedded.observations[known[cosines.argmax()]]
        return {
            "observation": best.id,
            "photo": self.evidence.photo(best.photos[0]),
            "cosine": float(cosines.max()),
        }

    @cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the reference's observations by class, (classes, features) float32, and their numbers, (classes,)."""
        known = self.embedded.is_reference & (self.embedded.readable > 0) & (self.embedded.classes >= 0)
        means, sizes = group_means(
            self.embedded.pooled[known], self.embedded.classes[known], len(self.evidence.classes)
        )
        return (means * sizes[:, None]).astype(np.float32), sizes

    def resembling(self, place: int) -> list[dict]:
        """The classes whose means are nearest to that of a class."""
        sums, sizes = self.means
        cosines = unit(sums) @ unit(sums[place])
        cosines[(sizes == 0) | (np.arange(len(sizes)) == place)] = -np.inf
        return [
            {"class": int(one), "cosine": float(cosines[one])}
            for one in np.argsort(-cosines)[:GUESSES]
            if np.isfinite(cosines[one])
        ]

    @cached_property
    def voices(self) -> np.ndarray:
        """(photos, views) the class whose mean is nearest to each view of each photo of the queries."""
        sums, sizes = self.means
        means, embedded = unit(sums), self.embedded
        photos, views, features = embedded.photos.shape
        found = np.zeros((photos, views), dtype=np.int64)
        for first in range(0, photos, CHUNK):
            part = slice(first, first + CHUNK)
            owners = embedded.owners[part]
            asked = embedded.photos[part].reshape(-1, features)
            cosines = (asked @ means.T).reshape(len(owners), views, -1)
            cosines[:, :, sizes == 0] = -np.inf
            # A query that is part of the reference is taken out of its own class's mean.
            own = embedded.classes[owners]
            rest = np.where(embedded.is_reference[owners][:, None], sums[own] - embedded.pooled[owners], sums[own])
            is_alone = sizes[own] - embedded.is_reference[owners] <= 0
            without = np.einsum("pvf,pf->pv", embedded.photos[part], unit(rest))
            cosines[np.arange(len(owners)), :, own] = np.where(is_alone[:, None], -np.inf, without)
            found[part] = cosines.argmax(axis=2)
        return found

    def votes(self, query: int) -> Counter:
        """How many photo-views of a query are nearest to each class's mean."""
        return Counter(self.voices[self.embedded.owners == query].ravel().tolist())

    @cached_property
    def agreement(self) -> np.ndarray:
        """(queries,) the share of a photo's views that vote with most of them, over its photos; NaN without any."""
        count, (photos, views) = len(self.evidence.queries), self.voices.shape
        cells = np.arange(photos)[:, None] * len(self.evidence.classes) + self.voices
        values, votes = np.unique(cells, return_counts=True)
        most = np.zeros(photos)
        np.maximum.at(most, values // len(self.evidence.classes), votes)
        totals, owned = (np.bincount(self.embedded.owners, one, minlength=count) for one in (most / views, None))
        return np.where(owned > 0, totals / np.maximum(owned, 1), np.nan)

    def photos(self) -> dict:
        """The best and the worst recognised observations, of as many classes, and the photos that failed."""
        evidence = self.evidence
        own = evidence.log_probabilities[np.arange(len(evidence.truth)), evidence.truth]
        own = own - np.logaddexp.reduce(evidence.log_probabilities, axis=1)
        readable = self.embedded.readable[: len(own)] > 0
        right, order = evidence.guesses == evidence.truth, np.argsort(own, kind="stable")
        best = [query for query in order[::-1] if readable[query] and right[query]]
        worst = [query for query in order if readable[query] and not right[query] and np.isfinite(own[query])]
        return {
            "best": [self.example(query) for query in self.of_several_classes(best)],
            "worst": [self.example(query) for query in self.of_several_classes(worst)],
            "unreadable": self.unreadable(),
        }

    def of_several_classes(self, queries: list[int]) -> list[int]:
        """The first queries, one of each class."""
        firsts: dict[int, int] = {}
        for query in queries:
            firsts.setdefault(int(self.evidence.truth[query]), query)
        return list(firsts.values())[:EXAMPLES]

    def example(self, query: int) -> dict:
        """One query: its five guesses, each beside what resembles it most of that class, and what its views say."""
        evidence = self.evidence
        return {
            "observation": evidence.queries[query].id,
            "class": int(evidence.truth[query]),
            "place": int(evidence.outcome.places[query]) + 1,
            "probability": float(evidence.probabilities[query, evidence.truth[query]]),
            "shots": int(evidence.shots[query]),
            "photos": [evidence.photo(path) for path in evidence.queries[query].photos],
            "guesses": [
                {
                    "class": int(place),
                    "probability": float(evidence.probabilities[query, place]),
                    "nearest": self.nearest(query, place),
                }
                for place in evidence.outcome.top[query, :GUESSES]
            ],
            "agreement": float(self.agreement[query]),
            "votes": [{"class": place, "views": count} for place, count in self.votes(query).most_common(3)],
        }

    def unreadable(self) -> list[dict]:
        """The photos that could not be decoded, and why."""
        embedded = self.embedded
        preprocessing = self.evidence.manifest.members[0].encoder.preprocessing
        suspects = [
            (one.id, path)
            for one, count in zip(embedded.observations, embedded.readable, strict=True)
            if count < len(one.photos)
            for path in one.photos
        ]
        causes = [(name, path, decode(path, preprocessing)) for name, path in suspects]
        return [
            {"observation": name, "photo": self.evidence.photo(path), "cause": cause}
            for name, path, cause in causes
            if isinstance(cause, str)
        ]

    def map(self) -> dict | None:
        """Observations on a plane, neighbours near each other (t-SNE, van der Maaten and Hinton 2008).

        Coloured by the rank that tells most apart with the colours there are; None for too few observations.
        """
        rng = np.random.default_rng(0)
        seen = np.flatnonzero((self.embedded.readable > 0) & (self.embedded.classes >= 0))
        chosen = np.sort(rng.permutation(seen)[:POINTS])
        if len(chosen) < 10:
            return None
        values = self.embedded.pooled[chosen]
        values = PCA(min(50, *values.shape), random_state=0).fit_transform(values)
        perplexity = min(30, len(values) // 4)
        places = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(values)
        classes = self.embedded.classes[chosen]
        rank, sizes = self.telling_rank(classes)
        common = [int(group) for group in np.argsort(-sizes, kind="stable")[:COLOURS] if sizes[group]]
        colour = {group: number for number, group in enumerate(common)}
        groups = rank.groups[classes]
        return {
            "rank": rank.name,
            "groups": [{"name": rank.names[group], "observations": int(sizes[group])} for group in common],
            "others": int(np.isin(groups, common, invert=True).sum()),
            "points": [
                [
                    round(float(x), 2),
                    round(float(y), 2),
                    colour.get(int(group), -1),
                    int(place < len(self.evidence.truth)),
                ]
                for (x, y), group, place in zip(places, groups, chosen, strict=True)
            ],
        }

    def telling_rank(self, classes: np.ndarray):
        """The rank whose groups, as far as colours go, tell most pairs of observations apart; and its groups' sizes."""

        def told_apart(rank) -> float:
            sizes = np.sort(np.bincount(rank.groups[classes], minlength=len(rank.names)) / len(classes))[::-1]
            shown = sizes[:COLOURS]
            return shown.sum() ** 2 - (shown**2).sum()

        rank = max(self.evidence.ranks, key=told_apart)
        return rank, np.bincount(rank.groups[classes], minlength=len(rank.names))

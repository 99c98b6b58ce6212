"""Embed photos with one or several encoders, whose embeddings are concatenated, through the cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kernel.encoders import Encoder, open_encoder, pick_devices
from kernel.manifest import Preprocessing, read_weights
from kernel.observations import Observation
from local.data.cache import EmbeddingCache, PhotoEmbeddings
from local.data.stored_embeddings import concatenate_features


@dataclass(frozen=True)
class WeightedEncoders:
    """Encoders whose embeddings, each of length 1 and times its weight, are concatenated.

    Args:
        weights: one per encoder; empty: all the same.
    """

    encoders: tuple[Encoder, ...]
    weights: tuple[float, ...] = ()

    @property
    def scales(self) -> np.ndarray:
        """(encoders,) the weights, scaled so that the concatenation has length 1."""
        weights = np.array(self.weights or (1.0,) * len(self.encoders))
        return weights / np.linalg.norm(weights)

    def first(self, count: int) -> "WeightedEncoders":
        """The first encoders."""
        return WeightedEncoders(self.encoders[:count], self.weights[:count])

    def embed(
        self,
        observations: Sequence[Observation],
        views: Sequence[str],
        folder: Path,
        resize_mode: str = "encoder",
        rounds: int = 1,
    ) -> PhotoEmbeddings:
        """The photos that every encoder could read; see EmbeddingCache.embed.

        Args:
            folder: of the cache.
            resize_mode: of the photos: "crop", "squash", or "encoder" for each encoder's own.
        """
        found = []
        for encoder in self.encoders:
            preprocessing = preprocessing_in(resize_mode, encoder.preprocessing)
            resized = Encoder(encoder.module, preprocessing, encoder.features, encoder.devices)
            found.append(EmbeddingCache(folder, resized).embed(observations, views, rounds))
        if len(found) == 1:
            return found[0]
        photos = [(index, path) for index, observation in enumerate(observations) for path in observation.photos]
        causes = {path: cause for part in found for path, cause in part.unreadable}
        values = []
        for part, scale in zip(found, self.scales, strict=True):
            own = {path for path, _ in part.unreadable}
            is_readable = [path not in causes for _, path in photos if path not in own]
            values.append((part.values[np.array(is_readable, dtype=bool)] * scale).astype(np.float16))
        readable = [index for index, path in photos if path not in causes]
        unreadable = [(path, causes[path]) for _, path in photos if path in causes]
        return PhotoEmbeddings(concatenate_features(values), np.array(readable, dtype=np.int64), unreadable)


def preprocessing_in(resize_mode: str, preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing with another resize mode; "encoder" leaves it as it is."""
    return preprocessing if resize_mode == "encoder" else replace(preprocessing, resize_mode=resize_mode)


def embed_with_run(
    run: Path, observations: Sequence[Observation], views: Sequence[str], folder: Path
) -> PhotoEmbeddings:
    """Embed observations with a run's encoders; `folder` is that of the cache."""
    weights = read_weights(run)
    member = weights.manifest.members[0]
    encoders = tuple(open_encoder(weights.file(spec.file), spec, pick_devices()) for spec in member.encoders)
    return WeightedEncoders(encoders, member.encoder_weights).embed(observations, views, folder)

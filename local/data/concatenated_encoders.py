"""Embed photos with one or several encoders, whose embeddings are concatenated, through the cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kernel.encoders import open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.manifest import Preprocessing, read_weights
from kernel.observations import Observation
from local.data.cache import EmbeddingCache, PhotoEmbeddings
from local.data.stored_embeddings import concatenate_features


@dataclass(frozen=True)
class FeatureBlock:
    """Consecutive features of concatenated embeddings.

    Attributes:
        encoder: the index of the encoder that they are of.
        part: which of an encoder's poolings they are, as the setting `pool_part` names it; empty if it has one pooling.
        features: how many.
    """

    encoder: int
    part: str
    features: int


@dataclass(frozen=True)
class ConcatenatedEncoders:
    """Encoders whose embeddings, each of length 1, are concatenated.

    Args:
        parts: of each encoder, the features of each of its poolings by name, in their order; empty: those of each
            encoder are one part.
    """

    encoders: tuple[Encoder, ...]
    parts: tuple[dict[str, int], ...] = ()

    @property
    def blocks(self) -> tuple[FeatureBlock, ...]:
        """The features of an embedding, in their order."""
        parts = self.parts or tuple({"": encoder.features} for encoder in self.encoders)
        return tuple(
            FeatureBlock(index, name, features) for index, own in enumerate(parts) for name, features in own.items()
        )

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
        values, scale = [], 1 / math.sqrt(len(found))
        for part in found:
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
    return ConcatenatedEncoders(encoders).embed(observations, views, folder)

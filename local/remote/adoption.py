"""Use embeddings that Kaggle has made: an embedding's key has the device and the versions, which differ here.

A kernel computes on Kaggle's GPUs, so these embeddings are nearer to what it will compute than those made here.
"""

from dataclasses import replace
from pathlib import Path

from kernel.encoders import open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.manifest import read_weights
from local.base.files import link_or_copy
from local.data.cache import EmbeddingCache
from local.recipes.settings import CANDIDATES


def cache_keys(run: Path) -> dict[str, str]:
    """The names of the folders in which this machine caches embeddings by a run's encoders.

    Returns:
        By the number of the encoder and the resize mode, such as `0 crop`.
    """
    weights, keys = read_weights(run), {}
    for index, spec in enumerate(weights.manifest.members[0].encoders):
        encoder = open_encoder(weights.file(spec.file), spec, pick_devices())
        for mode in {encoder.preprocessing.resize_mode, *CANDIDATES["resize_mode"]}:
            preprocessing = replace(encoder.preprocessing, resize_mode=mode)
            changed = Encoder(encoder.module, preprocessing, encoder.features, encoder.devices)
            keys[f"{index} {mode}"] = EmbeddingCache(Path(), changed).folder.name
    return keys


def adopt_embeddings(run: Path, cache: Path, theirs: dict[str, str]) -> int:
    """Add Kaggle's embeddings by a run's encoders to those of this machine; returns how many files were added.

    Args:
        theirs: `cache_keys` of the same run on Kaggle.
    """
    added = 0
    for which, key in cache_keys(run).items():
        source = cache / theirs.get(which, key)
        if source.name == key or not source.is_dir():
            continue
        for path in source.rglob("*"):
            target = cache / key / path.relative_to(source)
            if path.is_file() and not target.exists():
                link_or_copy(path, target)
                added += 1
    return added

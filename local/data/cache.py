"""Embed every photo once: a cache on disk by content, encoder, preprocessing and view.

Several processes can share a cache, and one that is killed loses only the last minutes; see `local.data.shards`.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import timm
import torch

from kernel.embeddings import Batch, embed_batches
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.loader import PhotoLoader, count_cores
from kernel.observations import Observation
from kernel.photos import PIXELS_VERSION
from local.base import distributed
from local.base.console import Progress, counted
from local.data.cost import Cost
from local.data.shards import KEY_BYTES, ShardFolder, Table
from local.data.stored_embeddings import Block, StoredEmbeddings

FORMAT = 2  # of the cache: embeddings in another format are in other folders
PART = 4096  # photos between two writes, or
PART_SECONDS = 120.0  # seconds, whichever comes first
DIGESTS = "photos"  # folder of the digests of the photos' bytes
LOOKED_UP = 256  # photos that a thread looks up at once
HASHED = 16_384  # photos between two writes of their digests
IN_MEMORY = 256 << 20  # bytes of embeddings that are read at once, because they are used dozens of times
SETTLED = 2.0  # seconds: a photo that is newer may still change without another time, as times have steps


@dataclass(frozen=True)
class PhotoEmbeddings:
    """The embeddings of the readable photos of some observations.

    Attributes:
        values: (photos, views, features) float16, of length 1; more than IN_MEMORY stay on disk until they are used.
        observations: (photos,) int, the index of each photo's observation.
        unreadable: path and cause of each photo that could not be read.
    """

    values: np.ndarray | StoredEmbeddings
    observations: np.ndarray
    unreadable: list[tuple[Path, str]]


class EmbeddingCache:
    """Embeddings of one encoder.

    Args:
        folder: of the cache, shared by all encoders.
    """

    def __init__(self, folder: Path, encoder: Encoder):
        self.encoder, self.root, self.folder = encoder, folder, folder / encoder_digest(encoder)

    def view(self, view: str) -> ShardFolder:
        """The embeddings of a view, (photos, features), by `content_digest`."""
        return ShardFolder(self.folder / view, self.encoder.features, np.float16)

    def embed(self, observations: Sequence[Observation], views: Sequence[str], rounds: int = 1) -> PhotoEmbeddings:
        """All photos in all views. What the cache lacks is embedded, and added to it.

        Args:
            rounds: how often the photos will be embedded, this time included, for the estimate of the time.

        Raises:
            InputError: what was just embedded is gone again.
        """
        paths = [path for observation in observations for path in observation.photos]
        owners = np.repeat(np.arange(len(observations)), [len(observation.photos) for observation in observations])
        digests = photo_digests(paths, self.root)
        tables, rows = self._find(digests, views)
        # Another run may add some in between, so one process decides for all.
        missing = distributed.broadcast_object(missing_photos(digests, paths, views, rows))
        causes: dict[bytes, str] = {}
        for group, photos in missing.items():
            causes |= distributed.all_gather_dict(self._fill(photos, group, rounds))
        distributed.barrier()
        if missing:
            tables, rows = self._find(digests, views)
        is_readable = (rows >= 0).all(axis=1)
        unreadable = [(paths[photo], causes.get(digests[photo].tobytes())) for photo in np.flatnonzero(~is_readable)]
        gone = sum(cause is None for _, cause in unreadable)
        if gone:
            raise InputError(f"{self.folder} lost the embeddings of {counted(gone, 'photo')}: run the same again")
        block = Block(tuple(tables), rows[is_readable], self.encoder.features)
        values = StoredEmbeddings([block])
        is_small = np.prod(values.shape) * values.dtype.itemsize <= IN_MEMORY
        return PhotoEmbeddings(np.asarray(values) if is_small else values, owners[is_readable], unreadable)

    def _find(self, digests: np.ndarray, views: Sequence[str]) -> tuple[list[Table], np.ndarray]:
        """The table of each view, and the row of each photo in it, (photos, views); -1 for one that is missing."""
        tables = [self.view(view).read() for view in views]
        return tables, np.stack([table.find(digests) for table in tables], axis=1)

    def _fill(self, missing: dict[bytes, Path], views: Sequence[str], rounds: int) -> dict[bytes, str]:
        """Embed the missing photos. Under torchrun, every process embeds some of them.

        Returns:
            The cause for each photo that this process could not read, by digest.
        """
        rank, world = distributed.rank_and_world_size()
        digests = list(missing)[rank::world]
        cost = Cost(len(digests), views, self.encoder, rounds)
        cost.start()
        writer = PartWriter([self.view(view) for view in views])
        with (
            PhotoLoader.for_encoder([missing[digest] for digest in digests], self.encoder) as loader,
            Progress(f"embedding in {counted(len(views), 'view')}", len(digests), "photo") as bar,
        ):
            batches = (Batch(photos, pixels, views) for photos, pixels in loader.batches(self.encoder))
            for batch, embedded in embed_batches(self.encoder, batches):
                writer.add([digests[photo] for photo in batch.photos], embedded.half().numpy())
                bar.advance(len(batch.photos))
                cost.advance(len(batch.photos))
        writer.close()
        digest_of = {missing[digest]: digest for digest in digests}
        return {digest_of[path]: cause for path, cause in loader.unreadable}


class PartWriter:
    """Collects the embeddings of photos, and writes them every few minutes, a file per view.

    Args:
        folders: one per view.
    """

    def __init__(self, folders: Sequence[ShardFolder]):
        self.folders, self.digests, self.values, self.written = folders, [], [], time.monotonic()

    def add(self, digests: list[bytes], values: np.ndarray) -> None:
        """Add photos, with (photos, views, features)."""
        self.digests += digests
        self.values.append(values)
        if len(self.digests) >= PART or time.monotonic() - self.written >= PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what was added."""
        if self.digests:
            keys, values = as_keys(self.digests), np.concatenate(self.values)
            for column, folder in enumerate(self.folders):
                folder.add(keys, values[:, column])
        self.digests, self.values, self.written = [], [], time.monotonic()

    def close(self) -> None:
        """Write the rest, and join the files into large ones."""
        self.write()
        for folder in self.folders:
            folder.join()


def missing_photos(
    digests: np.ndarray, paths: Sequence[Path], views: Sequence[str], rows: np.ndarray
) -> dict[tuple[str, ...], dict[bytes, Path]]:
    """The photos to embed, by the views in which they are missing.

    Args:
        digests: (photos, 32).
        rows: (photos, views), -1 for one that is missing.
    """
    groups: dict[tuple[str, ...], dict[bytes, Path]] = {}
    for photo in np.flatnonzero((rows < 0).any(axis=1)):
        lacking = tuple(view for view, row in zip(views, rows[photo], strict=True) if row < 0)
        groups.setdefault(lacking, {})[digests[photo].tobytes()] = paths[photo]
    return groups


def as_keys(digests: Sequence[bytes]) -> np.ndarray:
    """(digests, 32) uint8."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)


def photo_digests(paths: Sequence[Path], folder: Path) -> np.ndarray:
    """`content_digest` of each photo, (photos, 32) uint8. Under torchrun, every process reads some of the photos.

    A photo whose path, size and time of change are known is not read again.

    Args:
        folder: of the cache.
    """
    rank, world = distributed.rank_and_world_size()
    parts = distributed.all_gather_dict({rank: own_photo_digests(paths[rank::world], folder)})
    digests = np.empty((len(paths), KEY_BYTES), dtype=np.uint8)
    for number, part in parts.items():
        digests[number::world] = part
    return digests


def own_photo_digests(paths: Sequence[Path], folder: Path) -> np.ndarray:
    """The part of `photo_digests` that this process looks up."""
    known = ShardFolder(folder / DIGESTS, KEY_BYTES, np.uint8)
    with ThreadPoolExecutor(count_cores()) as threads:
        with Progress("looking up photos in the cache", len(paths), "photo") as bar:
            keys = []
            for part in threads.map(file_keys, split(paths, LOOKED_UP)):
                keys += part
                bar.advance(len(part))
        keys, table = as_keys(keys), known.read()
        rows = table.find(keys)
        digests, is_known = np.empty_like(keys), rows >= 0
        digests[is_known] = table.read(rows[is_known])
        unknown = np.flatnonzero(~is_known)
        if not len(unknown):
            return digests
        with Progress("reading new photos", len(unknown), "photo") as bar:
            for part in split(unknown, HASHED):
                read = []
                for own in threads.map(content_digests, split([paths[photo] for photo in part], LOOKED_UP)):
                    read += own
                    bar.advance(len(own))
                digests[part] = as_keys(read)
                settled = part[[is_settled(paths[photo]) for photo in part]]
                known.add(keys[settled], digests[settled])
    known.join()
    return digests


def split(items: Sequence, size: int) -> list[Sequence]:
    """Consecutive parts of at most `size`."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def file_keys(paths: Sequence[Path]) -> list[bytes]:
    """A digest of the path, the size and the time of change of each photo; of the path alone if it is missing."""
    keys = []
    for path in paths:
        name = os.path.abspath(path)
        try:
            status = os.stat(name)
            name += f"\0{status.st_size}\0{status.st_mtime_ns}"
        except (OSError, ValueError):
            pass
        keys.append(hashlib.sha256(os.fsencode(name)).digest())
    return keys


def is_settled(path: Path) -> bool:
    """Whether a change of this photo from now on would change its time too."""
    try:
        return abs(time.time() - path.stat().st_mtime) > SETTLED
    except (OSError, ValueError):
        return False


def content_digests(paths: Sequence[Path]) -> list[bytes]:
    """`content_digest` of each photo; of many in one thread, because a thread for each would take longer than most."""
    return [content_digest(path) for path in paths]


def content_digest(path: Path) -> bytes:
    """SHA-256 of a photo's bytes, or of its path if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except (OSError, ValueError):
        return hashlib.sha256(os.fsencode(path)).digest()


def encoder_digest(encoder: Encoder) -> str:
    """SHA-256 of all that an embedding depends on, except for the photo and the view.

    These are the weights with their types, the layers, the preprocessing, the type of device and library versions.
    """
    digest = hashlib.sha256()
    for name, value in encoder.module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    how = {**asdict(encoder.preprocessing), "device": encoder.device.type, "module": str(encoder.module)}
    how |= {
        "format": FORMAT,
        "pixels": PIXELS_VERSION,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }
    global_pool = getattr(getattr(encoder.module, "trunk", encoder.module), "global_pool", None)
    if isinstance(global_pool, str):  # of timm's transformers; str(module) does not show it
        how["global_pool"] = global_pool
    if type(encoder.module).__module__.startswith("open_clip"):
        how["open_clip"] = version("open_clip_torch")
    digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()[:32]

"""Embed every photo once: a cache on disk by content, encoder, preprocessing and view.

Every part that was embedded is a file of its own, written in one step under a unique name. So several processes can
share a cache, and one that is killed loses only the part that it was working on.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kernel.embeddings import Batch, embed_batches
from kernel.encoders import Encoder
from kernel.loader import PhotoLoader, count_cores
from kernel.observations import Observation
from kernel.photos import PIXELS_VERSION
from local.base import distributed
from local.base.console import Progress, counted, progress
from local.data.cost import Cost

PART = 256  # photos between two writes


@dataclass(frozen=True)
class PhotoEmbeddings:
    """The embeddings of the readable photos of some observations.

    Attributes:
        values: (photos, views, features) float16, of length 1.
        observations: (photos,) int, the index of each photo's observation.
        unreadable: path and cause of each photo that could not be read.
    """

    values: np.ndarray
    observations: np.ndarray
    unreadable: list[tuple[Path, str]]


class EmbeddingCache:
    """Embeddings of one encoder.

    Args:
        folder: of the cache, shared by all encoders.
    """

    def __init__(self, folder: Path, encoder: Encoder):
        self.encoder, self.folder = encoder, folder / encoder_digest(encoder)

    def embed(self, observations: Sequence[Observation], views: Sequence[str], rounds: int = 1) -> PhotoEmbeddings:
        """All photos in all views. What the cache lacks is embedded, and added to it.

        Args:
            rounds: how often the photos will be embedded, this time included, for the estimate of the time.
        """
        photos = [(index, path) for index, observation in enumerate(observations) for path in observation.photos]
        with ThreadPoolExecutor(count_cores()) as threads:
            each = threads.map(content_digest, (path for _, path in photos))
            digests = list(progress(each, "looking up photos in the cache", len(photos), "photo"))
        known = {view: self._read(view) for view in views}
        missing = {
            digest: path
            for digest, (_, path) in zip(digests, photos, strict=True)
            if any(digest not in known[view] for view in views)
        }
        missing = distributed.broadcast_object(missing)  # another run may have added some in between
        causes = distributed.all_gather_dict(self._fill(missing, views, known, rounds)) if missing else {}
        if distributed.rank_and_world_size()[1] > 1:
            distributed.barrier()
            known = {view: self._read(view) for view in views}
        readable = [
            (digest, index)
            for digest, (index, _) in zip(digests, photos, strict=True)
            if all(digest in known[view] for view in views)
        ]
        values = np.empty((len(readable), len(views), self.encoder.features), dtype=np.float16)
        for column, view in enumerate(views):
            for row, (digest, _) in enumerate(readable):
                values[row, column] = known[view][digest]
        return PhotoEmbeddings(
            values,
            np.array([index for _, index in readable], dtype=np.int64),
            [(path, causes[digest]) for digest, (_, path) in zip(digests, photos, strict=True) if digest in causes],
        )

    def _fill(
        self, missing: dict[str, Path], views: Sequence[str], known: dict[str, dict], rounds: int
    ) -> dict[str, str]:
        """Embed the missing photos. Under torchrun, every process embeds some of them.

        Returns:
            The cause for each photo that this process could not read, by digest.
        """
        (rank, world), found = distributed.rank_and_world_size(), {}
        digests = list(missing)[rank::world]
        cost = Cost(len(digests), views, self.encoder, rounds)
        cost.start()
        with (
            PhotoLoader.for_encoder([missing[digest] for digest in digests], self.encoder) as loader,
            Progress(f"embedding in {counted(len(views), 'view')}", len(digests), "photo") as bar,
        ):
            batches = (Batch(photos, pixels, views) for photos, pixels in loader.batches(self.encoder))
            for batch, embedded in embed_batches(self.encoder, batches):
                rows = embedded.half().numpy()
                found |= {digests[photo]: row for photo, row in zip(batch.photos, rows, strict=True)}
                bar.advance(len(batch.photos))
                cost.advance(len(batch.photos))
                if len(found) >= PART:
                    self._add(found, views, known)
                    found = {}
            self._add(found, views, known)
        digest_of = {missing[digest]: digest for digest in digests}
        return {digest_of[path]: cause for path, cause in loader.unreadable}

    def _add(self, found: dict[str, np.ndarray], views: Sequence[str], known: dict[str, dict]) -> None:
        """Write the (views, features) embeddings of photos, by digest."""
        for column, view in enumerate(views):
            rows = {digest: row[column] for digest, row in found.items()}
            known[view] |= rows
            self._write(view, rows)

    def _write(self, view: str, rows: dict[str, np.ndarray]) -> None:
        if not rows:
            return
        folder = self.folder / view
        folder.mkdir(parents=True, exist_ok=True)
        digests = np.array([list(bytes.fromhex(digest)) for digest in rows], dtype=np.uint8)
        partial = folder / f".{uuid.uuid4().hex}.partial"
        try:
            save_file({"photos": digests, "values": np.stack(list(rows.values()))}, partial)
            os.replace(partial, folder / f"{partial.stem[1:]}.safetensors")
        finally:
            partial.unlink(missing_ok=True)  # after an error, such as a full disk

    def _read(self, view: str) -> dict[str, np.ndarray]:
        """The embeddings of a view, by digest; without files that are damaged, whose photos are embedded again."""
        rows: dict[str, np.ndarray] = {}
        for path in sorted((self.folder / view).glob("*.safetensors")):
            try:
                part = load_file(path)
                photos, values = part["photos"], part["values"]
            except (SafetensorError, OSError, KeyError):
                continue
            if values.shape != (len(photos), self.encoder.features):
                continue
            digests = [row.tobytes().hex() for row in photos]
            rows |= {digest: row for digest, row in zip(digests, values, strict=True) if digest not in rows}
        return rows


def content_digest(path: Path) -> str:
    """SHA-256 of a photo's bytes, or of its path if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return hashlib.sha256(str(path).encode()).hexdigest()


def encoder_digest(encoder: Encoder) -> str:
    """SHA-256 of all that an embedding depends on, except for the photo and the view.

    These are the weights with their types, the layers, the preprocessing, the type of device and library versions.
    """
    digest = hashlib.sha256()
    for name, value in encoder.module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    how = {**asdict(encoder.preprocessing), "device": encoder.device.type, "module": str(encoder.module)}
    how |= {"pixels": PIXELS_VERSION, "torch": torch.__version__, "timm": timm.__version__, "pillow": PIL.__version__}
    global_pool = getattr(getattr(encoder.module, "trunk", encoder.module), "global_pool", None)
    if isinstance(global_pool, str):  # of timm's transformers; str(module) does not show it
        how["global_pool"] = global_pool
    if type(encoder.module).__module__.startswith("open_clip"):
        how["open_clip"] = version("open_clip_torch")
    digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()[:32]

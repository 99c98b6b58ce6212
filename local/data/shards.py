"""Rows of numbers by key, in a folder of memory-mapped files that several processes may read and write at once.

A file is a safetensors file of `keys`, (rows, 32) uint8, and `values`, (rows, width). It is written in one step under a
unique name and never changed, so a process that is killed loses only what it has not written yet. Small files are
joined into large ones by one process at a time; a file that another process still reads stays mapped there.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

KEY_BYTES = 32  # of a SHA-256
SHARD = 65_536  # rows from which a file is large: 100 MB with 768 features in half precision
PARTS = 32  # small files that a process writes before it joins them
ABANDONED = 24 * 3600  # seconds after which an unfinished file is that of a killed process
TYPES = {"F16": np.dtype("<f2"), "U8": np.dtype("u1")}


@dataclass(frozen=True, eq=False)
class Shard:
    """One file: (rows, 32) uint8 keys and (rows, width) values, both memory-mapped."""

    path: Path
    keys: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def map_shard(path: Path, width: int, dtype: np.dtype) -> Shard | None:
    """Map a file into memory; None if it is damaged, or holds something else."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)[8 + size :]
        arrays = {}
        for name in ("keys", "values"):
            start, end = header[name]["data_offsets"]
            arrays[name] = data[start:end].view(TYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return None
    keys, values = arrays["keys"], arrays["values"]
    is_whole = keys.dtype == np.uint8 and keys.shape == (len(values), KEY_BYTES)
    return Shard(path, keys, values) if is_whole and values.shape[1:] == (width,) and values.dtype == dtype else None


class Table:
    """The rows of some shards.

    Args:
        shards: of which the first one that has a key counts.
        width, dtype: of their values.
    """

    def __init__(self, shards: list[Shard], width: int, dtype: np.dtype):
        self.shards, self.width, self.dtype = shards, width, dtype
        self.starts = np.cumsum([0, *map(len, shards)])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each of (keys, 32) uint8, (keys,) int64; -1 for one that is not there."""
        if not self.starts[-1]:
            return np.full(len(keys), -1)
        known = np.concatenate([shard.keys for shard in self.shards])
        # By their first 8 bytes, which are random, sorting and searching take a tenth of the time.
        first, wanted = (np.ascontiguousarray(each[:, :8]).view("<u8")[:, 0] for each in (known, keys))
        order = np.argsort(first)
        if (np.diff(first[order]) == 0).any():
            order = np.argsort(first, kind="stable")  # so that the first shard that has a key counts
        # In order, because a search in random order would wait for memory, and ever longer in a larger table.
        in_order, rows = np.argsort(wanted), np.empty(len(wanted), dtype=np.int64)
        rows[in_order] = order[np.minimum(np.searchsorted(first[order], wanted[in_order]), len(order) - 1)]
        return np.where((known[rows] == keys).all(axis=1), rows, -1)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(rows, width) the values of some rows."""
        values = np.empty((len(rows), self.width), dtype=self.dtype)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards):
            own = shards == shard
            values[own] = self.shards[shard].values[rows[own] - self.starts[shard]]
        return values


class ShardFolder:
    """A folder of shards.

    Args:
        width, dtype: of the values. Files with others are ignored.
    """

    def __init__(self, folder: Path, width: int, dtype: type):
        self.folder, self.width, self.dtype, self.added = folder, width, np.dtype(dtype), 0

    def read(self) -> Table:
        """All rows that are there now."""
        with self._lock(is_shared=True):
            return Table(self._shards(), self.width, self.dtype)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Write (rows, 32) uint8 keys and their (rows, width) values."""
        if not len(keys):
            return
        self._write(keys, values)
        self.added += 1
        if self.added >= PARTS:
            self.join()

    def join(self) -> None:
        """Join small files into large ones, unless another process is about to."""
        self.added = 0
        with self._lock() as is_ours:
            if not is_ours:
                return
            for path in self.folder.glob(".*.partial"):
                with suppress(FileNotFoundError):  # it has just been finished
                    if time.time() - path.stat().st_mtime > ABANDONED:
                        path.unlink()
            shards = self._shards()
            small, large = ([one for one in shards if (len(one) < SHARD) is is_small] for is_small in (True, False))
            joined: list[Shard] = []
            for shard in small if len(small) > 1 else ():
                joined.append(shard)
                if sum(map(len, joined)) >= SHARD:
                    large += self._replace(joined, Table(large, self.width, self.dtype))
                    joined = []
            if len(joined) > 1:
                self._replace(joined, Table(large, self.width, self.dtype))

    def _replace(self, shards: list[Shard], known: Table) -> list[Shard]:
        """Join some shards into one, without repeated keys and those that are known, and remove them."""
        keys = np.concatenate([shard.keys for shard in shards])
        distinct = np.sort(np.unique(keys.view(f"S{KEY_BYTES}"), return_index=True)[1])
        kept = distinct[known.find(keys[distinct]) < 0]
        path = None
        if len(kept):
            path = self._write(keys[kept], np.concatenate([shard.values for shard in shards])[kept])
        for shard in shards:
            shard.path.unlink(missing_ok=True)
        return [one for one in (map_shard(path, self.width, self.dtype) if path else None,) if one]

    def _write(self, keys: np.ndarray, values: np.ndarray) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        # In order of time, so that photos that follow one another are read from one part of the disk.
        path = self.folder / f"{time.time_ns():020}-{uuid.uuid4().hex}.safetensors"
        partial = path.with_name(f".{path.stem}.partial")
        try:
            save_file({"keys": np.ascontiguousarray(keys), "values": np.ascontiguousarray(values, self.dtype)}, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # after an error, such as a full disk
        return path

    def _shards(self) -> list[Shard]:
        """The files that are there, without damaged ones, whose rows are written again."""
        paths = sorted(path for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))
        found = (map_shard(path, self.width, self.dtype) for path in paths)
        return [shard for shard in found if shard]

    @contextmanager
    def _lock(self, is_shared: bool = False) -> Iterator[bool]:
        """Whether this process has the lock: alone, if no other has it now; or shared, after waiting for it.

        Files are removed by a process that has it alone. Where there are no locks, files are never removed.
        """
        try:
            import fcntl

            file = (self.folder / ".lock").open("a")
        except (ImportError, OSError):  # on Windows, or without a folder that can be written
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True  # the lock ends with the file, also if the process is killed

"""Embeddings that stay on disk until they are needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from local.data.shards import Table


@dataclass(frozen=True, eq=False)
class Block:
    """The embeddings of one encoder.

    Attributes:
        tables: one per view.
        rows: (photos, views) int, the row of each photo in the table of each view.
        features: the first so many are used.
        weight: their factor.
    """

    tables: tuple[Table, ...]
    rows: np.ndarray
    features: int
    weight: float = 1.0

    def read(self, out: np.ndarray) -> None:
        """Read into (photos, views, features)."""
        for column, table in enumerate(self.tables):
            values = table.read(self.rows[:, column])[:, : self.features]
            out[:, column] = values if self.weight == 1 else values * np.float64(self.weight)


class StoredEmbeddings:
    """(photos, views, features) numbers on disk, of which `numpy.asarray` reads what an index has left.

    An index selects photos, views and the first features as in numpy, such as `values[is_reference]`, `values[:, 0]` or
    `values[:100, [0, 2], :64]`, and reads nothing: it gives the same kind of object. Only an index with a number, which
    removes an axis, reads what is left. At most one axis may be indexed with an array at a time.

    Args:
        blocks: of one or several encoders, whose features are concatenated.
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = tuple(blocks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(photos, views, features)."""
        return (*self.blocks[0].rows.shape, sum(block.features for block in self.blocks))

    @property
    def dtype(self) -> np.dtype:
        """float16, as on disk."""
        return np.dtype(np.float16)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        values, first = np.empty(self.shape, dtype=self.dtype), 0
        for block in self.blocks:
            block.read(values[:, :, first : first + block.features])
            first += block.features
        return values if dtype is None else values.astype(dtype, copy=False)

    def astype(self, dtype: type) -> "StoredEmbeddings | np.ndarray":
        """These, if that is their precision already; otherwise all of them in memory."""
        return self if np.dtype(dtype) == self.dtype else np.asarray(self, dtype=dtype)

    def __mul__(self, factor: float) -> "StoredEmbeddings":
        """These times a number, rounded to half precision when they are read."""
        return StoredEmbeddings([replace(block, weight=block.weight * float(factor)) for block in self.blocks])

    def __getitem__(self, index) -> "StoredEmbeddings | np.ndarray":
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (3 - len(index))
        if sum(not isinstance(each, slice | int | np.integer) for each in index) > 1:
            raise TypeError("expected an array as the index of at most one axis: index one axis after another")
        removed = tuple(0 if isinstance(each, int | np.integer) else slice(None) for each in index)
        photos, views, features = ([each] if isinstance(each, int | np.integer) else each for each in index)
        columns = np.arange(self.shape[1])[views]
        selected = StoredEmbeddings(
            [
                replace(block, tables=tuple(block.tables[one] for one in columns), rows=block.rows[photos][:, views])
                for block in self._first_features(features).blocks
            ]
        )
        return np.asarray(selected)[removed] if 0 in removed else selected

    def _first_features(self, features: slice) -> "StoredEmbeddings":
        if not isinstance(features, slice) or features.indices(self.shape[2])[::2] != (0, 1):
            raise TypeError(f"expected the first features as [:, :, :count], got {features!r}")
        left, blocks = features.indices(self.shape[2])[1], []
        for block in self.blocks:
            if left > 0:
                blocks.append(replace(block, features=min(left, block.features)))
            left -= block.features
        return StoredEmbeddings(blocks)


def concatenate_features(parts: Sequence[np.ndarray | StoredEmbeddings]) -> np.ndarray | StoredEmbeddings:
    """The features of several encoders, for the same photos and views; nothing is read if all are on disk."""
    if not all(isinstance(part, StoredEmbeddings) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts], axis=2)
    if len({part.shape[:2] for part in parts}) > 1:
        raise ValueError("expected the same photos and views of each encoder")
    return StoredEmbeddings([block for part in parts for block in part.blocks])

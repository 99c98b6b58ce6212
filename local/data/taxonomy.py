"""The ranks above the species, and which classes are related."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taxonomy:
    """The coarser groups of each class; a class whose groups are unknown is alone in its own.

    Attributes:
        genus, family: (classes,) int.
    """

    genus: np.ndarray
    family: np.ndarray

    @classmethod
    def unknown(cls, classes: int) -> "Taxonomy":
        """Of classes without groups."""
        return cls(np.arange(classes), np.arange(classes))

"""Which classes are related."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taxonomy:
    """The genus and the family of each class. A class without one is alone in a group of its own.

    Attributes:
        genus, family: (classes,) int.
    """

    genus: np.ndarray
    family: np.ndarray

    @classmethod
    def unknown(cls, classes: int) -> "Taxonomy":
        """Of classes that have no relatives."""
        return cls(np.arange(classes), np.arange(classes))

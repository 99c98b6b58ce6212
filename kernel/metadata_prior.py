"""The metadata prior: what place, season and substrate say of an observation's class, whatever its photos show.

Fitted by `local/banks/metadata_prior.py`, which applies it through this module too. It reads only what the test table
says, and cannot fail a run: a value that is blank, malformed or unknown says nothing, and a table without these columns
switches it off.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from kernel.manifest import Member, Weights
from kernel.observations import Observation
from kernel.tables import clean_id, names_nothing

CELL = (0.05, 0.0875)  # degrees of latitude and longitude: 5.6 km either way in Denmark
DAYS_IN_DEKAD = 10  # a third of a month, the climatologists' unit; the last one has the rest of the month


def finite(text: str) -> float:
    """A number, "2023.0" and " 7 " included.

    Raises:
        ValueError: it is none, or not a finite one.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def category(column: str) -> Callable[[Mapping[str, str]], str | None]:
    """A feature that is a column's text, spelt one way."""

    def read(metadata: Mapping[str, str]) -> str | None:
        value = clean_id(metadata[column].casefold())
        return None if names_nothing(value) else value

    return read


def dekad(metadata: Mapping[str, str]) -> str | None:
    """The third of a month, from 0 to 35; its middle one where only the month is known."""
    month = finite(metadata["month"])
    if month not in range(1, 13):
        return None
    try:
        day = finite(metadata["day"])
    except (KeyError, ValueError):
        day = 15
    day = day if 1 <= day <= 31 else 15
    return str(int(month - 1) * 3 + min(int(day - 1) // DAYS_IN_DEKAD, 2))


def elevation_step(metadata: Mapping[str, str]) -> str | None:
    """Metres above the sea in steps of half an octave: a few metres matter on the coast, not on a mountain."""
    metres = finite(metadata["elevation"])
    return str(round(2 * math.log2(1 + max(metres, 0)))) if -500 <= metres <= 9000 else None


def place_cell(metadata: Mapping[str, str]) -> str | None:
    """The cell of the grid in which the coordinates lie, as "row,column"."""
    latitude, longitude = finite(metadata["latitude"]), finite(metadata["longitude"])
    if abs(latitude) > 90 or abs(longitude) > 180:
        return None
    return f"{math.floor(latitude / CELL[0])},{math.floor(longitude / CELL[1])}"


# Each takes an observation's metadata to a discrete value, or to None, or raises where it cannot.
FEATURES: dict[str, Callable[[Mapping[str, str]], str | None]] = {
    "habitat": category("habitat"),
    "substrate": category("substrate"),
    "meta-substrate": category("metaSubstrate"),
    "country": category("countryCode"),
    "district": category("district"),
    "biogeographical region": category("biogeographicalRegion"),
    "landcover": category("landcover"),
    "season": dekad,
    "elevation": elevation_step,
    "place": place_cell,
}


def feature_value(feature: str, metadata: Mapping[str, str]) -> str | None:
    """The value of a feature, or None where the metadata do not say.

    As with photos, whatever is wrong with a cell of a hidden table is that cell's misfortune: the guard is wide.
    """
    try:
        return FEATURES[feature](metadata)
    except Exception:
        return None


@dataclass(frozen=True)
class Prior:
    """Log-linear pool of what each feature says of the classes: naive Bayes with a weight per feature.

    Attributes:
        classes: (classes,) log-probabilities before any metadata: by number and recency of observations.
        values: of each feature the values that are known, in the order of its table's rows.
        tables: of each feature (values, classes), its weight times log p(value | class) / p(value).
    """

    classes: torch.Tensor
    values: Mapping[str, Sequence[str]]
    tables: Mapping[str, torch.Tensor]

    def rows(self, observations: Sequence[Observation]) -> dict[str, torch.Tensor]:
        """Of each feature (observations,) int64 rows of its table; -1 where the value is absent or unknown."""
        found = {}
        for feature, values in self.values.items():
            place = {value: row for row, value in enumerate(values)}
            read = [place.get(feature_value(feature, observation.metadata), -1) for observation in observations]
            found[feature] = torch.tensor(read, dtype=torch.long)
        return found

    def log_likelihoods(self, observations: Sequence[Observation]) -> torch.Tensor:
        """(observations, classes) weighted log p(metadata | class), up to a constant per observation.

        A row of zeros where nothing is known: added to other scores, it changes no ranking.
        """
        total = torch.zeros(len(observations), len(self.classes), dtype=self.classes.dtype)
        for feature, rows in self.rows(observations).items():
            known = rows >= 0
            total[known] += self.tables[feature][rows[known]]
        return total

    def log_probabilities(self, observations: Sequence[Observation]) -> torch.Tensor | None:
        """(observations, classes) log p(class | metadata), or None where no observation has a known value.

        An observation without one, among others that have some, gets `classes`.
        """
        if not any((rows >= 0).any() for rows in self.rows(observations).values()):
            return None
        return (self.classes + self.log_likelihoods(observations)).log_softmax(dim=1)


def read_prior(path: Path) -> Prior:
    """A prior from its safetensors file; the features' values are JSON in the file's header."""
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["values"])
        tables = {feature: file.get_tensor(feature) for feature in values}
        return Prior(file.get_tensor("classes"), values, tables)


def weighted_prior(
    weights: Weights, members: Sequence[Member], observations: Sequence[Observation]
) -> torch.Tensor | None:
    """(observations, classes) to add to an ensemble's log-probabilities; None without metadata, or where it fails.

    Args:
        members: those of the ensemble.
    """
    try:
        said = [
            (member.weight * member.metadata_prior_weight, read_prior(weights.file(member.metadata_prior)))
            for member in members
            if member.metadata_prior
        ]
        priors = [(weight, prior.log_probabilities(observations)) for weight, prior in said]
        known = [weight * prior for weight, prior in priors if prior is not None]
        return sum(known) if known else None
    except Exception as error:  # whatever a hidden table holds, the photos are left
        print(f"the metadata are left out: {error!r}", flush=True)
        return None


def fused(log_probabilities: torch.Tensor, prior: torch.Tensor | None, weight: float) -> torch.Tensor:
    """log p(class | photos) + weight * log p(class | metadata), unnormalised; the former alone without a prior.

    Args:
        log_probabilities: (observations, classes) of the photos.
        prior: (observations, classes) of the metadata.
    """
    return log_probabilities if prior is None else log_probabilities + weight * prior

"""The metadata prior: the probability of each class given location, season and substrate, whatever the photos show.

`local/banks/metadata_prior.py` fits it. The prior reads only columns of the test table, and cannot fail a run: a value
that is blank, malformed or unknown is ignored, and a table without these columns switches the prior off.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from kernel.manifest import Member, Weights
from kernel.observations import Observation
from kernel.tables import clean_id, names_nothing

CELL = (0.05, 0.0875)  # degrees of latitude and longitude: 5.6 km by 5.6 km in Denmark
DAYS_IN_DEKAD = 10  # a third of a month, as in climatology; the last one has the rest of the month


def parse_number(text: str) -> float:
    """A number, such as "2023.0" or " 7 ".

    Raises:
        ValueError: the text is not a number, or not a finite one.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def category(column: str) -> Callable[[Mapping[str, str]], str | None]:
    """A feature that is a column's text, in lower case."""

    def read(metadata: Mapping[str, str]) -> str | None:
        value = clean_id(metadata[column].casefold())
        return None if names_nothing(value) else value

    return read


def rounded(column: str) -> Callable[[Mapping[str, str]], str | None]:
    """A feature that is a column's number to one digit, such as "0.3" or "2e+02"."""
    return lambda metadata: f"{parse_number(metadata[column]):.1g}"


def dekad(metadata: Mapping[str, str]) -> str | None:
    """The third of a month, from 0 to 35; the middle one where only the month is known."""
    month = parse_number(metadata["month"])
    if month not in range(1, 13):
        return None
    try:
        day = parse_number(metadata["day"])
    except (KeyError, ValueError):
        day = 15
    day = day if 1 <= day <= 31 else 15
    return str(int(month - 1) * 3 + min(int(day - 1) // DAYS_IN_DEKAD, 2))


def elevation_step(metadata: Mapping[str, str]) -> str | None:
    """Metres above the sea in logarithmic steps: a few metres matter at the coast, not on a mountain."""
    metres = parse_number(metadata["elevation"])
    return str(round(2 * math.log2(1 + max(metres, 0)))) if -500 <= metres <= 9000 else None


def location_cell(metadata: Mapping[str, str]) -> str | None:
    """The cell of a regular grid that contains the coordinates, as "row,column"."""
    latitude, longitude = parse_number(metadata["latitude"]), parse_number(metadata["longitude"])
    if abs(latitude) > 90 or abs(longitude) > 180:
        return None
    return f"{math.floor(latitude / CELL[0])},{math.floor(longitude / CELL[1])}"


# Each maps an observation's metadata to a discrete value or to None, or raises an error.
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
    "location": location_cell,
}
COLUMN_FEATURES = {"text": category, "number": rounded}  # of other columns, as in "text storage"


def read_feature(feature: str) -> Callable[[Mapping[str, str]], str | None]:
    """The function of a feature, which maps an observation's metadata to a discrete value.

    Raises:
        KeyError: there is no such feature.
    """
    kind, _, column = feature.partition(" ")
    return FEATURES[feature] if feature in FEATURES else COLUMN_FEATURES[kind](column)


def feature_value(feature: str, metadata: Mapping[str, str]) -> str | None:
    """The value of a feature, or None where the metadata do not give one.

    Any error counts as None: a malformed cell of the hidden test table must cost no more than its own feature.
    """
    try:
        return read_feature(feature)(metadata)
    except Exception:
        return None


@dataclass(frozen=True)
class MetadataPrior:
    """Naive Bayes with a weight per feature.

    Attributes:
        classes: (classes,) log-probabilities without any metadata, by number and recency of observations.
        values: the known values of each feature, in the order of its table's rows.
        tables: for each feature (values, classes), its weight times log(p(value | class) / p(value)).
    """

    classes: torch.Tensor
    values: Mapping[str, Sequence[str]]
    tables: Mapping[str, torch.Tensor]

    def rows(self, observations: Sequence[Observation]) -> dict[str, torch.Tensor]:
        """For each feature (observations,) int64 rows of its table; -1 where the value is missing or unknown."""
        found = {}
        for feature, values in self.values.items():
            row_of = {value: row for row, value in enumerate(values)}
            rows = [row_of.get(feature_value(feature, observation.metadata), -1) for observation in observations]
            found[feature] = torch.tensor(rows, dtype=torch.long)
        return found

    def log_likelihoods(self, observations: Sequence[Observation]) -> torch.Tensor:
        """(observations, classes) weighted log p(metadata | class), up to a constant per observation.

        The row of an observation without a known value is zero.
        """
        return self.sum_tables(self.rows(observations), len(observations))

    def log_probabilities(self, observations: Sequence[Observation]) -> torch.Tensor | None:
        """(observations, classes) log p(class | metadata), or None where no observation has a known value.

        If some observations have a known value, the others get `classes`.
        """
        rows = self.rows(observations)
        if not has_known_value(rows):
            return None
        return (self.classes + self.sum_tables(rows, len(observations))).log_softmax(dim=1)

    def sum_tables(self, rows: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
        """The `log_likelihoods` of `count` observations from their `rows`."""
        total = torch.zeros(count, len(self.classes), dtype=self.classes.dtype, device=self.classes.device)
        for feature, own in rows.items():
            is_known = own >= 0
            total[is_known] += self.tables[feature][own[is_known]]
        return total


def has_known_value(rows: Mapping[str, torch.Tensor]) -> bool:
    """Whether any observation has a known value of any feature, by `MetadataPrior.rows`."""
    return any(bool((own >= 0).any()) for own in rows.values())


@dataclass(frozen=True)
class WeightedPrior:
    """The weighted sum of the log-probabilities of priors, for some observations.

    They are computed for a slice of the observations at a time, `prior[first:last]`, since all of them would take as
    much memory as the scores of all observations.

    Attributes:
        terms: of each prior its weight, itself, and its `rows` for the observations.
    """

    terms: tuple[tuple[float, MetadataPrior, Mapping[str, torch.Tensor]], ...]

    def to(self, device: torch.device) -> "WeightedPrior":
        """The same on a device."""
        terms = []
        for weight, prior, rows in self.terms:
            tables = {feature: table.to(device) for feature, table in prior.tables.items()}
            moved = replace(prior, classes=prior.classes.to(device), tables=tables)
            terms.append((weight, moved, {feature: own.to(device) for feature, own in rows.items()}))
        return WeightedPrior(tuple(terms))

    def __getitem__(self, chunk: slice) -> torch.Tensor:
        """(observations of the chunk, classes)."""
        terms = []
        for weight, prior, rows in self.terms:
            own = {feature: each[chunk] for feature, each in rows.items()}
            count = len(next(iter(own.values())))
            terms.append(weight * (prior.classes + prior.sum_tables(own, count)).log_softmax(dim=1))
        return sum(terms)


def read_prior(path: Path) -> MetadataPrior:
    """A prior from its safetensors file. The values of the features are JSON in the header of the file.

    Raises:
        ValueError: a feature is unknown, as in a file of another version.
    """
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["values"])
        unknown = sorted(one for one in values if one not in FEATURES and one.partition(" ")[0] not in COLUMN_FEATURES)
        if unknown:
            raise ValueError(f"{path} has the unknown feature {unknown[0]!r}: train again")
        tables = {feature: file.get_tensor(feature) for feature in values}
        return MetadataPrior(file.get_tensor("classes"), values, tables)


def weighted_prior(
    weights: Weights, members: Sequence[Member], observations: Sequence[Observation]
) -> WeightedPrior | None:
    """The term that metadata add to an ensemble's log-probabilities: the weighted sum of its members' priors.

    Args:
        members: those of the ensemble that predict.

    Returns:
        (observations, classes) in slices; None without metadata, or where reading them fails.
    """
    try:
        terms = []
        for member in members:
            if member.metadata_prior:
                prior = read_prior(weights.file(member.metadata_prior))
                rows = prior.rows(observations)
                if has_known_value(rows):
                    terms.append((member.weight * member.metadata_prior_weight, prior, rows))
        found = WeightedPrior(tuple(terms)) if terms else None
        if found:
            found[:1]  # tables of a wrong shape must fail here
        return found
    except Exception as error:  # whatever the hidden table holds, the photos can be predicted
        print(f"predicting without metadata: {error!r}", flush=True)
        return None

"""Labelled observations for tests, without a folder; and the photos of those that were read, as rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kernel.competitions import competition_named
from kernel.observations import Observation
from local.data.observations import LabelledObservations


def make_labelled(
    observations: Sequence[Observation],
    class_ids: Sequence[str],
    is_val: Sequence[bool] = (),
    taxa: Mapping[str, tuple[str, ...]] | None = None,
) -> LabelledObservations:
    """Observations with their classes, all of train unless said otherwise."""
    return LabelledObservations(
        folder=Path("/nowhere"),
        competition=competition_named("fungiclef"),
        resolution="300p",
        observations=list(observations),
        class_ids=np.array(class_ids, dtype=object),
        is_val=np.array(is_val or [False] * len(observations), dtype=bool),
        taxa=taxa or {},
        species={},
        poisonous={},
    )


def of_rows(rows: Sequence[tuple[str, str, str]]) -> LabelledObservations:
    """Observations without photos, from (split, observation, class) rows."""
    observations = [Observation(name, ()) for _, name, _ in rows]
    return make_labelled(observations, [row[2] for row in rows], [row[0] == "val" for row in rows])


def photo_rows(labelled: LabelledObservations) -> list[tuple[str, str, str, Path]]:
    """(split, observation, class, path) of each photo."""
    return [
        ("val" if is_val else "train", observation.id, class_id, photo)
        for observation, class_id, is_val in zip(
            labelled.observations, labelled.class_ids, labelled.is_val, strict=True
        )
        for photo in observation.photos
    ]

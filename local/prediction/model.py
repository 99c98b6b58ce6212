"""Predict photos with runs or a bundle, by the kernel's own code: the same classes in the same order."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kernel.bank import Bank, read_banks
from kernel.competitions import competition_of
from kernel.embeddings import concatenate, embed_observations
from kernel.encoders import open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.manifest import Member, Weights, in_tiles
from kernel.metadata_prior import WeightedPrior, weighted_prior
from kernel.observations import Observation
from kernel.ranking import make_answers, rank
from local.base.run_folder import REFERENCE_FILE
from local.bundling.weights import check_same_task, choose_members, mean_threshold

CHUNK, GPU_CHUNK = 64, 1024  # observations predicted at once


@dataclass(frozen=True)
class Guess:
    class_id: str
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What is said of an observation.

    Attributes:
        guesses: the best first; none if no photo could be read.
        reference: the photo of the most similar observation of the first class in the bank; None if it is not known.
        unreadable: path and cause of each photo that could not be read.
    """

    observation: Observation
    guesses: list[Guess]
    reference: Path | None
    unreadable: list[tuple[Path, str]]


@dataclass(frozen=True)
class Reference:
    """The observations of a bank; see `local.training.export.write_reference`.

    Attributes:
        embeddings: (observations, features) float32, of length 1 after centring.
        centre: (features,) the mean that centring subtracts.
    """

    embeddings: torch.Tensor
    centre: torch.Tensor
    labels: torch.Tensor
    photos: list[str]
    names: list[str]

    def nearest(self, embedding: torch.Tensor, label: int) -> Path | None:
        """The photo of the most similar observation of a class."""
        own = torch.nonzero(self.labels == label)[:, 0]
        if not len(own):
            return None
        return Path(self.photos[own[(self.embeddings[own] @ (embedding - self.centre)).argmax()]])


def read_reference(path: Path) -> Reference | None:
    """The reference beside a run's or a bundle's weights; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            embeddings, labels = file.get_tensor("embeddings").float(), file.get_tensor("labels")
            photos = json.loads(file.get_tensor("photos").numpy().tobytes())
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or of an earlier version ({error}): train or bundle again") from error
    centre = embeddings[embeddings.norm(dim=1) > 0].mean(dim=0)
    centred = torch.nn.functional.normalize(embeddings - centre, dim=1)
    return Reference(centred, centre, labels, photos, json.loads(notes["names"]))


@dataclass(frozen=True)
class OpenMember:
    run: Weights
    member: Member
    weight: float
    encoders: list[Encoder]
    banks: list[Bank]

    def embed(self, observations: Sequence[Observation]) -> tuple[torch.Tensor, dict[Path, str]]:
        """The rows of `Embeddings` on the CPU, 0 where an encoder could read no photo; and the cause of each such."""
        member = self.member
        found = [embed_observations(one, observations, member.views, member.pooling) for one in self.encoders]
        values = concatenate([one.pooled.cpu() for one in found])
        is_readable = torch.stack([one.has_embedding.cpu() for one in found]).all(dim=0)
        return values * is_readable[:, None], {path: cause for one in found for path, cause in one.unreadable}


class Model:
    """One or several runs, or a bundle, ready to predict.

    Args:
        weights: of runs, which become an ensemble as in a bundle; or of one bundle.

    Raises:
        InputError: a file is damaged, or the runs predict different classes.
    """

    def __init__(self, weights: Sequence[Weights]):
        check_same_task(weights)
        chosen = choose_members(weights) if len(weights) > 1 else [(weights[0], 1.0)]
        devices = pick_devices()
        self.class_ids, self.members = weights[0].manifest.class_ids, []
        self.competition, self.threshold = competition_of(weights[0].manifest.competition), mean_threshold(chosen)
        for run, weight in chosen:
            for member in in_tiles(run.manifest, self.competition.grids).members:
                encoders = [open_encoder(run.file(spec.file), spec, devices) for spec in member.encoders]
                banks = read_banks(run.file(member.banks[-1]))
                self.members.append(OpenMember(run, member, weight * member.weight, encoders, banks))
        folder = chosen[0][0].folder
        beside = folder.parent if folder.name == "weights" else folder
        self.reference = read_reference(beside / REFERENCE_FILE)

    @property
    def is_transductive(self) -> bool:
        """Whether all observations must be predicted at once, because they change each other's predictions."""
        return any(bank.transduction for member in self.members for bank in member.banks)

    @property
    def chunk(self) -> int:
        """How many observations are predicted at once where they are independent."""
        return CHUNK if self.members[0].encoders[0].device.type == "cpu" else GPU_CHUNK

    def predict(self, observations: Sequence[Observation], top: int) -> Iterator[list[Prediction]]:
        """Predictions of the observations, in parts as soon as each is known.

        Args:
            top: guesses of each; of a set, at most.
        """
        chunk, parts, prior = self.chunk, [], self._prior(observations)
        for first in range(0, len(observations), chunk):
            part = observations[first : first + chunk]
            embedded = [one.embed(part) for one in self.members]
            parts.append((part, [values for values, _ in embedded], embedded[0][1]))
            if self.is_transductive:
                yield []  # of these photos nothing is known yet
            else:
                own = None if prior is None else prior[first : first + chunk]
                yield self._rank(*parts.pop(), top, own)
        if parts:
            values = [torch.cat(own) for own in zip(*(values for _, values, _ in parts), strict=True)]
            unreadable = {path: cause for _, _, own in parts for path, cause in own.items()}
            yield self._rank(observations, values, unreadable, top, prior)

    def _prior(self, observations: Sequence[Observation]) -> WeightedPrior | None:
        """What metadata add to the log-probabilities; None without, as for photos of one's own."""
        priors = [
            weighted_prior(one.run, [replace(one.member, weight=one.weight)], observations) for one in self.members
        ]
        terms = tuple(term for prior in priors if prior for term in prior.terms)
        return WeightedPrior(terms) if terms else None

    def _rank(
        self,
        observations: Sequence[Observation],
        values: list[torch.Tensor],
        unreadable: dict[Path, str],
        top: int,
        prior: WeightedPrior | torch.Tensor | None,
    ) -> list[Prediction]:
        """The predictions of observations by their embeddings with each member, as the kernel ranks them."""
        banks, weights = [one.banks for one in self.members], [one.weight for one in self.members]
        device = self.members[0].encoders[0].device
        best, probabilities = rank(banks, weights, values, top, prior, device)
        is_readable = torch.stack([own.norm(dim=1) > 0 for own in values]).all(dim=0)
        answers = make_answers(best, probabilities, is_readable.view(len(observations), -1), self.threshold)
        has_reference = self.reference and not self.competition.grids  # no photo of one class resembles a quadrat
        names = self.reference.names if self.reference else self.class_ids
        found = []
        for row, (observation, answer) in enumerate(zip(observations, answers, strict=True)):
            guesses = [Guess(self.class_ids[label], names[label], own) for label, own in answer.items()]
            nearest = self.reference.nearest(values[0][row], next(iter(answer))) if has_reference and answer else None
            failed = [(path, unreadable[path]) for path in observation.photos if path in unreadable]
            found.append(Prediction(observation, guesses, nearest, failed))
        return found

"""The bank: from an observation's embedding to ranked classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

CHUNK = 1024  # observations matched at once: scores of 32,000 classes then take 130 MB, not all the memory
ROUNDS = 3  # of transduction; more of them drift


@dataclass(frozen=True)
class Layer:
    """x -> x @ weight + bias, and what is negative cut off where it is rectified.

    Attributes:
        weight: (features in, features out).
        bias: (features out,).
        rectified: 1 or 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rectified: torch.Tensor


def through(layers: Sequence[Layer], values: torch.Tensor) -> torch.Tensor:
    """(observations, features) -> (observations, features of the last layer), in the precision of `values`."""
    for layer in layers:
        values = torch.addmm(layer.bias.to(values.dtype), values, layer.weight.to(values.dtype))
        values = values.relu() if layer.rectified else values
    return values


@dataclass(frozen=True)
class Bank:
    """Prototypes in a space of their own; an observation resembles a class as much as the nearest of its prototypes.

    Centring, whitening, a random projection, an MLP are layers; class means, photos, the columns of a linear classifier
    are prototypes. So all methods of the field are one formula:

        log p(class | x) = log_softmax(scale * max over its prototypes of <unit(layers(x)), prototype> + bias)

    Attributes:
        layers: from the encoder's space to the prototypes'; none leaves it as it is.
        prototypes: (prototypes, features).
        owners: (prototypes,) int64, the class of each.
        counts: (prototypes,) how much each weighs against the test's own observations in transduction.
        bias: (classes,) added to the logits.
        scale: (), the inverse temperature.
        share: (), of this bank among those of its member.
        transduction: (), how strongly test observations move the prototypes; 0 leaves them.
    """

    layers: tuple[Layer, ...]
    prototypes: torch.Tensor
    owners: torch.Tensor
    counts: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor
    share: torch.Tensor
    transduction: torch.Tensor

    def transform(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> (observations, features of the prototypes), rows of length 1."""
        return nn.functional.normalize(through(self.layers, embeddings), dim=1)

    def similarities(self, transformed: torch.Tensor) -> torch.Tensor:
        """(observations, features of the prototypes) -> (observations, classes): to the nearest of each."""
        similarities = transformed @ self.prototypes.T
        if torch.equal(self.owners, torch.arange(len(self.bias))):  # one prototype per class
            return similarities
        nearest = similarities.new_full((len(transformed), len(self.bias)), -1.0)
        return nearest.scatter_reduce_(1, self.owners.expand_as(similarities), similarities, "amax")

    def log_probabilities(self, similarities: torch.Tensor) -> torch.Tensor:
        """(observations, classes) similarities -> the same of log-probabilities."""
        return (similarities * self.scale + self.bias).log_softmax(dim=1)

    def moved(self, transformed: torch.Tensor) -> "Bank":
        """The bank with its prototypes moved towards the test observations that resemble them.

        Soft k-means that starts at the reference and never forgets it: a prototype is the mean of the observations that
        it was made of and of the test's, each weighted by its probability (Ren et al. 2018,
        https://arxiv.org/abs/1803.00676).
        """
        bank, kept = self, self.prototypes * self.counts[:, None]
        for _ in range(ROUNDS):
            total = torch.zeros_like(kept)
            for chunk in transformed.split(CHUNK):
                logits = chunk @ bank.prototypes.T * self.scale + self.bias[self.owners]
                total.addmm_(logits.softmax(dim=1).T, chunk)
            prototypes = nn.functional.normalize(kept + self.transduction * total, dim=1)
            bank = replace(bank, prototypes=prototypes)
        return bank


def read_banks(path: Path) -> list[Bank]:
    """The banks of a member, whose probabilities are averaged, from its safetensors file."""
    tensors, banks = load_file(path), []
    while any(name.startswith(f"{len(banks)}.") for name in tensors):
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{len(banks)}.")}
        depth = len({name.split(".")[1] for name in own if name.startswith("layers.")})
        parts = ("weight", "bias", "rectified")
        layers = tuple(Layer(*(own.pop(f"layers.{place}.{part}") for part in parts)) for place in range(depth))
        banks.append(Bank(layers, **own))
    return banks


def move(bank: Bank, transformed: torch.Tensor) -> Bank:
    """The bank after transduction; as it was, where there is none, or where it fails: no gain is worth the run."""
    if not bank.transduction or not len(transformed):
        return bank
    try:
        moved = bank.moved(transformed)
        if moved.prototypes.isfinite().all():
            return moved
        reason = "it overflows"
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
    print(f"transduction is left out: {reason}", flush=True)
    return bank


def classify(banks: Sequence[Bank], embeddings: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities (observations of a chunk, classes), chunk by chunk, by the mean probability of some banks.

    Args:
        embeddings: (observations, features); rows of zeros, of observations without a readable photo, move nothing and
            say nothing: their log-probabilities are zeros.
    """
    seen = embeddings.norm(dim=1) > 0
    spaces = [bank.transform(embeddings) for bank in banks]
    banks = [move(bank, space[seen]) for bank, space in zip(banks, spaces, strict=True)]
    for is_seen, *chunks in zip(seen.split(CHUNK), *(space.split(CHUNK) for space in spaces), strict=True):
        each = [
            bank.log_probabilities(bank.similarities(part)) + bank.share.log()
            for bank, part in zip(banks, chunks, strict=True)
        ]
        yield torch.stack(each).logsumexp(dim=0) * is_seen[:, None]


def rank(
    members: Sequence[Sequence[Bank]],
    weights: Sequence[float],
    embeddings: Sequence[torch.Tensor],
    guesses: int,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best classes of each observation, by the weighted sum of the log-probabilities of an ensemble's members.

    Args:
        members: the banks of each, all over the same classes.
        weights: one per member.
        embeddings: (observations, features of the member), one per member.
        guesses: how many classes to return; all, if there are fewer.
        prior: (observations, classes) of log-probabilities to add, weighted already.

    Returns:
        (observations, guesses) int64 indices of classes, best first.
    """
    guesses = min(guesses, len(members[0][0].bias))
    best, first = [], 0
    for parts in zip(*map(classify, members, embeddings), strict=True):
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        if prior is not None:
            total = total + prior[first : first + len(total)]
        # A sorted order in which equal scores keep the order of the classes is the same on every machine.
        best.append(total.sort(dim=1, descending=True, stable=True).indices[:, :guesses])
        first += len(total)
    return torch.cat(best) if best else torch.zeros((0, guesses), dtype=torch.long)

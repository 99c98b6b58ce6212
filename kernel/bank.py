"""The bank: from an observation's embedding to a score for every class.

All methods of the field (class means, nearest neighbour, linear classifiers, an MLP) are one formula:

    x        = normalize(layers(embedding))
    score(c) = logit_scale * max over the prototypes p of class c of <x, p> + bias(c)

The log-softmax of the scores is log p(class | photos). A member of an ensemble may have several banks, whose
probabilities are averaged. The log-probabilities of the members are summed, each times the member's weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from kernel.inputs import InputError

CHUNK = 256  # observations scored at once: with 32,000 classes their scores take 33 MB, which stay in the allocator
TRANSDUCTION_ROUNDS = 3  # with more rounds the prototypes drift


@dataclass(frozen=True)
class Layer:
    """x -> x @ weight + bias, followed by a ReLU or not.

    Attributes:
        weight: (features in, features out).
        bias: (features out,).
        relu: 1 with a ReLU, 0 without.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    relu: torch.Tensor


def apply_layers(layers: Sequence[Layer], values: torch.Tensor) -> torch.Tensor:
    """(observations, features) -> (observations, features of the last layer), in the precision of `values`."""
    for layer in layers:
        values = torch.addmm(layer.bias.to(values.dtype), values, layer.weight.to(values.dtype))
        values = values.relu() if layer.relu else values
    return values


@dataclass(frozen=True)
class Bank:
    """Layers, prototypes, and a bias per class; see the formula above.

    Centring, whitening and a trained projection are layers. Class means, single observations and the coefficients of
    a linear classifier are prototypes.

    Attributes:
        layers: from the encoder's space to the space of the prototypes; none leaves the embedding as it is.
        prototypes: (prototypes, features); rows of length 1, except those of a linear classifier.
        prototype_labels: (prototypes,) int64, the index of each prototype's class.
        counts: (prototypes,) weight of each prototype against the test observations in transduction, such as the number
            of observations that it is the mean of.
        bias: (classes,) added to the logits.
        logit_scale: (), the inverse of the softmax's temperature.
        mixture_weight: (), of this bank's probabilities among the banks of its member.
        transduction: (), weight of the test observations in transduction; 0 switches it off.
    """

    layers: tuple[Layer, ...]
    prototypes: torch.Tensor
    prototype_labels: torch.Tensor
    counts: torch.Tensor
    bias: torch.Tensor
    logit_scale: torch.Tensor
    mixture_weight: torch.Tensor
    transduction: torch.Tensor

    def transform(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> (observations, features of the prototypes), rows of length 1."""
        return nn.functional.normalize(apply_layers(self.layers, embeddings), dim=1)

    def similarities(self, transformed: torch.Tensor) -> torch.Tensor:
        """(observations, features of the prototypes) -> (observations, classes), by the nearest prototype of each."""
        similarities = transformed @ self.prototypes.T
        if torch.equal(self.prototype_labels, torch.arange(len(self.bias))):  # one prototype per class
            return similarities
        nearest = similarities.new_full((len(transformed), len(self.bias)), -1.0)
        return nearest.scatter_reduce_(1, self.prototype_labels.expand_as(similarities), similarities, "amax")

    def log_probabilities(self, similarities: torch.Tensor) -> torch.Tensor:
        """Similarities (observations, classes) -> log-probabilities of the same shape."""
        return torch.add(self.bias, similarities, alpha=float(self.logit_scale)).log_softmax(dim=1)

    def refined(self, transformed: torch.Tensor) -> "Bank":
        """The bank with its prototypes moved towards the test observations that resemble them.

        Soft k-means that starts at the prototypes: each becomes the mean of itself, weighted by `counts`, and of the
        test observations, weighted by their probability (Ren et al. 2018, https://arxiv.org/abs/1803.00676).

        Args:
            transformed: (observations, features of the prototypes), rows of length 1.
        """
        bank, start = self, self.prototypes * self.counts[:, None]
        for _ in range(TRANSDUCTION_ROUNDS):
            total = torch.zeros_like(start)
            for chunk in transformed.split(CHUNK):
                logits = chunk @ bank.prototypes.T * self.logit_scale + self.bias[self.prototype_labels]
                total.addmm_(logits.softmax(dim=1).T, chunk)
            prototypes = nn.functional.normalize(start + self.transduction * total, dim=1)
            bank = replace(bank, prototypes=prototypes)
        return bank


def read_banks(path: Path) -> list[Bank]:
    """The banks of a member from their safetensors file, with tensors such as "0.prototypes" and "0.layers.0.weight".

    Raises:
        InputError: the tensors are not those of a bank, as in a file of an earlier version.
    """
    tensors, banks = load_file(path), []
    expected = {field.name for field in fields(Bank)} - {"layers"}
    while any(name.startswith(f"{len(banks)}.") for name in tensors):
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{len(banks)}.")}
        depth = len({name.split(".")[1] for name in own if name.startswith("layers.")})
        names = [[f"layers.{index}.{field.name}" for field in fields(Layer)] for index in range(depth)]
        if set(own) != expected.union(*names):
            differing = ", ".join(sorted(set(own) ^ expected.union(*names)))
            raise InputError(f"{path} is not a bank of this version (it differs in {differing}): train again")
        layers = tuple(Layer(*(own.pop(name) for name in parts)) for parts in names)
        banks.append(Bank(layers, **own))
    return banks


def refine_transductively(bank: Bank, transformed: torch.Tensor) -> Bank:
    """The bank after transduction; the bank itself if that is off or fails, because the kernel must continue."""
    if not bank.transduction or not len(transformed):
        return bank
    try:
        refined = bank.refined(transformed)
        if refined.prototypes.isfinite().all():
            return refined
        reason = "the prototypes are not finite"
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
    print(f"predicting without transduction: {reason}", flush=True)
    return bank


def classify(banks: Sequence[Bank], embeddings: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities (observations of a chunk, classes) of the banks' mean probability, chunk by chunk.

    Args:
        embeddings: (observations, features). A row of zeros is an observation without a readable photo: it takes no
            part in transduction, and its log-probabilities are zeros.
    """
    has_embedding = embeddings.norm(dim=1) > 0
    spaces = [bank.transform(embeddings) for bank in banks]
    banks = [refine_transductively(bank, space[has_embedding]) for bank, space in zip(banks, spaces, strict=True)]
    chunks = (space.split(CHUNK) for space in spaces)
    for mask, *parts in zip(has_embedding.split(CHUNK), *chunks, strict=True):
        each = [bank.log_probabilities(bank.similarities(part)) for bank, part in zip(banks, parts, strict=True)]
        mean = each[0]
        if len(each) > 1:
            weighted = [part + bank.mixture_weight.log() for bank, part in zip(banks, each, strict=True)]
            mean = torch.stack(weighted).logsumexp(dim=0)
        mean[~mask] = 0
        yield mean


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest scores of each row, largest first; of equal ones the lower index first.

    The same as the first columns of a stable sort, on every device; a sort of 32,000 classes takes ten times as long.

    Args:
        scores: (observations, classes), none NaN.

    Returns:
        (observations, count) int64; all classes, if there are fewer.
    """
    values, indices = scores.topk(min(count + 1, scores.shape[1]), dim=1)  # in any order where scores are equal
    indices = indices[:, :count].sort(dim=1).values
    order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    indices = indices.gather(1, order)
    if values.shape[1] > count:
        is_tied = values[:, count - 1] == values[:, count]  # topk may have taken either of two equal classes
        indices[is_tied] = scores[is_tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return indices


def rank(
    members: Sequence[Sequence[Bank]],
    weights: Sequence[float],
    embeddings: Sequence[torch.Tensor],
    guesses: int,
    metadata_prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best classes of each observation, by the weighted sum of the log-probabilities of an ensemble's members.

    Args:
        members: the banks of each member, all over the same classes.
        weights: one per member.
        embeddings: (observations, features of the member), one per member.
        guesses: how many classes to return; all, if there are fewer.
        metadata_prior: (observations, classes) weighted log-probabilities to add; see `weighted_prior`.

    Returns:
        (observations, guesses) int64 indices of classes, best first.
    """
    guesses = min(guesses, len(members[0][0].bias))
    best, first = [], 0
    for parts in zip(*map(classify, members, embeddings), strict=True):
        total = parts[0] if weights[0] == 1 else parts[0] * weights[0]
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total.add_(part, alpha=weight)
        if metadata_prior is not None:
            total.add_(metadata_prior[first : first + len(total)])
        best.append(largest(total, guesses))
        first += len(total)
    return torch.cat(best) if best else torch.zeros((0, guesses), dtype=torch.long)

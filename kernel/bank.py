"""The bank: from an observation's embedding to a score for every class.

All methods of the field (class means, nearest neighbour, linear classifiers, an MLP) are one formula:

    x        = normalize(layers(embedding))
    score(c) = logit_scale * max over the prototypes p of class c of <x, p> + bias(c)

The log-softmax of the scores is log p(class | photos). Observations are scored in chunks, so that the memory does not
grow with their number. When a GPU runs out of memory, the chunk is halved.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from kernel.forward import is_out_of_memory
from kernel.inputs import InputError

Result = TypeVar("Result")
CPU = torch.device("cpu")
# Bytes of the scores of one chunk: enough that a product of matrices, which arranges its factors anew each time, takes
# little longer than a product of all observations at once.
CPU_CHUNK, GPU_CHUNK = 128 << 20, 256 << 20
MIN_OBSERVATIONS = 64  # in a chunk, however many classes there are; with fewer, reading the prototypes takes the time
TRANSDUCTION_ROUNDS = 3  # with more rounds the prototypes drift
MIN_LENGTH = 1e-6  # squared, of a prototype: of one that is made of a single test observation, nothing is left


def observations_at_once(columns: int, device: torch.device) -> int:
    """How many observations have scores that fit in the memory of a chunk, with `columns` scores each."""
    memory = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return max(MIN_OBSERVATIONS, memory // (4 * max(1, columns)))


def try_chunk(work: Callable[[slice], Result], chunk: slice) -> Result | None:
    """`work(chunk)`, or None where memory runs out and a smaller chunk may help."""
    try:
        return work(chunk)
    except (RuntimeError, MemoryError) as error:
        if chunk.stop - chunk.start < 2 or not is_out_of_memory(error):
            raise
        return None


def in_chunks(count: int, size: int, work: Callable[[slice], Result]) -> Iterator[Result]:
    """The results of `work` for consecutive slices of `count` observations, one at least.

    Args:
        size: observations in a slice; halved whenever memory runs out.
    """
    first = 0
    while True:
        chunk = slice(first, min(first + size, count))
        result = try_chunk(work, chunk)
        if result is None:
            size = (chunk.stop - first) // 2
            continue
        yield result
        first = chunk.stop
        if first >= count:
            return


def collect_rows(count: int, parts: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The rows of one part after another, each of some tensors, `count` rows in all.

    A list of the parts would lie between the large blocks of memory that the parts were computed in. None of these
    would be used again: with tens of thousands of classes that took 10 GB for 80,000 observations.
    """
    whole, first = [], 0
    for part in parts:
        whole = whole or [rows.new_empty((count, *rows.shape[1:])) for rows in part]
        for own, rows in zip(whole, part, strict=True):
            own[first : first + len(rows)] = rows
        first += len(part[0])
    return whole


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process has set.

    In TF32, which keeps 10 bits of each factor, a GPU would rank other classes than the CPU.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def log_softmax_(scores: torch.Tensor) -> torch.Tensor:
    """The log-softmax of each row of (observations, classes), in the memory of the scores."""
    return torch.log_softmax(scores, dim=1, out=scores)


def inner_products(rows: torch.Tensor, others: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, features), (others, features) -> (rows, others), plus a bias (others,).

    On a CPU as a convolution of one pixel: torch leaves it to oneDNN, and products of matrices to MKL, which takes 5 to
    15% more time on processors of AMD.
    """
    if rows.device.type == "cpu" and len(rows):  # no photo can have no pixels
        pixels = rows.reshape(1, 1, *rows.shape).permute(0, 3, 1, 2)  # of a photo, whose channels are the features
        return nn.functional.conv2d(pixels, others[:, :, None, None], bias)[0, :, 0].T
    return rows @ others.T if bias is None else torch.addmm(bias, rows, others.T)


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

    def to(self, device: torch.device) -> "Bank":
        """The bank on a device. Single numbers stay on the CPU, where reading them waits for nothing."""
        layers = tuple(
            replace(layer, weight=layer.weight.to(device), bias=layer.bias.to(device)) for layer in self.layers
        )
        names = ("prototypes", "prototype_labels", "counts", "bias")
        return replace(self, layers=layers, **{name: getattr(self, name).to(device) for name in names})

    def transform(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> (observations, features of the prototypes), rows of length 1."""
        return nn.functional.normalize(apply_layers(self.layers, embeddings), dim=1)

    def has_one_prototype_per_class(self) -> bool:
        """Whether the prototypes are in the order of the classes, one for each."""
        labels = self.prototype_labels
        return torch.equal(labels, torch.arange(len(self.bias), device=labels.device))

    def similarities(self, transformed: torch.Tensor) -> torch.Tensor:
        """(observations, features of the prototypes) -> (observations, classes), by the nearest prototype of each.

        A class without a prototype gets -1.
        """
        if self.has_one_prototype_per_class():
            return inner_products(transformed, self.prototypes)
        # In parts, since there may be many more prototypes than classes.
        parts = self.prototypes.split(observations_at_once(len(transformed), transformed.device))
        return self.nearest_of_classes(len(transformed), (inner_products(part, transformed) for part in parts))

    def nearest_of_classes(self, observations: int, similarities: Iterable[torch.Tensor]) -> torch.Tensor:
        """(observations, classes), the highest similarity to a prototype of each; see `similarities`.

        Args:
            similarities: parts of (prototypes, observations). With a row per class: on a CPU, the maxima of rows take a
                sixth of the time of those of columns.
        """
        classes, left = len(self.bias), self.prototype_labels
        nearest = self.bias.new_full((classes, observations), -torch.inf)
        for part in similarities:
            own, left = left[: len(part)], left[len(part) :]
            nearest.scatter_reduce_(0, own[:, None].expand_as(part), part, "amax")
        nearest[torch.bincount(self.prototype_labels, minlength=classes) == 0] = -1.0
        return nearest.T.contiguous()

    def scores(self, transformed: torch.Tensor) -> torch.Tensor:
        """(observations, features of the prototypes) -> (observations, classes), the scores of the formula above."""
        if self.has_one_prototype_per_class():
            return inner_products(transformed * self.logit_scale, self.prototypes, self.bias)
        return self.similarities(transformed).mul_(self.logit_scale).add_(self.bias)

    def log_probabilities(self, similarities: torch.Tensor) -> torch.Tensor:
        """Similarities (observations, classes) -> log-probabilities of the same shape."""
        return log_softmax_(torch.add(self.bias, similarities, alpha=float(self.logit_scale)))

    def assign(self, transformed: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The observations of a chunk, (observations, features), and (observations, prototypes) probabilities."""
        observations = transformed[chunk]
        logits = inner_products(observations * self.logit_scale, self.prototypes, self.bias[self.prototype_labels])
        return observations, logits.softmax(dim=1)

    def refined(self, transformed: torch.Tensor) -> "RefinedBank":
        """The bank with its prototypes moved towards the test observations that resemble them.

        Soft k-means that starts at the prototypes: each becomes the mean of itself, weighted by `counts`, and of the
        test observations, weighted by their probability (Ren et al. 2018, https://arxiv.org/abs/1803.00676).

        Args:
            transformed: (observations, features of the prototypes), rows of length 1.
        """
        bank, start = self, self.prototypes * self.counts[:, None]
        size = observations_at_once(len(start), start.device)
        for _ in range(TRANSDUCTION_ROUNDS):
            before, total = bank, torch.zeros_like(start)
            for observations, probabilities in in_chunks(len(transformed), size, partial(bank.assign, transformed)):
                total.addmm_(probabilities.T, observations)
            sums = start + self.transduction * total
            bank = replace(bank, prototypes=nn.functional.normalize(sums, dim=1))
        return RefinedBank(bank, before, sums)


@dataclass(frozen=True)
class RefinedBank:
    """A bank after transduction, or without it.

    Attributes:
        bank: with the prototypes after it.
        before: the bank that gave the observations to the prototypes in the last round; None without transduction.
        sums: (prototypes, features), the prototypes before they were scaled to length 1.
    """

    bank: Bank
    before: Bank | None = None
    sums: torch.Tensor | None = None

    def scores(self, transformed: torch.Tensor) -> torch.Tensor:
        """(observations, features of the prototypes) -> (observations, classes), as `Bank.scores`.

        After transduction, an observation is compared with the prototypes that all others give. Otherwise each would
        confirm its own first guess, right or wrong, and the probabilities would be too high.
        """
        if self.before is None:
            return self.bank.scores(transformed)
        size = observations_at_once(len(self.sums), transformed.device)
        parts = in_chunks(len(transformed), size, partial(self._without_own, transformed))
        [similarities] = collect_rows(len(transformed), ((part,) for part in parts))
        return similarities.mul_(self.bank.logit_scale).add_(self.bank.bias)

    def _without_own(self, transformed: torch.Tensor, chunk: slice) -> torch.Tensor:
        """(observations of the chunk, classes), similarities to prototypes without the observation's own part.

        The sum s of a prototype contains t p x of an observation x, where t is the weight of transduction and p the
        probability of the prototype. Without that part, the sum is s - t p x. Its product with x and its length follow
        from the product of s and x.
        """
        observations, own = self.before.assign(transformed, chunk)
        own = own.mul_(self.bank.transduction)
        products = inner_products(observations, self.sums)
        lengths = self.sums.square().sum(dim=1) - own * (2 * products - own)
        similarities = products.sub_(own).div_(lengths.clamp_(min=MIN_LENGTH).sqrt_())
        if self.bank.has_one_prototype_per_class():
            return similarities
        return self.bank.nearest_of_classes(len(observations), [similarities.T])


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


def refine_transductively(bank: Bank, transformed: torch.Tensor) -> RefinedBank:
    """The bank after transduction, or without it if that is off or fails, because the kernel must continue.

    Raises:
        RuntimeError: it fails on a GPU. On the CPU it may succeed.
    """
    if not bank.transduction or not len(transformed):
        return RefinedBank(bank)
    try:
        refined = bank.refined(transformed)
        if refined.sums.isfinite().all():
            return refined
        reason = "the prototypes are not finite"
    except (RuntimeError, MemoryError) as error:
        if transformed.device.type != "cpu":
            raise
        reason = str(error).splitlines()[0]
    print(f"predicting without transduction: {reason}", flush=True)
    return RefinedBank(bank)

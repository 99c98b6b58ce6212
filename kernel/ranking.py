"""Rank the classes: by the banks of all members, with their probabilities.

A member of an ensemble may have several banks, whose probabilities are averaged. The log-probabilities of the members
are summed, each times the member's weight.

All of it runs on one device, in float32. The scores never leave the device. If a GPU fails, the CPU ranks the classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from kernel.bank import (
    CPU,
    Bank,
    RefinedBank,
    collect_rows,
    full_precision,
    in_chunks,
    log_softmax_,
    observations_at_once,
    refine_transductively,
)
from kernel.forward import is_out_of_memory
from kernel.inputs import shorten
from kernel.metadata_prior import WeightedPrior

BLOCK = 128  # classes of which `largest` first finds the maximum


@dataclass(frozen=True)
class Classifier:
    """The banks of a member and the observations that they classify, on one device.

    Attributes:
        banks: after transduction.
        transformed: for each bank (observations, features of its prototypes), rows of length 1.
        has_embedding: (observations,) bool, false for a row of zeros: an observation without a readable photo. It takes
            no part in transduction, and all its classes are equally probable.
    """

    banks: Sequence[RefinedBank]
    transformed: Sequence[torch.Tensor]
    has_embedding: torch.Tensor

    def scores(self, chunk: slice) -> torch.Tensor:
        """(observations of the chunk, classes); their softmax is the banks' mean probability."""
        each = [bank.scores(transformed[chunk]) for bank, transformed in zip(self.banks, self.transformed, strict=True)]
        mean = each[0]
        if len(each) > 1:
            weighted = [
                log_softmax_(part).add_(refined.bank.mixture_weight.log())
                for refined, part in zip(self.banks, each, strict=True)
            ]
            mean = torch.stack(weighted).logsumexp(dim=0)
        if not self.has_embedding[chunk].all():
            mean[~self.has_embedding[chunk]] = 0
        return mean

    def log_probabilities(self, chunk: slice) -> torch.Tensor:
        """(observations of the chunk, classes), of the banks' mean probability."""
        return log_softmax_(self.scores(chunk))


def make_classifier(banks: Sequence[Bank], embeddings: torch.Tensor, device: torch.device) -> Classifier:
    """Move the banks of a member and (observations, features) to a device, transform these, refine the banks."""
    embeddings, banks = embeddings.to(device), [bank.to(device) for bank in banks]
    has_embedding = embeddings.norm(dim=1) > 0
    transformed = [bank.transform(embeddings) for bank in banks]
    refined = [
        refine_transductively(bank, own[has_embedding] if bank.transduction else own)
        for bank, own in zip(banks, transformed, strict=True)
    ]
    return Classifier(refined, transformed, has_embedding)


def classify(banks: Sequence[Bank], embeddings: torch.Tensor, device: torch.device = CPU) -> Iterator[torch.Tensor]:
    """Log-probabilities (observations of a chunk, classes) of the banks' mean probability, chunk by chunk.

    Args:
        embeddings: (observations, features); zeros for an observation without a readable photo, see `Classifier`.
        device: to work on, and of the result.
    """
    classifier = make_classifier(banks, embeddings, device)
    size = observations_at_once(len(banks[0].bias), device)
    return in_chunks(len(embeddings), size, classifier.log_probabilities)


def largest_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the largest scores of each row, in ascending order; of equal scores the first.

    Args:
        scores: (observations, classes), none NaN.

    Returns:
        (observations, count) int64; all columns, if there are fewer.
    """
    values, columns = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    columns = columns[:, :count].sort(dim=1).values
    if values.shape[1] > count:
        is_tied = values[:, count - 1] == values[:, count]  # topk may have taken either of two equal classes
        if is_tied.any():
            order = scores[is_tied].sort(dim=1, descending=True, stable=True).indices
            columns[is_tied] = order[:, :count].sort(dim=1).values
    return columns


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest scores of each row, largest first; of equal ones the lower index first.

    The same as the first columns of a stable sort, on every device, in a fraction of the time.

    Args:
        scores: (observations, classes), none NaN.

    Returns:
        (observations, count) int64; all classes, if there are fewer.
    """
    classes, blocks = scores.shape[1], scores.shape[1] // BLOCK
    if blocks < 8 * count:
        found = largest_columns(scores, count)
    else:
        # If a block is not among the `count` with the largest maxima, each of those has a score that comes before all
        # of its scores. The remaining columns, less than a block, are all candidates.
        columns, in_blocks = torch.arange(classes, device=scores.device), blocks * BLOCK
        maxima = scores[:, :in_blocks].unflatten(1, (blocks, BLOCK)).amax(dim=2)
        candidates = columns[:in_blocks].view(blocks, BLOCK)[largest_columns(maxima, count)].flatten(1)
        candidates = torch.cat([candidates, columns[in_blocks:].expand(len(scores), -1)], dim=1)
        found = candidates.gather(1, largest_columns(scores.gather(1, candidates), count))
    return found.gather(1, scores.gather(1, found).sort(dim=1, descending=True, stable=True).indices)


def best_classes(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the largest scores of each row, as by `largest`, and their softmax over all classes.

    Args:
        scores: (observations, classes), none NaN; used as working memory.

    Returns:
        (observations, count) int64, and float32 of the same shape.
    """
    indices = largest(scores, count)
    return indices, log_softmax_(scores).gather(1, indices).exp_()


def rank_on(
    device: torch.device,
    members: Sequence[Sequence[Bank]],
    weights: Sequence[float],
    embeddings: Sequence[torch.Tensor],
    guesses: int,
    metadata_prior: torch.Tensor | WeightedPrior | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rank` on a device.

    Raises:
        RuntimeError: the memory of the device does not suffice, or an operation on it fails.
    """
    classifiers = [make_classifier(banks, own, device) for banks, own in zip(members, embeddings, strict=True)]
    prior, classes = None if metadata_prior is None else metadata_prior.to(device), len(members[0][0].bias)

    def best(chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        # The sum of log-probabilities needs no normaliser of its parts: it would add the same to all classes.
        total = classifiers[0].scores(chunk)
        total = total if weights[0] == 1 else total.mul_(weights[0])
        for weight, classifier in zip(weights[1:], classifiers[1:], strict=True):
            total.add_(classifier.scores(chunk), alpha=weight)
        if prior is not None:
            total.add_(prior[chunk])
        return best_classes(total, min(guesses, classes))

    count = len(embeddings[0])
    indices, own = collect_rows(count, in_chunks(count, observations_at_once(classes, device), best))
    return indices.cpu(), own.cpu()


def rank(
    members: Sequence[Sequence[Bank]],
    weights: Sequence[float],
    embeddings: Sequence[torch.Tensor],
    guesses: int,
    metadata_prior: torch.Tensor | WeightedPrior | None = None,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best classes of each observation, by the weighted sum of the log-probabilities of an ensemble's members.

    Args:
        members: the banks of each member, all over the same classes.
        weights: one per member.
        embeddings: (observations, features of the member), one per member.
        guesses: how many classes to return; all, if there are fewer.
        metadata_prior: (observations, classes) weighted log-probabilities to add; see `weighted_prior`.
        device: to work on. If it fails, the CPU does the work.

    Returns:
        (observations, guesses) int64 indices of classes, best first, and their probabilities, the softmax over all
        classes; both on the CPU. Every device ranks the same, except where two scores differ by no more than their
        rounding.
    """
    with full_precision():
        if device.type != "cpu":
            try:
                return rank_on(device, members, weights, embeddings, guesses, metadata_prior)
            except RuntimeError as error:
                reason = "its memory does not suffice" if is_out_of_memory(error) else shorten(error)
                print(f"ranking the classes on the CPU instead of {device}: {reason}", flush=True)
        return rank_on(CPU, members, weights, embeddings, guesses, metadata_prior)


def as_answer(indices: torch.Tensor, probabilities: torch.Tensor) -> dict[int, float]:
    """The classes of one row of `rank` with their probabilities, best first."""
    return dict(zip(indices.tolist(), probabilities.tolist(), strict=True))


def make_answers(
    ranked: torch.Tensor, probabilities: torch.Tensor, has_embedding: torch.Tensor, threshold: float | None
) -> Iterator[dict[int, float]]:
    """The classes of each observation with their probabilities, most probable first; none without an embedding.

    Args:
        ranked, probabilities: (observations x tiles, guesses), those of `rank`.
        has_embedding: (observations, tiles) bool; one tile where photos are not cut.
        threshold: for photos in tiles, see `probable_classes`; None for others.
    """
    if threshold is not None:
        for answer in best_of_tiles(ranked, probabilities, has_embedding):
            yield probable_classes(answer, threshold, ranked.shape[1])
        return
    for indices, own, is_row in zip(ranked, probabilities, has_embedding.flatten().tolist(), strict=True):
        yield as_answer(indices, own) if is_row else {}


def best_of_tiles(
    ranked: torch.Tensor, probabilities: torch.Tensor, has_embedding: torch.Tensor
) -> Iterator[dict[int, float]]:
    """The classes of each observation, each with its probability in the best of the tiles, most probable first.

    Args:
        ranked, probabilities: (observations x tiles, guesses), those of `rank`; the tiles of an
            observation are one after another.
        has_embedding: (observations, tiles) bool. The other tiles do not count.
    """
    tiles = has_embedding.shape[1]
    for indices, own, is_row in zip(ranked.split(tiles), probabilities.split(tiles), has_embedding, strict=True):
        classes, positions = indices[is_row].unique(return_inverse=True)
        best = own.new_zeros(len(classes)).scatter_reduce_(0, positions.flatten(), own[is_row].flatten(), "amax")
        order = best.sort(descending=True, stable=True).indices
        yield as_answer(classes[order], best[order])


def probable_classes(answer: dict[int, float], threshold: float, most: int) -> dict[int, float]:
    """The classes with at least a probability, `most` at most, and one at least.

    Args:
        answer: classes with their probabilities, most probable first.
    """
    count = sum(probability >= threshold for probability in answer.values())
    return dict(islice(answer.items(), min(max(1, count), most)))

"""The bank: from an observation's embedding to ranked classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

CHUNK = 1024  # observations matched at once: scores of 32,000 classes then take 130 MB, not all the memory


@dataclass(frozen=True)
class Bank:
    """Prototypes in a centred space; the score of a class is the cosine to its prototype, plus its bias.

    Centring on the mean of the reference takes out what all photos have in common, which on fine-grained data is most
    of an embedding's length (Wang et al. 2019, SimpleShot, https://arxiv.org/abs/1911.04623).

    Attributes:
        centre: (features,) subtracted from embeddings; zeros for none.
        prototypes: (classes, features), rows of length 1.
        bias: (classes,) added to the cosine; zeros for none.
    """

    centre: torch.Tensor
    prototypes: torch.Tensor
    bias: torch.Tensor

    def scores(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(observations, features) -> (observations, classes); larger is likelier."""
        return torch.addmm(self.bias, nn.functional.normalize(embeddings - self.centre, dim=1), self.prototypes.T)


def read_bank(path: Path) -> Bank:
    """A bank from its safetensors file."""
    return Bank(**load_file(path))


def rank(banks: Sequence[Bank], embeddings: Sequence[torch.Tensor], guesses: int) -> torch.Tensor:
    """The best classes of each observation, by the mean of the scores of an ensemble's members.

    Args:
        banks: one per member, all over the same classes.
        embeddings: (observations, features of the member), one per member.
        guesses: how many classes to return; all, if there are fewer.

    Returns:
        (observations, guesses) int64 indices of classes, best first.
    """
    guesses = min(guesses, len(banks[0].prototypes))
    chunks = zip(*(member.split(CHUNK) for member in embeddings), strict=True)
    # A sorted order in which equal scores keep the order of the classes is the same on every machine.
    best = [
        sum(bank.scores(chunk) for bank, chunk in zip(banks, members, strict=True))
        .sort(dim=1, descending=True, stable=True)
        .indices[:, :guesses]
        for members in chunks
    ]
    return torch.cat(best) if best else torch.zeros((0, guesses), dtype=torch.long)

"""The number of threads that torch uses in a test."""

from collections.abc import Iterator

import pytest
import torch


def use_torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    yield from use_torch_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    yield from use_torch_threads(2)

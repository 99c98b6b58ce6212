"""What the tests of encoders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import photo


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Encoders this small are fastest on one thread, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide, a tall and a square photo."""
    folder, sizes = tmp_path_factory.mktemp("photos"), ((90, 70), (50, 120), (64, 64))
    return [photo(folder / f"{seed}.png", seed, size) for seed, size in enumerate(sizes)]

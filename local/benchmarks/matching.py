"""Measure matching: the kernel's ranking of many classes, a product and a top-k on the same device, and faiss.

Called by local/benchmark.py speed.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from kernel.bank import Bank
from kernel.ranking import rank
from local.base.console import progress, say

OBSERVATIONS, CLASSES, FEATURES, GUESSES = 10_000, 32_000, 512, 10  # about as many classes as Herbarium 2020 has
PLAIN_CHUNK = 1024  # observations of which the plain way holds the scores
REPEATS = 3  # the fastest counts, because any disturbance makes a measurement slower


def class_means(prototypes: torch.Tensor) -> Bank:
    """A bank with one prototype per class, no layers and no bias."""
    classes = len(prototypes)
    numbers = (torch.tensor(value) for value in (20.0, 1.0, 0.0))
    return Bank((), prototypes, torch.arange(classes), torch.ones(classes), torch.zeros(classes), *numbers)


def product_and_topk(embeddings: torch.Tensor, prototypes: torch.Tensor, device: torch.device) -> np.ndarray:
    """The shortest way in PyTorch to the nearest prototypes."""
    prototypes = prototypes.to(device)
    chunks = embeddings.to(device).split(PLAIN_CHUNK)
    return torch.cat([(chunk @ prototypes.T).topk(GUESSES).indices for chunk in chunks]).cpu().numpy()


def faiss_search(prototypes: torch.Tensor) -> Callable[[torch.Tensor], np.ndarray] | None:
    """The exact search of faiss on the CPU, with as many threads as torch; None if faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(prototypes.shape[1])
    index.add(prototypes.numpy())
    return lambda embeddings: index.search(embeddings.numpy(), GUESSES)[1]


def measure_matching(device: torch.device, observations: int = OBSERVATIONS, classes: int = CLASSES) -> dict:
    """Seconds of each way in the fastest of REPEATS runs, taken in turn.

    Returns:
        "observations", "classes", "seconds" of the kernel, "topk_seconds" of a product and a top-k on the same device,
        and, where faiss is installed, "faiss_seconds" on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    prototypes, embeddings = (
        torch.nn.functional.normalize(torch.randn(count, FEATURES, generator=generator), dim=1)
        for count in (classes, observations)
    )
    bank, search = class_means(prototypes), faiss_search(prototypes)
    ways: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
        "seconds": lambda queries: rank([[bank]], [1.0], [queries], GUESSES, device=device)[0].numpy(),
        "topk_seconds": lambda queries: product_and_topk(queries, prototypes, device),
    }
    if search:
        ways["faiss_seconds"] = search
    seconds, found = {name: [] for name in ways}, {}
    for way in ways.values():
        way(embeddings[:PLAIN_CHUNK])  # to warm up
    for _ in progress(range(REPEATS), "matching", unit="repeat"):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(embeddings)
            seconds[name].append(time.perf_counter() - start)
    row = {"observations": observations, "classes": classes} | {name: min(each) for name, each in seconds.items()}
    agreement = {name: float((found[name] == found["seconds"]).mean()) for name in ways}
    say(f"matching, seconds: {len(embeddings)} observations and {classes} classes of {FEATURES} features on {device}")
    say("| the kernel | product and topk | faiss IndexFlatIP |")
    say("|---|---|---|")
    say(matching_row(row, agreement))
    return row


def matching_row(row: dict, agreement: dict[str, float]) -> str:
    """A row of the table: the kernel's time over that of each other way, and the fraction of equal neighbours."""
    cells = [f"{row['seconds']:.2f}"]
    for name in ("topk_seconds", "faiss_seconds"):
        if name in row:
            ratio = row["seconds"] / row[name]
            cells.append(f"{row[name]:.2f} (the kernel {ratio:.2f}×, {100 * agreement[name]:.3f}% the same)")
        else:
            cells.append("not installed")
    return f"| {' | '.join(cells)} |"

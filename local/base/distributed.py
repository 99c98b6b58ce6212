"""Several processes that train one run together, as torchrun starts them. A process alone needs no process group.

torchrun restarts processes that fail, and tells each of them its rank and the world size in the environment:
https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from kernel.inputs import InputError
from local.base.console import counted, report_error

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)  # the other ranks wait that long while rank 0 selects a bank


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within it, the processes that torchrun started can communicate.

    A rank that fails exits immediately. Leaving the group would wait for the other ranks, which may wait for this one
    (on a GPU for as long as TIMEOUT). So torchrun sees it fail, and restarts all of them.
    """
    init_process_group()
    try:
        yield
    except BaseException as error:
        if rank_and_world_size()[1] == 1:
            raise
        code = report_error(error)
        sys.stdout.flush()
        os._exit(code)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def init_process_group() -> None:
    """Join the other processes if torchrun started this one. From then on only rank 0 prints.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        devices, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if processes > devices:
            found = f"{counted(processes, 'process')} for {counted(devices, 'GPU')}"
            raise InputError(f"{found}: give torchrun --nproc-per-node {devices}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(distributed.rendezvous("env://"))
    # Without a prefix, processes restarted on one machine look for the addresses of those that died.
    store = distributed.PrefixStore(f"restart{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def local_device(devices: Sequence[torch.device]) -> torch.device:
    """The one of a machine's devices that this process uses."""
    return devices[int(os.environ.get("LOCAL_RANK", 0)) % len(devices)]


def barrier() -> None:
    """Wait until all ranks are here."""
    if rank_and_world_size()[1] > 1:
        distributed.barrier()


def broadcast_object(value: T) -> T:
    """The value that rank 0 has."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def all_gather_dict(entries: dict) -> dict:
    """The entries of all ranks in one dict."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return entries
    parts = [{}] * world_size
    distributed.all_gather_object(parts, entries)
    return {key: value for part in parts for key, value in part.items()}


def all_reduce_any(value: bool, device: torch.device) -> bool:
    """Whether it is true on any rank."""
    if rank_and_world_size()[1] == 1:
        return value
    flag = torch.tensor(float(value), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """The sums over all ranks."""
    if rank_and_world_size()[1] == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def all_gather_rows(rows: torch.Tensor, total: int, device: torch.device) -> torch.Tensor:
    """Rows that were dealt to the ranks in turn (rank, rank + world_size, ...), back in order.

    Args:
        rows: (rows of this rank, features).
        total: rows of all ranks.
        device: that the ranks communicate by.

    Returns:
        (total, features), on the CPU.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return rows
    padded = rows.new_zeros(-(-total // world_size), *rows.shape[1:]).to(device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu()

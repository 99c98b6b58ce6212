"""Several processes that train one run, as torchrun starts them; one process is a team of one.

torchrun finds the others, restarts those that fail, and says who is who in the environment:
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
from local.base.console import counted, tell

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # that the others wait while the first chooses a bank


def join() -> None:
    """Meet the other processes where torchrun started this one; only the first of them prints.

    Raises:
        InputError: there are more of them than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        devices, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if processes > devices:
            found = f"{counted(processes, 'process')} for {counted(devices, 'GPU')}"
            raise InputError(f"{found}: give torchrun --nproc-per-node {devices}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(distributed.rendezvous("env://"))
    # Without a prefix, those who were restarted on one machine look for the addresses of those who are dead.
    store = distributed.PrefixStore(f"restart{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    if place()[0]:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Among the others, as long as all goes well.

    One that fails ends at once: parting from the others would wait for them, who may be waiting for it, on a GPU for
    as long as PATIENCE; so torchrun sees it fail, and starts all of them again.
    """
    join()
    try:
        yield
    except BaseException as error:
        if place()[1] == 1:
            raise
        code = tell(error)
        sys.stdout.flush()
        os._exit(code)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, world): which of how many this process is."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this process writes what all of them made."""
    return place()[0] == 0


def device_of(devices: Sequence[torch.device]) -> torch.device:
    """This process's own of a machine's devices."""
    return devices[int(os.environ.get("LOCAL_RANK", 0)) % len(devices)]


def wait() -> None:
    """Until all are here."""
    if place()[1] > 1:
        distributed.barrier()


def from_first(value: T) -> T:
    """What the first of them has."""
    if place()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def merged(entries: dict) -> dict:
    """The entries that all of them have."""
    if place()[1] == 1:
        return entries
    parts = [{}] * place()[1]
    distributed.all_gather_object(parts, entries)
    return {key: value for part in parts for key, value in part.items()}


def any_of(value: bool, device: torch.device) -> bool:
    """Whether it is true of one of them."""
    if place()[1] == 1:
        return value
    flag = torch.tensor(float(value), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def total_of(values: list[float], device: torch.device) -> list[float]:
    """The sums over all of them."""
    if place()[1] == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def gather(rows: torch.Tensor, total: int, device: torch.device) -> torch.Tensor:
    """(own rows, features) of every `world`-th of `total` rows each -> (total, features), in order, on the CPU."""
    world = place()[1]
    if world == 1:
        return rows
    most = -(-total // world)
    padded = rows.new_zeros(most, *rows.shape[1:]).to(device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu()

"""Run an encoder: batches of photos through all views, on GPUs or in the threads of a CPU.

When memory runs out, the batches become smaller. Where half precision overflows, full precision takes over.
"""

import copy
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from kernel.manifest import Preprocessing
from kernel.views import VIEWS, make_view, resize_batch

PHOTOS_PER_THREAD = 16  # that a thread embeds at a time on a CPU: with 8, small layers take a twentieth longer
SETTING_THREADS = threading.Lock()
# The wording of CUDA, of its libraries, and of CPU allocators on Linux and Windows. That no engine was found is what
# torch says where there was no memory for the workspace of any of cuDNN's convolutions.
OUT_OF_MEMORY = re.compile(
    "out of memory|STATUS_ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine|can't allocate memory|"
    "not enough memory"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the machine is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


class Encoder:
    """Embeds photos on one device, or on several devices of the same kind.

    Attributes:
        module: maps (batch, 3, size, size) normalised pixels to (batch, features).
        preprocessing: how photos become these pixels.
        features: length of an embedding.
        batch_size: photos per forward pass on all devices together; halved when memory runs out.
        shares_cores: whether the forward passes take the cores that also decode, as on a CPU.
        replicas: the module on each of `devices`.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, features: int, devices: Sequence[torch.device]):
        self.module, self.preprocessing, self.features, self.device = module, preprocessing, features, devices[0]
        self.replicas = [module, *(copy.deepcopy(module).to(device) for device in devices[1:])]
        self.devices = list(devices)
        self.shares_cores = self.device.type == "cpu"
        if self.shares_cores:  # few photos, because the budget is checked between batches
            self.batch_size = PHOTOS_PER_THREAD * torch.get_num_threads()
        else:
            self.batch_size = gpu_batch_size(preprocessing) * len(devices)
        # (pixels / 255 - mean) / std as one multiplication and one subtraction.
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self._constants = {torch.device("cpu"): (1 / (255 * std), mean / std)}  # and on other devices, once needed
        self._copies: dict[torch.device, torch.cuda.Stream] = {}
        self._threads: dict[int, ThreadPoolExecutor] = {}  # by their number; they end with the encoder
        self._tasks: list[Future] = []  # of these threads, perhaps not done
        self._stop = threading.Event()  # ends the tasks after the views that they are embedding
        self._launchers = [ThreadPoolExecutor(1, "launch") for _ in devices]  # used for several devices only

    def normalise(self, photos: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Normalise (batch, 3, size, size) uint8 to float32 on the device."""
        if device not in self._constants:
            self._constants[device] = tuple(value.to(device) for value in self._constants[torch.device("cpu")])
        photos = photos.to(device, non_blocking=True)
        rows = photos.permute(0, 2, 3, 1).flatten(2)  # with the channels side by side, as they are in memory
        factor, offset = (value.repeat(photos.shape[3]) for value in self._constants[device])
        return rows.float().mul_(factor).sub_(offset).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)

    def forward(self, pixels: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Embed (batch, 3, size, size) float32. Returns (batch, features) float32, L2-normalised."""
        pixels = pixels.to(next(module.parameters()).dtype, memory_format=torch.channels_last)
        return nn.functional.normalize(module(pixels).float(), dim=1)

    def embed(self, photos: torch.Tensor, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """Embed every view of every photo.

        Args:
            photos: (batch, 3, decoded_size, decoded_size) uint8, on the CPU.
            views: of ALL_VIEWS.

        Returns:
            (batch, views, features) float32, L2-normalised, on the CPU.
        """
        try:
            return self.submit(photos, views).result()
        except BaseException:  # Ctrl-C, for instance
            self.cancel()
            raise

    def submit(self, photos: torch.Tensor, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> "Submitted":
        """Start to `embed`. Returns as soon as the work is queued for a GPU or for the threads of a CPU."""
        dtype = next(self.module.parameters()).dtype
        return Submitted(self, views, self._start(photos, views), dtype)

    def cancel(self) -> None:
        """Let a CPU embed no more of what was submitted: Python ends only when its threads have."""
        self._stop.set()
        self._stop = threading.Event()
        for task in self._tasks:
            task.cancel()

    def warm_up(self) -> None:
        """Embed a batch of black photos, so that the libraries are ready for its size and the memory suffices for it.

        Raises:
            RuntimeError: there is no memory for a single photo.
        """
        side = self.preprocessing.decoded_size
        self.embed(torch.zeros((self.batch_size, 3, side, side), dtype=torch.uint8), [VIEWS["plain"]])

    def use_full_precision(self) -> None:
        """Cast the weights to fp32, because half precision overflows in this encoder."""
        if next(self.module.parameters()).dtype != torch.float32:  # not yet because of another batch
            print("half precision overflows in this encoder: continuing in full precision", flush=True)
        wait(self._tasks)
        for module in [self.module, *self.replicas]:
            module.float()

    @torch.inference_mode()
    def _embed_views(
        self, photos: torch.Tensor, views: Iterable[Callable], module: nn.Module, device: torch.device
    ) -> torch.Tensor:
        """Embed all views of photos on one device. Its local tensors are freed when it raises an error."""
        decoded, sizes = self.normalise(photos, device), self.preprocessing
        pixels = resize_batch(decoded, sizes.size)
        made = (make_view(view, decoded, pixels, sizes.larger_size) for view in views)
        return torch.stack([self.forward(each, module) for each in made], dim=1)

    def _start(self, photos: torch.Tensor, views: Sequence[Callable]) -> list["Started"]:
        """Start to embed photos, in smaller batches when the memory of a GPU runs out."""
        batches = []
        while len(photos):
            batch = photos[: self.batch_size]
            try:
                batches.append((batch, self._start_parts(batch, views)))
                photos = photos[len(batch) :]
                continue
            except RuntimeError as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
            # Outside the except clause, because the traceback keeps the tensors alive.
            self.halve_batches(self.batch_size)
        return batches

    def halve_batches(self, size: int) -> None:
        """From now on embed half as many photos at a time as `size`, for which there was no memory."""
        wait(self._tasks)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size <= self.batch_size:  # not yet because of another batch
            self.batch_size = (size + 1) // 2
            print(f"out of memory: continuing with batches of {self.batch_size} photos", flush=True)

    def _start_parts(self, photos: torch.Tensor, views: Sequence[Callable]) -> "list[GpuPart | CpuPart]":
        """Start to embed a part of a batch on each device.

        Each of several devices has a thread. A launch waits while about a thousand kernels are queued on its GPU
        (https://stackoverflow.com/q/53970187), which several views of a large batch exceed. In a single thread, the
        other GPUs would run out of work meanwhile.
        """
        start = self._compute if self.shares_cores else self._queue
        if len(self.devices) == 1:
            return [start(photos, views, self.module, self.device)]
        parts, modules = photos.chunk(len(self.devices)), [self.module, *self.replicas[1:]]
        each = zip(self._launchers, parts, modules, self.devices, strict=False)  # fewer parts than devices, perhaps
        return results_of([launcher.submit(start, part, views, *rest) for launcher, part, *rest in each])

    def _compute(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> "CpuPart":
        """Embed photos on the CPU, in as many threads as torch would use; a single photo with torch's own.

        Torch's threads meet after every operation. Each of these meetings waits for the slowest, such as one that
        another process has interrupted. Threads that embed photos of their own never wait for each other: one that is
        done takes photos of the next batch.
        """
        count, stop = torch.get_num_threads(), self._stop
        self._tasks = [task for task in self._tasks if not task.done()]
        if not self._tasks:  # no thread uses what is cached
            clear_eval_caches(module)
        if count == 1 or len(photos) == 1:
            task = Future()
            task.set_result(self._try_to_embed(photos, views, module, device))
            return CpuPart([task], threads=1)
        if count not in self._threads:
            self._threads[count] = ThreadPoolExecutor(count, "forward", use_one_torch_thread)
        part = CpuPart([], threads=count)
        for chunk in photos.tensor_split(min(len(photos), count)):
            until_stop = takewhile(lambda _: not stop.is_set(), views)
            task = self._threads[count].submit(self._try_to_embed, chunk, until_stop, module, device)
            self._tasks.append(task)
            part.tasks.append(task)
        return part

    def _try_to_embed(self, *arguments: object) -> tuple[torch.Tensor | RuntimeError, float]:
        """`_embed_views`, or its error where memory runs out; and the seconds that it took."""
        start = time.perf_counter()
        try:
            found = self._embed_views(*arguments)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found = error.with_traceback(None)  # which keeps the tensors alive
        return found, time.perf_counter() - start

    @torch.inference_mode()
    def _queue(
        self, photos: torch.Tensor, views: Sequence[Callable], module: nn.Module, device: torch.device
    ) -> "GpuPart":
        """Queue the work on a GPU. Nothing here waits for the GPU, and the copy runs beside the batch before.

        All batches have the same size, because cuDNN takes a second to set up the convolutions for another one.
        """
        clear_eval_caches(module)
        with torch.cuda.device(device):
            if device not in self._copies:
                self._copies[device] = torch.cuda.Stream()
            compute, copies = torch.cuda.current_stream(), self._copies[device]
            # To wait for a blocking event takes no core from the processes that decode.
            start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            start.record(compute)
            with torch.cuda.stream(copies):
                pixels = photos.to(device, non_blocking=True)
            compute.wait_stream(copies)
            pixels.record_stream(compute)  # its memory is reused only after the work that reads it
            pixels = pad_batch(pixels, -(-self.batch_size // len(self.devices)))
            # Without blocking, the result is copied into pinned memory.
            embedded = self._embed_views(pixels, views, module, device)[: len(photos)].to("cpu", non_blocking=True)
            end.record(compute)
            return GpuPart(embedded, start, end)


@dataclass(frozen=True)
class GpuPart:
    """The part of a batch that one GPU embeds.

    Attributes:
        embedded: (photos, views, features) float32 on the CPU, complete once `end` has happened.
    """

    embedded: torch.Tensor
    start: torch.cuda.Event
    end: torch.cuda.Event

    def wait(self) -> None:
        """Wait for the end."""
        self.end.synchronize()

    def result(self) -> tuple[torch.Tensor, float]:
        """`embedded`, and the seconds that the GPU took."""
        return self.embedded, self.start.elapsed_time(self.end) / 1000


@dataclass(frozen=True)
class CpuPart:
    """The part of a batch that the threads of a CPU embed.

    Attributes:
        tasks: for some of the photos each.
        threads: their number; they embed other batches too.
    """

    tasks: list[Future]
    threads: int

    def wait(self) -> None:
        """Wait for the end."""
        wait(self.tasks)

    def result(self) -> tuple[torch.Tensor | RuntimeError, float]:
        """`_try_to_embed` of all photos. Called once."""
        found, seconds = zip(*results_of(self.tasks), strict=True)
        return join_parts(found), sum(seconds) / self.threads


Started = tuple[torch.Tensor, list[GpuPart | CpuPart]]  # photos of a batch, and the parts of it, one on each device


class Submitted:
    """Photos that are being embedded.

    Attributes:
        seconds: that the devices took for them, known after `result`.
    """

    def __init__(self, encoder: Encoder, views: Sequence[Callable], batches: list[Started], dtype: torch.dtype) -> None:
        self._encoder, self._views, self._batches, self._dtype = encoder, views, batches, dtype
        self._embedded: torch.Tensor | None = None
        self.seconds = 0.0

    def result(self) -> torch.Tensor:
        """Wait for the embeddings: (photos, views, features) float32, L2-normalised, on the CPU."""
        if self._embedded is None:
            self._embedded = torch.cat([self._finish(*batch) for batch in self._batches])
        return self._embedded

    def _finish(self, photos: torch.Tensor, parts: list[GpuPart | CpuPart]) -> torch.Tensor:
        """Wait for a batch, and embed it again in smaller ones or in full precision if that is needed."""
        for part in parts:
            part.wait()
        found, seconds = zip(*[part.result() for part in parts], strict=True)
        self.seconds += max(seconds)
        embedded = join_parts(found)
        if isinstance(embedded, RuntimeError):
            if len(photos) == 1:
                raise embedded
            self._encoder.halve_batches(len(photos))
        elif self._dtype == torch.float32 or embedded.isfinite().all():
            return embedded
        else:
            self._encoder.use_full_precision()
        again = self._encoder.submit(photos, self._views)
        embedded = again.result()
        self.seconds += again.seconds
        return embedded


def join_parts(parts: Sequence[torch.Tensor | RuntimeError]) -> torch.Tensor | RuntimeError:
    """The embeddings of all parts, one after another; the error of one where memory ran out."""
    return next((part for part in parts if isinstance(part, RuntimeError)), None) or torch.cat(parts)


def results_of(tasks: list[Future]) -> list:
    """Wait for all tasks. Returns their results, and empties the list.

    A task that failed holds its error, whose traceback would hold the list. This cycle would keep the tensors of the
    task alive until Python next looks for cycles: too late to try again with less memory.
    """
    wait(tasks)
    results = []
    while tasks:
        results.append(tasks.pop(0).result())
    return results


def use_one_torch_thread() -> None:
    """Make torch compute in the calling thread alone: the initialiser of threads that run side by side.

    `torch.set_num_threads` also sets the number for all threads that start later, such as autograd's. A short thread
    sets that back. In a worker process, which has no such threads, `torch.set_num_threads(1)` does.
    """
    with SETTING_THREADS:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
        restorer.start()
        restorer.join()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute in so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pad_batch(photos: torch.Tensor, size: int) -> torch.Tensor:
    """Append black photos until there are `size`."""
    missing = max(0, size - len(photos))
    return nn.functional.pad(photos, (0, 0) * (photos.ndim - 1) + (0, missing)) if missing else photos


def gpu_batch_size(preprocessing: Preprocessing) -> int:
    """Photos that fill a GPU: 256 of 224 pixels, or as many larger ones as have the same number of pixels.

    A photo as decoded may have two and a half times the pixels, as for crops. For tiles it has up to 25 times as many,
    and so large a batch would take gigabytes.
    """
    side = max(preprocessing.size, preprocessing.larger_size)
    pixels = max(side**2, int(preprocessing.decoded_size**2 / 2.5))
    return max(32, min(256, 256 * 224**2 // pixels))


def clear_eval_caches(module: nn.Module) -> None:
    """Clear what layers cache in evaluation mode, so that it is computed from the current weights.

    timm's LeViT, TinyViT and EfficientFormer cache their attention biases until `train()` is called. Loading new
    weights, changing them in place or casting them does not clear the cache.
    """
    for layer in module.modules():
        if type(layer).train is nn.Module.train:
            continue
        modes = [(child, child.training) for child in layer.modules()]
        layer.train()
        for child, mode in modes:
            child.training = mode

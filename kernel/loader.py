"""Decode photos in worker processes, in order, ahead of the encoder.

A photo that hangs, or that kills its worker, costs only itself: another worker takes over. The pixels go through memory
that the processes share, from which a GPU copies them, and no lock is taken that a killed process could hold. Where
processes cannot serve, threads do the same work.
"""

import gc
import math
import mmap
import os
import queue
import select
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernel.forward import Encoder, gpu_batch_size, use_one_torch_thread
from kernel.inputs import InputError, call_libc
from kernel.manifest import Preprocessing
from kernel.photos import decode

FIRST_BATCH = 8  # photos by which the time on a CPU is planned; few, since the first pass may take long
AHEAD_BYTES = 1 << 30  # of pixels that are decoded ahead beside a GPU, while CUDA and the encoder start
AHEAD = 2  # batches that are decoded ahead beside it, at least
MOST_QUEUED = 8000  # photos that are decoded ahead or in use: a pipe holds 8,192 tasks
FEW_PHOTOS = 64  # up to so many are decoded in threads: processes take up to half a second to start and to end
PHOTO_SECONDS = 60.0  # without a decoded photo, after which those that are being decoded are given up
CHECK_SECONDS = 0.2  # between two looks at whether the workers live, while no photo arrives
REPLACEMENTS = 64  # workers that may be replaced; more are no accident
CAUSE_BYTES = 48  # of the name of an error, which is written instead of the pixels
STOP = (-1, -1)  # the task that ends a thread
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends


class PhotoLoader:
    """Decodes photos in order. Its workers start at once.

    Args:
        paths: of the photos.
        preprocessing: of the encoder.
        batch_size: of the largest batch.
        ahead: photos to decode beyond the requested batch. Beside a GPU they are decoded while it computes. On
            a CPU they would only take the cores from the forward passes earlier.

    Attributes:
        unreadable: path and cause of every photo so far that could not be read.
        taken: number of photos that have been requested so far.
    """

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, ahead: int) -> None:
        self.paths, self.preprocessing, self.ahead = paths, preprocessing, ahead
        self.unreadable: list[tuple[Path, str]] = []
        self.taken = 0
        # A photo's slot is its index modulo their number, so that the photos of a batch lie side by side.
        slots, side = min(2 * max(batch_size, FIRST_BATCH) + ahead, len(paths)), preprocessing.decoded_size
        workers = min(count_cores(), slots)
        self._pixels = shared_array((slots + REPLACEMENTS, side, side, 3), np.uint8)
        self._slots, self._spare = list(range(slots)), list(range(slots, slots + REPLACEMENTS))
        self._previous = 0  # first photo of the last batch
        self._freed = 0  # first photo whose slot is not free yet
        self._pinned = 0  # address of the pixels, if CUDA holds them in memory
        self._current = shared_array((workers + REPLACEMENTS,), np.int32)  # the photo that each worker decodes
        self._current[:] = -1
        self._queued = 0  # photos that have been given to the workers
        self._decoding: dict[int, int] = {}  # photo -> slot
        self._causes: dict[int, str] = {}  # photo -> why it could not be read
        self._uses_processes = len(paths) > FEW_PHOTOS and sys.platform == "linux" and hasattr(os, "fork")
        self._tasks, self._results = (RecordPipe() if self._uses_processes else queue.SimpleQueue() for _ in range(2))
        self._workers: list[WorkerProcess | WorkerThread | None] = []  # None for one that was replaced
        if self._uses_processes:
            release_freed_memory()
        for _ in range(workers):
            self._start_worker()
        self._give_out(ahead)

    @classmethod
    def for_gpus(
        cls, paths: Sequence[Path], preprocessing: Preprocessing, gpus: int, loaders: int = 1
    ) -> "PhotoLoader":
        """A loader for an encoder that will be opened on so many GPUs, or on the CPU.

        Args:
            loaders: that decode ahead at the same time, each in its part of AHEAD_BYTES.
        """
        batch_size = max(1, gpus) * gpu_batch_size(preprocessing)
        return cls(paths, preprocessing, batch_size, photos_ahead(batch_size, preprocessing, loaders) if gpus else 0)

    @classmethod
    def for_encoder(cls, paths: Sequence[Path], encoder: Encoder) -> "PhotoLoader":
        """A loader for an encoder that is open."""
        ahead = 0 if encoder.shares_cores else photos_ahead(encoder.batch_size, encoder.preprocessing)
        return cls(paths, encoder.preprocessing, encoder.batch_size, ahead)

    def __enter__(self) -> "PhotoLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(
        self, encoder: Encoder, remaining: Callable[[], float] = lambda: float("inf")
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batches of readable photos: their indices in `paths`, and (batch, 3, decoded_size, decoded_size) uint8.

        The pixels of a batch are valid until the second one after it is requested: their memory is used again.

        Args:
            encoder: whose batches they are. A GPU gets them in pinned memory, from which it copies while it computes.
            remaining: seconds that a batch may take. When it takes longer, as when a disk hangs, no more batches come.

        Raises:
            InputError: too many workers had to be replaced, and no time limit ends the waiting.
        """
        if encoder.shares_cores:
            self.ahead = 0
        if encoder.device.type == "cuda" and not self._pinned:
            self._pinned = pin_array(self._pixels)
        return self._take_all(encoder, remaining)

    def _take_all(self, encoder: Encoder, remaining: Callable[[], float]) -> Iterator[tuple[list[int], torch.Tensor]]:
        size = FIRST_BATCH if encoder.shares_cores else encoder.batch_size
        while self.taken < len(self.paths):
            try:
                indices, photos = self.take(size, remaining())
            except TimeoutError as error:
                if math.isinf(remaining()):
                    raise InputError(f"photos cannot be read: {error}") from error
                return
            if indices:
                yield indices, photos
            size = encoder.batch_size

    def take(self, count: int, seconds: float = float("inf")) -> tuple[list[int], torch.Tensor]:
        """The next photos, `count` at most: the indices of those that can be read, and their pixels.

        Args:
            count: the size of the largest batch at most.
            seconds: to wait for them, at most.

        Raises:
            TimeoutError: they took longer, or too many workers had to be replaced.
        """
        self._freed = self._previous
        end_of_slots = self.taken + len(self._slots) - self.taken % len(self._slots)
        self._give_out(self.taken + count)
        batch = range(self.taken, min(self.taken + count, self._queued, end_of_slots))
        self._wait_for(batch, seconds)
        self._previous, self.taken = batch.start, batch.stop
        causes = {photo: self._causes.pop(photo) for photo in batch if photo in self._causes}
        self.unreadable += [(self.paths[photo], cause) for photo, cause in causes.items()]
        self._give_out(self.taken + self.ahead)
        indices = [photo for photo in batch if photo not in causes]
        return indices, self._pixels_in([self._slots[photo % len(self._slots)] for photo in indices])

    def _pixels_in(self, slots: Sequence[int]) -> torch.Tensor:
        """(slots, 3, decoded_size, decoded_size) uint8, without a copy where the slots lie side by side."""
        first = slots[0] if slots else 0
        if slots == list(range(first, first + len(slots))):
            photos = torch.from_numpy(self._pixels[first : first + len(slots)])
        else:
            shape = (len(slots), *self._pixels.shape[1:])
            photos = torch.empty(shape, dtype=torch.uint8, pin_memory=bool(self._pinned))
            np.take(self._pixels, slots, axis=0, out=photos.numpy(), mode="clip")  # "raise" copies twice
        return photos.permute(0, 3, 1, 2)

    def close(self) -> None:
        """End the workers. A thread that hangs waits until the process ends."""
        workers = [worker for worker in self._workers if worker]
        if not self._uses_processes:
            with suppress(queue.Empty):
                while True:
                    self._tasks.get(timeout=0)
        for worker in workers:
            worker.stop(self._tasks)
        end = time.monotonic() + 1
        for worker in workers:
            worker.join(end)
        self._workers.clear()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = 0

    def _give_out(self, stop: int) -> None:
        """Queue the photos before `stop` for the workers, as far as there are free slots."""
        for photo in range(self._queued, min(stop, len(self.paths), self._freed + len(self._slots))):
            self._decoding[photo] = slot = self._slots[photo % len(self._slots)]
            self._tasks.put((photo, slot))
            self._queued += 1

    def _wait_for(self, batch: range, seconds: float) -> None:
        """Wait until every photo of the batch is decoded or given up.

        Raises:
            TimeoutError: see `take`.
        """
        end, silence = time.monotonic() + seconds, 0.0
        for photo in batch:
            while photo in self._decoding:
                timeout = min(CHECK_SECONDS, max(0, end - time.monotonic()))
                if self._receive(timeout):
                    silence = 0.0
                    while self._receive(0):
                        pass
                elif time.monotonic() >= end:
                    raise TimeoutError("no time is left")
                else:
                    silence += timeout  # added up, since the clock runs on while the whole machine is stopped
                    self._replace_dead_workers()
                    if silence >= PHOTO_SECONDS:
                        silence = 0.0
                        self._give_up_photos()

    def _receive(self, timeout: float) -> bool:
        """Take in the next result. Returns False if none arrives in time."""
        try:
            photo, is_readable = self._results.get(timeout=timeout)
        except queue.Empty:
            return False
        slot = self._decoding.pop(photo, None)
        if not (slot is None or is_readable):  # None if it was given up
            self._causes[photo] = self._pixels[slot].tobytes()[:CAUSE_BYTES].rstrip(b"\0").decode()
        return True

    def _replace_dead_workers(self) -> None:
        """Give up a photo that killed its worker, by its size or by a fault of a decoder."""
        causes = {index: worker.cause_of_death() for index, worker in enumerate(self._workers) if worker}
        if any(causes.values()):
            while self._receive(0):  # what they had decoded before
                pass
        for index, cause in causes.items():
            if cause:
                self._replace_worker(index, cause)

    def _give_up_photos(self) -> None:
        """Give up the photos that the workers have been decoding for too long."""
        busy = [
            index
            for index, worker in enumerate(self._workers)
            if worker and int(self._current[index]) in self._decoding
        ]
        for index in busy:
            self._workers[index].abandon()
            self._replace_worker(index, "TimeoutError")
        if not busy:  # a worker was killed between taking a photo from the queue and saying so
            for task in self._decoding.items():
                self._tasks.put(task)

    def _replace_worker(self, index: int, cause: str) -> None:
        """Start another worker, and give up the photo of this one.

        Raises:
            TimeoutError: too many workers had to be replaced.
        """
        self._workers[index] = None
        photo = int(self._current[index])
        if self._decoding.pop(photo, None) is not None:
            self._causes[photo] = cause
            # Its slot is not used again, since a thread that was abandoned may still write into it.
            self._slots[photo % len(self._slots)] = self._spare.pop()
        if len(self._workers) == len(self._current) or not self._spare:
            raise TimeoutError(
                f"{REPLACEMENTS} of them hung or ended the process that read them; check disk and memory"
            )
        self._start_worker()

    def _start_worker(self) -> None:
        current = self._current[len(self._workers) :]
        work = partial(decode_photos, self._tasks, self._results, current, self._pixels, self.paths, self.preprocessing)
        worker = None
        if self._uses_processes:
            with suppress(OSError):  # no memory for another process, or too many of them
                worker = WorkerProcess(work)
        self._workers.append(worker or WorkerThread(work))


def photos_ahead(batch_size: int, preprocessing: Preprocessing, loaders: int = 1) -> int:
    """How many photos each of so many loaders decodes ahead beside a GPU: whole batches, as memory and a pipe allow."""
    fitting = AHEAD_BYTES // (loaders * 3 * preprocessing.decoded_size**2)
    return max(AHEAD, min(fitting, MOST_QUEUED - 2 * batch_size) // batch_size) * batch_size


def decode_photos(
    tasks: "RecordPipe | queue.SimpleQueue",
    results: "RecordPipe | queue.SimpleQueue",
    current: np.ndarray,
    pixels: np.ndarray,
    paths: Sequence[Path],
    preprocessing: Preprocessing,
) -> None:
    """The work of one worker: decode photos until it is stopped.

    Args:
        tasks: pairs of a photo, as an index of `paths`, and the slot of its pixels.
        results: gets pairs of a photo, and whether it could be read. If not, its slot gets the name of the error.
        current: its first element shows the photo that is being decoded.
        pixels: (slots, decoded_size, decoded_size, 3) uint8.
    """
    while (task := tasks.get()) != STOP:
        photo, slot = task
        current[0] = photo
        decoded = decode(paths[photo], preprocessing)
        is_readable = isinstance(decoded, np.ndarray)
        if is_readable:
            pixels[slot] = decoded
        else:
            pixels[slot].reshape(-1)[:CAUSE_BYTES] = np.frombuffer(decoded.encode().ljust(CAUSE_BYTES, b"\0"), np.uint8)
        results.put((photo, is_readable))


class WorkerProcess:
    """A process that does some work until it is stopped. It prints nothing, and ends with this process."""

    def __init__(self, work: Callable[[], None]) -> None:
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks the work does not need
            self.pid = os.fork()
        if not self.pid:
            try:
                end_with_parent(parent)
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                torch.set_num_threads(1)
                gc.freeze()  # a collection would copy all pages that are shared with the parent
                work()
            finally:
                os._exit(1)

    def cause_of_death(self) -> str | None:
        """How the process has ended, such as "SIGKILL"; None while it lives."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # another part of the program has waited for it
            return "ChildProcessError"
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        return signal.Signals(-code).name if code < 0 else f"exit {code}"

    def abandon(self) -> None:
        """Kill the process. If its disk hangs, it ends when that answers."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def stop(self, _: object) -> None:
        """Kill the process: it holds nothing."""
        self.abandon()

    def join(self, end: float) -> None:
        """Wait until it has ended, until `end` by the monotonic clock at most."""
        while self.cause_of_death() is None and time.monotonic() < end:
            time.sleep(0.001)


class WorkerThread:
    """The same in a thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        def run() -> None:
            use_one_torch_thread()
            work()

        self.thread = threading.Thread(target=run, name="decode", daemon=True)  # one that hangs keeps no process alive
        self.thread.start()

    def cause_of_death(self) -> None:
        """A thread cannot be killed."""

    def abandon(self) -> None:
        """Nothing can end it while it hangs."""

    def stop(self, tasks: "RecordPipe | queue.SimpleQueue") -> None:
        """Let the thread end after the tasks that are queued."""
        tasks.put(STOP)

    def join(self, end: float) -> None:
        """Wait until it has ended, until `end` by the monotonic clock at most."""
        self.thread.join(max(0, end - time.monotonic()))


class RecordPipe:
    """A queue of pairs of integers between processes, without a lock: each may be killed at any moment.

    Linux writes and reads a few bytes of a pipe in one step. Records divide a page of memory, so that none lies on two.
    """

    RECORD = struct.Struct("=ii")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.poll = select.poll()
        self.poll.register(self.reader, select.POLLIN)

    def __del__(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    def put(self, record: tuple[int, int]) -> None:
        os.write(self.writer, self.RECORD.pack(*record))

    def get(self, timeout: float | None = None) -> tuple[int, int]:
        """The next record. Raises queue.Empty if none comes in `timeout` seconds; None waits without a limit."""
        if timeout is not None and not self.poll.poll(1000 * timeout):
            raise queue.Empty
        return self.RECORD.unpack(os.read(self.reader, self.RECORD.size))


def shared_array(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that processes share which are forked from this one. Pages that nobody uses take no memory."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)


def release_freed_memory() -> None:
    """Return freed memory to the system before processes are forked.

    A fork makes memory copy-on-write: this process would copy every page of it before it writes to that page again.
    """
    call_libc("malloc_trim", 0)


def pin_array(array: np.ndarray) -> int:
    """Pin the memory of an array, so that GPUs copy from it while the program goes on.

    Returns:
        Its address, by which CUDA releases it; 0 if CUDA cannot pin it. Then the program waits for each copy.
    """
    address, for_all_gpus = array.ctypes.data, 1
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, array.nbytes, for_all_gpus))
        return address
    except torch.cuda.CudaError:
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)  # the next operation would raise the error again
        return 0


def count_cores() -> int:
    """The cores that this process may use; under torchrun, its part of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def end_with_parent(parent: int) -> None:
    """Let a worker process live until its parent ends, and no longer, even if that is killed.

    It leaves the group of processes that Ctrl-C and torchrun signal: the signal would kill it before its parent has
    written what it must.

    Args:
        parent: the process id, since the parent may have ended already.
    """
    os.setsid()
    call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # Linux alone has it
    if os.getppid() != parent:
        os._exit(1)

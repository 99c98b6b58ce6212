"""Decode photos in worker processes, in order, ahead of the encoder.

A photo that hangs, or that kills its worker, costs only itself: another worker takes over. The pixels go through memory
that the processes share, and no lock is taken that a killed process could hold. Where processes cannot serve, threads
do the same work.
"""

import ctypes
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

from kernel.encoders import Encoder, gpu_batch_size, use_one_torch_thread
from kernel.inputs import InputError
from kernel.manifest import Preprocessing
from kernel.photos import decode

FIRST_BATCH = 8  # photos by which the time is planned; few, since on a slow machine the first pass is the slowest
AHEAD = 2  # batches that are decoded ahead beside a GPU
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
            a CPU they would take the cores from the forward passes.

    Attributes:
        unreadable: path and cause of every photo so far that could not be read.
        taken: number of photos that have been requested so far.
    """

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, ahead: int) -> None:
        self.paths, self.preprocessing, self.ahead = paths, preprocessing, ahead
        self.unreadable: list[tuple[Path, str]] = []
        self.taken = 0
        slots, side = min(max(batch_size, FIRST_BATCH) + ahead, len(paths)), preprocessing.decoded_size
        workers = min(count_cores(), slots)
        self._pixels = shared_array((slots + REPLACEMENTS, side, side, 3), np.uint8)
        self._free, self._spare = list(range(slots)), list(range(slots, slots + REPLACEMENTS))
        self._current = shared_array((workers + REPLACEMENTS,), np.int32)  # the photo that each worker decodes
        self._current[:] = -1
        self._queued = 0  # photos that have been given to the workers
        self._decoding: dict[int, int] = {}  # photo -> slot
        self._decoded: dict[int, int] = {}  # photo -> slot
        self._causes: dict[int, str] = {}  # photo -> why it could not be read
        self._uses_processes = len(paths) > FEW_PHOTOS and sys.platform == "linux" and hasattr(os, "fork")
        self._tasks, self._results = (RecordPipe() if self._uses_processes else queue.SimpleQueue() for _ in range(2))
        self._workers: list[WorkerProcess | WorkerThread | None] = []  # None for one that was replaced
        for _ in range(workers):
            self._start_worker()
        self._give_out(ahead)

    @classmethod
    def for_gpus(cls, paths: Sequence[Path], preprocessing: Preprocessing, gpus: int) -> "PhotoLoader":
        """A loader for an encoder that will be opened on so many GPUs, or on the CPU."""
        batch_size = max(1, gpus) * gpu_batch_size(preprocessing)
        return cls(paths, preprocessing, batch_size, AHEAD * batch_size if gpus else 0)

    @classmethod
    def for_encoder(cls, paths: Sequence[Path], encoder: Encoder) -> "PhotoLoader":
        """A loader for an encoder that is open."""
        return cls(paths, encoder.preprocessing, encoder.batch_size, AHEAD * encoder.batch_size * encoder.queued)

    def __enter__(self) -> "PhotoLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(
        self, encoder: Encoder, remaining: Callable[[], float] = lambda: float("inf")
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batches of readable photos: their indices in `paths`, and (batch, 3, decoded_size, decoded_size) uint8.

        Args:
            encoder: whose batches they are. A GPU gets them in pinned memory.
            remaining: seconds that a batch may take. When it takes longer, as when a disk hangs, no more batches come.

        Raises:
            InputError: too many workers had to be replaced, and no time limit ends the waiting.
        """
        self.ahead *= encoder.queued
        size = FIRST_BATCH
        while self.taken < len(self.paths):
            try:
                indices, photos = self.take(size, remaining(), pin=encoder.device.type == "cuda")
            except TimeoutError as error:
                if math.isinf(remaining()):
                    raise InputError(f"photos cannot be read: {error}") from error
                return
            if indices:
                yield indices, photos
            size = encoder.batch_size

    def take(self, count: int, seconds: float = float("inf"), pin: bool = False) -> tuple[list[int], torch.Tensor]:
        """The next photos, `count` at most: the indices of those that can be read, and their pixels.

        Args:
            seconds: to wait for them, at most.
            pin: whether to put the pixels in pinned memory, from which a GPU copies while it computes.

        Raises:
            TimeoutError: they took longer, or too many workers had to be replaced.
        """
        self._give_out(self.taken + count)
        batch = range(self.taken, min(self.taken + count, self._queued))
        self._wait_for(batch, seconds)
        self.taken = batch.stop
        self.unreadable += [(self.paths[photo], self._causes.pop(photo)) for photo in batch if photo in self._causes]
        indices = [photo for photo in batch if photo in self._decoded]
        slots = [self._decoded.pop(photo) for photo in indices]
        photos = torch.empty((len(slots), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        np.take(self._pixels, np.array(slots, np.intp), axis=0, out=photos.numpy(), mode="clip")  # "raise" copies twice
        self._free += slots
        self._give_out(self.taken + self.ahead)
        return indices, photos.permute(0, 3, 1, 2)

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

    def _give_out(self, stop: int) -> None:
        """Queue the photos before `stop` for the workers, as far as there are slots."""
        while self._queued < min(stop, len(self.paths)) and self._free:
            self._decoding[self._queued] = slot = self._free.pop()
            self._tasks.put((self._queued, slot))
            self._queued += 1

    def _wait_for(self, batch: range, seconds: float) -> None:
        """Wait until every photo of the batch is decoded or given up.

        Raises:
            TimeoutError: see `take`.
        """
        end, silence = time.monotonic() + seconds, 0.0
        while any(photo in self._decoding for photo in batch):
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
        if slot is None:  # it was given up
            return True
        if is_readable:
            self._decoded[photo] = slot
        else:
            self._causes[photo] = self._pixels[slot].tobytes()[:CAUSE_BYTES].rstrip(b"\0").decode()
            self._free.append(slot)
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
            # Its slot is not used again, since a thread that was abandoned may still write into it.
            self._causes[photo] = cause
            self._free.append(self._spare.pop())
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
    with suppress(OSError, AttributeError, TypeError):  # Linux alone has prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

"""An encoder embeds the same on every device, in all threads and batches, and when memory runs out."""

import gc
import itertools
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kernel.forward import Encoder, gpu_batch_size, is_out_of_memory, pad_batch, use_one_torch_thread
from kernel.views import CROP, VIEWS
from tests.manifests import encoder_spec


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["by channel", "by pixel, as decoded"])
def test_pixels_are_normalised_by_channel(encoder, order):
    photos = torch.randint(0, 256, (2, 3, 3, 3), dtype=torch.uint8).permute(order)
    mean, std = (
        torch.tensor(each).view(1, 3, 1, 1) for each in (encoder.preprocessing.mean, encoder.preprocessing.std)
    )
    found = encoder.normalise(photos, torch.device("cpu"))
    assert torch.allclose(found, (photos / 255 - mean) / std, atol=1e-6)


class Watched(torch.nn.Module):
    """Notes for each forward pass how many photos it had, in which thread, and how many threads torch used there."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner, self.passes = inner, []

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        self.passes.append((len(photos), threading.current_thread(), torch.get_num_threads()))
        return self.inner(photos)


@pytest.mark.parametrize(
    ("photos", "parts"), [(2, [1, 1]), (8, [4, 4]), (13, [7, 6]), (32, [16, 16]), (35, [16, 16, 2, 1])]
)
def test_on_a_cpu_threads_embed_parts_of_a_batch_each_with_one_thread_of_torch(encoder, two_threads, photos, parts):
    batch, views = torch.randint(0, 256, (photos, 3, 64, 64), dtype=torch.uint8), [VIEWS["plain"], VIEWS["rotate15"]]
    watched = Encoder(Watched(encoder.module), encoder.preprocessing, encoder.features, encoder.devices)
    found = watched.embed(batch, views)
    assert sorted((size for size, _, _ in watched.module.passes), reverse=True) == sorted(2 * parts, reverse=True)
    assert {torch_threads for _, _, torch_threads in watched.module.passes} == {1}
    assert threading.current_thread() not in {thread for _, thread, _ in watched.module.passes}
    assert torch.equal(watched.embed(batch, views), found)
    one_by_one = torch.cat([watched.embed(photo[None], views) for photo in batch])
    assert torch.allclose(found, one_by_one, atol=1e-5)


def test_a_single_photo_is_embedded_with_all_threads_of_torch(encoder, two_threads):
    watched = Encoder(Watched(encoder.module), encoder.preprocessing, encoder.features, encoder.devices)
    watched.embed(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [VIEWS["plain"]])
    assert watched.module.passes == [(1, threading.current_thread(), 2)]


def test_threads_with_one_thread_of_torch_leave_all_other_threads_theirs(two_threads):
    with ThreadPoolExecutor(3, initializer=use_one_torch_thread) as threads:
        assert list(threads.map(lambda _: torch.get_num_threads(), range(9))) == [1] * 9
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


def test_the_threads_of_an_encoder_end_with_it(encoder, two_threads):
    watched = Encoder(Watched(encoder.module), encoder.preprocessing, encoder.features, encoder.devices)
    watched.embed(torch.zeros(16, 3, 64, 64, dtype=torch.uint8), [VIEWS["plain"]])
    threads = {thread for _, thread, _ in watched.module.passes}
    del watched
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_ctrl_c_waits_only_for_the_views_that_are_being_made(encoder, two_threads):
    interrupted, turns = threading.Event(), itertools.count()

    def interrupt(pixels: torch.Tensor) -> torch.Tensor:
        if next(turns) == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert interrupted.wait(60)
        return pixels

    watched = Encoder(Watched(encoder.module), encoder.preprocessing, encoder.features, encoder.devices)
    with pytest.raises(KeyboardInterrupt):
        watched.embed(torch.zeros(16, 3, 64, 64, dtype=torch.uint8), [interrupt, *[VIEWS["plain"]] * 9])
    interrupted.set()
    for threads in watched._threads.values():
        threads.shutdown()
    assert len(watched.module.passes) <= 2  # of 20


def test_a_thread_that_is_done_takes_photos_of_the_next_batch(encoder, two_threads):
    """One thread is held up until the other has embedded its own half of the batch and all of the next one."""
    others, turns = threading.Semaphore(0), itertools.count()

    def hold_up_one(pixels: torch.Tensor) -> torch.Tensor:
        if next(turns) == 0:
            for _ in range(3):
                assert others.acquire(timeout=60)
        else:
            others.release()
        return pixels

    first, second = torch.randint(0, 256, (2, 16, 3, 64, 64), dtype=torch.uint8)
    submitted = [encoder.submit(photos, [hold_up_one]) for photos in (first, second)]
    for batch, photos in zip(submitted, (first, second), strict=True):
        assert torch.equal(batch.result(), encoder.embed(photos, [VIEWS["plain"]]))
        assert batch.seconds > 0


class Hungry(torch.nn.Module):
    """A module whose device has memory for `holds` photos."""

    def __init__(self, inner: torch.nn.Module, holds: int):
        super().__init__()
        self.inner, self.holds = inner, holds

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        if len(photos) > self.holds:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return self.inner(photos)


def test_out_of_memory_halves_the_batch_and_gives_the_same_embeddings(encoder, one_thread, capsys):
    photos = torch.randint(0, 256, (13, 3, 64, 64), dtype=torch.uint8)
    views = [VIEWS["plain"], VIEWS["hflip"]]
    hungry = Encoder(Hungry(encoder.module, 4), encoder.preprocessing, encoder.features, [encoder.device])
    assert torch.allclose(hungry.embed(photos, views), encoder.embed(photos, views), atol=1e-5)
    assert hungry.batch_size <= 4
    assert "out of memory: continuing with batches of 4" in capsys.readouterr().out


def test_memory_that_runs_out_in_one_of_several_threads_halves_the_batch_too(encoder, two_threads, capsys):
    photos = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    hungry = Encoder(Hungry(encoder.module, 2), encoder.preprocessing, encoder.features, [encoder.device])
    assert torch.allclose(hungry.embed(photos, [VIEWS["plain"]]), encoder.embed(photos, [VIEWS["plain"]]), atol=1e-5)
    assert hungry.batch_size == 4
    assert "out of memory: continuing with batches of 4" in capsys.readouterr().out


class Leaking(Hungry):
    """The same. Fails when the pixels for which there was no memory are still alive at the next attempt."""

    def __init__(self, inner: torch.nn.Module, holds: int):
        super().__init__(inner, holds)
        self.batch_size, self.pixels = 0, []

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        if len(photos) != self.batch_size:
            assert not any(pixels() is not None for pixels in self.pixels)
            self.batch_size, self.pixels = len(photos), []
        self.pixels.append(weakref.ref(photos))
        return super().forward(photos)

    def __deepcopy__(self, memo: dict) -> "Leaking":
        return self


@pytest.mark.parametrize("devices", [1, 2])
def test_what_an_attempt_without_memory_has_allocated_is_freed_before_the_next(encoder, two_threads, devices):
    photos, leaking = torch.zeros(16, 3, 64, 64, dtype=torch.uint8), Leaking(encoder.module, 1)
    cpus = [torch.device("cpu"), torch.device("cpu", 0)][:devices]
    hungry = Encoder(leaking, encoder.preprocessing, encoder.features, cpus)
    gc.collect()
    gc.disable()
    try:
        hungry.embed(photos, [VIEWS["plain"]])
    finally:
        gc.enable()
    assert hungry.batch_size == 2 * devices


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_every_wording_of_a_gpu_without_memory_is_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("threads", ["one_thread", "two_threads"])
def test_memory_that_runs_out_while_another_batch_is_queued_costs_neither(encoder, request, capsys, threads):
    request.getfixturevalue(threads)
    first, second = torch.randint(0, 256, (2, 13, 3, 64, 64), dtype=torch.uint8)
    views = [VIEWS["plain"], VIEWS["hflip"]]
    hungry = Encoder(Hungry(encoder.module, 13), encoder.preprocessing, encoder.features, [encoder.device])
    submitted = [hungry.submit(first, views)]
    submitted[0].result()
    hungry.module.holds = 4 if threads == "one_thread" else 2  # each of two threads embeds half of a batch
    submitted += [hungry.submit(second, views), hungry.submit(first, views)]
    for batch, photos in zip(submitted, (first, second, first), strict=True):
        assert torch.allclose(batch.result(), encoder.embed(photos, views), atol=1e-5)
        assert batch.seconds > 0
    assert capsys.readouterr().out.count("out of memory") == 2  # from 13 to 7 and from 7 to 4, and not once for each


def test_one_photo_that_does_not_fit_and_any_other_failure_are_errors(encoder):
    photos = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    full = Encoder(Hungry(encoder.module, 0), encoder.preprocessing, encoder.features, [encoder.device])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        full.embed(photos, [VIEWS["plain"]])
    with pytest.raises(RuntimeError, match="size"):
        encoder.embed(photos, [lambda pixels: pixels[:, :2]])


def test_a_batch_for_a_gpu_is_filled_up_with_black_photos():
    photos = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    filled = pad_batch(photos, 5)
    assert torch.equal(filled[:3], photos)
    assert not filled[3:].any()
    assert filled.shape == (5, 3, 8, 8)
    assert filled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pad_batch(photos, 3), photos)


def test_several_devices_give_the_same_embeddings_as_one(encoder):
    photos = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    both = Encoder(encoder.module, encoder.preprocessing, encoder.features, [encoder.device, torch.device("cpu", 0)])
    for count in (1, 2, 5):
        found = both.embed(photos[:count], [VIEWS["plain"]])
        assert torch.allclose(found, encoder.embed(photos[:count], [VIEWS["plain"]]), atol=1e-5)


class Large(torch.nn.Module):
    """A module that overflows in half precision on all photos but black ones."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), 300.0))

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        return (photos.mean(dim=(2, 3)) + 2) * self.weight * self.weight * self.weight


def test_an_encoder_that_overflows_in_half_precision_continues_in_full_precision(encoder, capsys):
    bright, black = torch.randint(1, 256, (3, 3, 64, 64), dtype=torch.uint8), torch.zeros(2, 3, 64, 64).to(torch.uint8)
    half = Encoder(Large().half().requires_grad_(False), encoder.preprocessing, 3, [encoder.device])
    full = Encoder(Large().requires_grad_(False), encoder.preprocessing, 3, [encoder.device])
    views, batches = [VIEWS["plain"]], (black, bright, black, bright)
    # The last of them are queued in half precision, before the first result is known.
    submitted = [half.submit(photos, views) for photos in batches]
    for batch, photos in zip(submitted, batches, strict=True):
        assert torch.allclose(batch.result(), full.embed(photos, views), atol=1e-2 if photos is black else 1e-5)
    assert capsys.readouterr().out.count("overflows") == 1


@pytest.mark.parametrize("size", [96, 224, 256, 336, 448])
def test_a_gpus_batch_is_as_large_with_crops_as_without_and_small_with_tiles(size):
    plain = replace(encoder_spec().preprocessing, size=size)
    crops, tiles = replace(plain, cropped_size=round(size / CROP)), replace(plain, cropped_size=5 * size)
    assert gpu_batch_size(crops) == gpu_batch_size(plain) == max(64, min(256, 256 * 224**2 // size**2))
    assert gpu_batch_size(tiles) == (139 if size == 96 else 32)

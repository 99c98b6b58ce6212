"""Photos come in order, whatever hangs, dies or cannot be read, from processes as from threads."""

import os
import queue
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel import loader as module
from kernel.inputs import InputError
from kernel.loader import STOP, PhotoLoader, RecordPipe, shared_array
from kernel.manifest import Preprocessing
from kernel.photos import decode
from tests.conftest import photo
from tests.processes import FORKS

CROP = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875, "crop")
needs_processes = pytest.mark.skipif(sys.platform != "linux", reason="processes serve on Linux alone")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return [photo(folder / f"{number}.jpg", number) for number in range(30)]


@pytest.fixture(params=[pytest.param("processes", marks=needs_processes), "threads"])
def workers(request, monkeypatch):
    monkeypatch.setattr(module, "FEW_PHOTOS", 0 if request.param == "processes" else 10**9)
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.02)
    return request.param


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(module, "FEW_PHOTOS", 0)
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.02)


def take_all(loader: PhotoLoader, size: int) -> tuple[list[int], torch.Tensor]:
    indices, pixels = [], []
    while loader.taken < len(loader.paths):
        photos, batch = loader.take(size)
        indices += photos
        pixels.append(batch.clone())  # its memory is used again
    return indices, torch.cat(pixels)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("ahead", [0, 5, 100])
@pytest.mark.parametrize("size", [1, 7, 30, 31])
def test_photos_come_in_order_with_the_pixels_of_decode(paths, workers, size, ahead):
    with PhotoLoader(paths, CROP, size, ahead) as loader:
        indices, pixels = take_all(loader, size)
    assert indices == list(range(30))
    assert pixels.shape == (30, 3, 64, 64)
    for index in (0, 11, 29):
        assert np.array_equal(pixels[index].permute(1, 2, 0), decode(paths[index], CROP))
    assert loader.unreadable == []


def test_an_unreadable_photo_is_named_with_its_cause_and_costs_only_itself(paths, workers, tmp_path):
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    missing = tmp_path / "missing.jpg"
    with PhotoLoader([paths[0], missing, paths[1], tmp_path / "text.jpg", paths[2]], CROP, 2, 0) as loader:
        indices, pixels = take_all(loader, 2)
    assert indices == [0, 2, 4]
    assert loader.unreadable == [(missing, "FileNotFoundError"), (tmp_path / "text.jpg", "UnidentifiedImageError")]
    assert np.array_equal(pixels[1].permute(1, 2, 0), decode(paths[1], CROP))


def test_photos_are_decoded_ahead_of_the_batch_that_is_asked_for_and_no_further(paths, workers):
    with PhotoLoader(paths, CROP, batch_size=8, ahead=10) as loader:
        assert loader.take(8)[0] == list(range(8))
        wait_until(lambda: not loader._receive(0) and not loader._decoding)
        assert loader._queued == 18
    with PhotoLoader(paths, CROP, batch_size=8, ahead=0) as loader:
        loader.take(8)
        assert loader._queued == 8


def test_beside_a_gpu_photos_are_decoded_while_the_encoder_is_opened_as_memory_and_a_pipe_allow(paths, processes):
    def queued(photos: int, size: int, gpus: int, loaders: int) -> int:
        with PhotoLoader.for_gpus((paths * 700)[:photos], replace(CROP, size=size), gpus, loaders) as loader:
            return loader._queued  # before a batch is asked for

    assert queued(photos=3000, size=64, gpus=1, loaders=1) == 3000
    assert queued(photos=20000, size=64, gpus=1, loaders=1) == 29 * 256  # of 7,488
    assert queued(photos=20000, size=448, gpus=1, loaders=1) == 27 * 64  # of 1,783
    assert queued(photos=20000, size=448, gpus=1, loaders=4) == 6 * 64  # of 445
    assert queued(photos=20000, size=448, gpus=16, loaders=40) == 2 * 16 * 64
    assert queued(photos=3000, size=64, gpus=0, loaders=1) == 0


def test_the_pixels_of_a_batch_stay_until_the_second_one_after_it_is_requested(paths, workers):
    expected = [decode(path, CROP) for path in paths]
    with PhotoLoader(paths, CROP, batch_size=8, ahead=3) as loader:  # 19 slots, which do not divide into batches
        batches = []
        while loader.taken < 30:
            batches.append(loader.take(4))
            wait_until(lambda: not loader._receive(0) and not loader._decoding)  # all that is decoded ahead
            for indices, pixels in batches[-2:]:
                assert np.array_equal(pixels.permute(0, 2, 3, 1), [expected[index] for index in indices])
    assert [index for indices, _ in batches for index in indices] == list(range(30))


@pytest.fixture
def hanging(tmp_path):
    """A photo whose reading never ends: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "hangs.jpg")
    yield tmp_path / "hangs.jpg"
    for _ in range(100):  # lets a thread that reads it end
        try:
            os.close(os.open(tmp_path / "hangs.jpg", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe stands for a photo on a disk that hangs")
def test_a_photo_that_hangs_is_given_up_and_costs_only_itself(paths, workers, hanging, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_SECONDS", 0.3)
    with PhotoLoader([*paths[:10], hanging, *paths[10:]], CROP, 6, 6) as loader:
        indices, pixels = take_all(loader, 6)
    assert indices == [*range(10), *range(11, 31)]
    assert loader.unreadable == [(hanging, "TimeoutError")]
    for index in (9, 10, 29):
        assert np.array_equal(pixels[index].permute(1, 2, 0), decode(paths[index], CROP))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe stands for a photo on a disk that hangs")
def test_photos_are_waited_for_no_longer_than_there_is_time(paths, workers, hanging):
    with PhotoLoader([*paths[:4], hanging, *paths[4:]], CROP, 4, 0) as loader:
        assert loader.take(4, 60.0)[0] == [0, 1, 2, 3]
        with pytest.raises(TimeoutError):
            loader.take(4, 0.2)


def decode_or_die(path, preprocessing, die):
    """`decode`, but some photos end their process."""
    return die() if path.name == "dies.jpg" else decode(path, preprocessing)


@needs_processes
@pytest.mark.parametrize(
    ("die", "cause"),
    [(lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"), (lambda: os._exit(3), "exit 3")],
    ids=["out of memory", "a fault of a decoder"],
)
def test_a_photo_that_kills_its_worker_costs_only_itself(paths, processes, tmp_path, monkeypatch, die, cause):
    monkeypatch.setattr(module, "decode", partial(decode_or_die, die=die))
    deadly = tmp_path / "dies.jpg"
    mixed = [deadly, *paths[:10], deadly, deadly, *paths[10:], deadly]
    with PhotoLoader(mixed, CROP, 5, 10) as loader:
        indices, pixels = take_all(loader, 5)
    assert indices == [*range(1, 11), *range(13, 33)]
    assert loader.unreadable == [(deadly, cause)] * 4
    for row, index in ((0, 0), (9, 9), (10, 10), (29, 29)):
        assert np.array_equal(pixels[row].permute(1, 2, 0), decode(paths[index], CROP))


@needs_processes
def test_when_every_photo_kills_its_worker_an_error_says_so(paths, processes, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "decode", partial(decode_or_die, die=lambda: os._exit(3)))
    monkeypatch.setattr(module, "REPLACEMENTS", 5)
    many = [tmp_path / "dies.jpg"] * 100
    with PhotoLoader(many, CROP, 8, 0) as loader, pytest.raises(InputError, match="5 of them hung or ended"):
        list(loader.batches(encoder))
    with PhotoLoader(many, CROP, 8, 0) as loader:
        assert list(loader.batches(encoder, lambda: 60.0)) == []


@needs_processes
def test_a_worker_killed_before_it_says_what_it_decodes_costs_no_photo(paths, processes, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_SECONDS", 0.2)
    loader = PhotoLoader(paths, CROP, 5, 0)
    for worker in loader._workers:
        worker.abandon()
        worker.join(time.monotonic() + 10)
    loader._give_out(5)
    for _ in range(3):
        loader._tasks.get()  # as a worker that is killed at once
    with loader:
        indices, _ = take_all(loader, 5)
    assert indices == list(range(30))


@needs_processes
def test_where_no_process_can_be_started_threads_serve(paths, processes, monkeypatch):
    def fail():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fail)
    with PhotoLoader(paths, CROP, 5, 10) as loader:
        assert take_all(loader, 5)[0] == list(range(30))


def load_and_wait(path, started):
    """A program that loads photos until it is killed."""
    module.FEW_PHOTOS = 0
    loader = PhotoLoader([path] * 100, CROP, 8, 50)
    started.write_text(" ".join(str(worker.pid) for worker in loader._workers))
    started.rename(started.with_suffix(".done"))
    time.sleep(600)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@needs_processes
def test_a_killed_program_leaves_no_process_behind(paths, tmp_path):
    program = FORKS.Process(target=load_and_wait, args=(paths[0], tmp_path / "pids"))
    program.start()
    wait_until((tmp_path / "pids.done").exists)
    pids = [int(pid) for pid in (tmp_path / "pids.done").read_text().split()]
    assert pids
    assert not any(map(is_gone, pids))
    program.kill()
    program.join()
    wait_until(lambda: all(map(is_gone, pids)))


@needs_processes
def test_worker_processes_print_nothing(paths, processes, capfd, monkeypatch):
    def print_and_decode(path, preprocessing):
        os.write(1, b"out")
        os.write(2, b"err")
        return decode(path, preprocessing)

    monkeypatch.setattr(module, "decode", print_and_decode)
    print("before", end="")
    with PhotoLoader(paths, CROP, 5, 10) as loader:
        take_all(loader, 5)
    assert capfd.readouterr() == ("before", "")


@needs_processes
def test_records_of_many_processes_arrive_whole_and_once():
    tasks, results = RecordPipe(), RecordPipe()

    def copy() -> None:
        while (record := tasks.get()) != STOP:
            results.put(record)

    workers = [module.WorkerProcess(copy) for _ in range(4)]
    found = []
    for first in range(0, 10_000, 500):
        sent = [(number, -number) for number in range(first, first + 500)]
        for record in sent:
            tasks.put(record)
        found += [results.get(timeout=60) for _ in sent]
    with pytest.raises(queue.Empty):
        results.get(timeout=0.01)
    for worker in workers:
        worker.stop(None)
        worker.join(time.monotonic() + 10)
    assert sorted(found) == [(number, -number) for number in range(10_000)]


def test_the_main_thread_keeps_its_number_of_torch_threads(paths, workers):
    before = torch.get_num_threads()
    with PhotoLoader(paths, CROP, 5, 10) as loader:
        take_all(loader, 5)
    assert torch.get_num_threads() == before


def test_a_shared_array_is_of_zeros_and_can_be_written():
    array = shared_array((3, 4), np.int32)
    assert array.shape == (3, 4)
    assert not array.any()
    array[1, 2] = 5
    assert array.sum() == 5

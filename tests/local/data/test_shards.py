"""A folder of shards keeps every row, whoever joins them, and whoever is killed."""

import os
import time

import numpy as np
import pytest

from local.data import shards as module
from local.data.shards import ShardFolder
from tests.processes import FORKS

WIDTH = 4


def rows(first, last):
    """Keys and values of some numbers; each value tells its number."""
    numbers = np.arange(first, last)
    keys = np.zeros((len(numbers), 32), dtype=np.uint8)
    keys[:, 0], keys[:, 9] = numbers % 256, numbers // 256
    return keys, np.repeat(numbers[:, None], WIDTH, axis=1).astype(np.float16)


@pytest.fixture
def folder(tmp_path):
    return ShardFolder(tmp_path / "rows", WIDTH, np.float16)


def files(folder):
    return sorted(folder.folder.glob("*.safetensors"))


def found(folder, first, last):
    """The numbers that the values tell; -1 for a key that is not there."""
    keys, _ = rows(first, last)
    table = folder.read()
    rows_found = table.find(keys)
    numbers = np.full(len(keys), -1)
    numbers[rows_found >= 0] = table.read(rows_found[rows_found >= 0])[:, 0]
    return numbers.tolist()


def test_a_folder_that_is_not_there_has_no_rows(folder):
    assert folder.read().find(rows(0, 3)[0]).tolist() == [-1, -1, -1]
    folder.join()
    assert not folder.folder.exists()


def test_rows_are_found_in_any_file_and_order(folder):
    folder.add(*rows(10, 20))
    folder.add(*rows(0, 5))
    assert found(folder, 0, 20) == [*range(5), *[-1] * 5, *range(10, 20)]


def test_keys_that_differ_only_in_their_last_byte_are_different(folder):
    keys, values = rows(0, 2)
    keys[1] = keys[0]
    keys[1, 31] = 1
    folder.add(keys[:1], values[:1])
    assert folder.read().find(keys).tolist() == [0, -1]


def test_joining_keeps_the_order_and_drops_repeated_keys(folder, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 8)
    for first in (0, 4, 8, 12):
        folder.add(*rows(first, first + 4))
    folder.join()
    assert [len(shard) for shard in folder.read().shards] == [8, 8]
    assert found(folder, 0, 16) == list(range(16))
    folder.add(*rows(4, 11))  # all of it is in large files
    folder.join()
    assert found(folder, 0, 17) == [*range(16), -1]
    assert sum(map(len, folder.read().shards)) == 23  # a single small file is left as it is
    folder.add(*rows(15, 17))
    folder.join()
    assert [len(shard) for shard in folder.read().shards] == [8, 8, 1]
    assert found(folder, 0, 17) == list(range(17))


def test_a_process_joins_its_parts_as_it_writes(folder, monkeypatch):
    monkeypatch.setattr(module, "PARTS", 4)
    for number in range(40):
        folder.add(*rows(number, number + 1))
    assert len(files(folder)) <= 4
    assert found(folder, 0, 40) == list(range(40))


def test_rows_stay_readable_after_their_files_were_joined(folder):
    folder.add(*rows(0, 3))
    folder.add(*rows(3, 6))
    before = folder.read()
    folder.join()
    assert len(files(folder)) == 1
    assert before.read(np.array([5, 0]))[:, 0].tolist() == [5, 0]


def test_two_files_with_the_same_rows_as_a_killed_join_leaves_them_are_read_once(folder):
    folder.add(*rows(0, 6))
    folder.add(*rows(0, 3))
    folder.join()
    assert sum(map(len, folder.read().shards)) == 6
    assert found(folder, 0, 6) == list(range(6))


def test_nobody_joins_while_another_process_does(folder):
    for number in range(3):
        folder.add(*rows(number, number + 1))
    with folder._lock() as is_ours:
        assert is_ours
        ShardFolder(folder.folder, WIDTH, np.float16).join()
        assert len(files(folder)) == 3
    folder.join()
    assert len(files(folder)) == 1


def test_what_a_killed_process_left_unfinished_is_removed_after_a_day(folder):
    folder.add(*rows(0, 1))
    old, new = (folder.folder / f".{name}.partial" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    folder.join()
    assert (old.exists(), new.exists()) == (False, True)


def write_numbers(path, first, last):
    module.PARTS = 3
    folder = ShardFolder(path, WIDTH, np.float16)
    for number in range(first, last):
        folder.add(*rows(number, number + 1))
        time.sleep(0.005)


def test_processes_that_write_join_and_are_killed_lose_no_written_row(folder):
    spans = [(0, 20), (20, 40), (40, 100_000)]
    processes = [FORKS.Process(target=write_numbers, args=(folder.folder, *span)) for span in spans]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes[:2]):
        rows_there = sum(number >= 0 for number in found(folder, 0, 40))
        assert rows_there >= seen  # also while files are joined
        seen = rows_there
        time.sleep(0.01)
    processes[2].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes[:2]] == [0, 0]
    assert found(folder, 0, 40) == list(range(40))
    folder.join()
    assert found(folder, 0, 40) == list(range(40))

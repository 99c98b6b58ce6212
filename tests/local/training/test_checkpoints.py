"""A checkpoint is written whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel.inputs import InputError, sha256
from local.training.checkpoints import DIGITS, KEPT, Checkpoint, read_checkpoint, read_notes, write_checkpoint


def write(folder, count):
    for number in range(count):
        write_checkpoint(folder, Checkpoint({"one.weight": torch.full((3,), float(number))}, {"number": number}))


def test_the_newest_is_read_and_few_are_kept(tmp_path):
    write(tmp_path, 12)
    read = read_checkpoint(tmp_path)
    assert read.notes == {"number": 11}
    assert torch.equal(read.part("one")["weight"], torch.full((3,), 11.0))
    assert len(list(tmp_path.iterdir())) == KEPT


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_the_last_good_one_is_read_when_the_newest_is_damaged(tmp_path, damage):
    write(tmp_path, 3)
    newest = max(tmp_path.iterdir())
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(bytes(content) if damage is None else damage)
    assert read_checkpoint(tmp_path).notes == {"number": 1}


def test_there_is_none_in_an_empty_folder_or_where_all_are_damaged(tmp_path):
    assert read_checkpoint(tmp_path / "nowhere") is None
    write(tmp_path, 1)
    next(tmp_path.iterdir()).write_bytes(b"")
    assert read_checkpoint(tmp_path) is None


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path):
    write(tmp_path / "run" / "checkpoints", 1)
    path = next((tmp_path / "run" / "checkpoints").iterdir())
    save_file(load_file(path), path, {"notes": '{"epoch": 3}'})
    path = path.rename(path.with_name(f"000000.{sha256(path)[:DIGITS]}.safetensors"))
    for read in (read_checkpoint, read_notes):
        with pytest.raises(InputError, match=r"earlier version .* cannot be resumed: remove .*/run and train again$"):
            read(path.parent)

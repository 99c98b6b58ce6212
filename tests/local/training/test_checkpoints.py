"""A checkpoint is complete or not there."""

import pytest
import torch

from local.training.checkpoints import (
    KEPT,
    Checkpoint,
    flatten_optimiser,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)


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


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)])
def test_an_optimiser_goes_on_where_it_was(make):
    weights = []
    for stops in (False, True):
        parameter = torch.nn.Parameter(torch.ones(4))
        optimiser = make([parameter])
        for step in range(6):
            if stops and step == 3:
                state = dict(flatten_optimiser(optimiser))
                optimiser = make([parameter])
                restore_optimiser(optimiser, state)
            optimiser.zero_grad()
            (parameter**2 * torch.arange(4.0)).sum().backward()
            optimiser.step()
        weights.append(parameter.detach())
    assert torch.equal(*weights)

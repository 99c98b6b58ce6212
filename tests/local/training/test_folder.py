"""A run's folder is there as a whole or not at all, and what was trained is kept until then."""

import pytest

from kernel.inputs import InputError
from local.training.folder import run_folder


def make_checkpoint(folder):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "000000.0123456789abcdef.safetensors").write_bytes(b"")


def test_a_run_is_there_when_it_is_whole(tmp_path):
    out = tmp_path / "run"
    with run_folder(out) as folder:
        (folder / "manifest.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path, capsys):
    with pytest.raises(InputError), run_folder(tmp_path / "run") as folder:
        (folder / "encoder.safetensors").write_bytes(b"")
        raise InputError("too many photos cannot be read")
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("error", [InputError("too many photos cannot be read"), ValueError("a defect")])
def test_after_an_error_what_was_trained_is_kept_and_named(tmp_path, capsys, error):
    with pytest.raises(type(error)), run_folder(tmp_path / "run") as folder:
        make_checkpoint(folder)
        raise error
    kept = tmp_path / ".run.partial" / "checkpoints"
    assert capsys.readouterr().out == f"{kept} keeps what was trained: continue with --resume\n"
    with run_folder(tmp_path / "run") as folder:
        assert [path.name for path in folder.iterdir()] == ["checkpoints"]
        assert list((folder / "checkpoints").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_finished_run_is_continued_from_its_checkpoints_alone_and_stays_until_then(tmp_path):
    out = tmp_path / "run"
    make_checkpoint(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(InputError), run_folder(out) as folder:
        assert [path.name for path in folder.iterdir()] == ["checkpoints"]
        raise InputError("no")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "manifest.json"]

"""Runs are listed with what they scored."""

import os
import shutil

import pytest

from kernel.inputs import InputError
from kernel.manifest import read_manifest
from local.base.runs import open_run
from tests.conftest import command


def test_runs_are_listed_newest_first_with_their_scores(trained, tmp_path):
    for age, name in enumerate(("newest", "older", "oldest")):
        shutil.copytree(trained, tmp_path / name)
        os.utime(tmp_path / name / "manifest.json", (1e9 - age, 1e9 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    lines = command("local/runs.py", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "newest", "older", "oldest"]
    assert "2001-09-0" in lines[1]
    assert "test_resnet" in lines[1]
    assert lines[1].count("[") == 3
    scores = read_manifest(trained / "manifest.json").members[0].validation
    unweighted = [scores[f"unweighted_{name}"] for name in ("recall_at_1", "recall_at_5", "macro_f1")]
    assert unweighted[0] != scores["recall_at_1"]
    assert lines[1].endswith("  " + " / ".join(f"{score:.3f}" for score in unweighted))


def test_a_folder_without_runs_is_one_line(tmp_path):
    done = command("local/runs.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no run: train one with local/train.py, or give another folder\n"


def test_for_a_missing_run_the_existing_ones_are_listed(tmp_path):
    with pytest.raises(InputError, match=r"no such run: .*best; train one with local/train.py"):
        open_run(tmp_path / "best")
    for name in ("best", "baseline", ".other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "data").mkdir()
    runs = f"there are {tmp_path}/baseline, {tmp_path}/best"
    for name, problem in (("bets", f"no such run: {tmp_path}/bets"), ("data", f"{tmp_path}/data is not a run")):
        with pytest.raises(InputError) as error:
            open_run(tmp_path / name)
        assert str(error.value).startswith(problem)
        assert str(error.value).endswith(runs)


def test_of_many_runs_only_the_first_are_listed(tmp_path):
    for number in range(11):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "manifest.json").touch()
    with pytest.raises(InputError, match=r"/07 and 3 more$"):
        open_run(tmp_path / "absent")

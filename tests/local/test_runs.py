"""Runs are listed with what they scored."""

import os
import shutil

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


def test_a_folder_without_runs_is_one_line(tmp_path):
    done = command("local/runs.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no run: train one with local/train.py, or give another folder\n"

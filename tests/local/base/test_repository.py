import os
import subprocess

import pytest

from local.base import repository
from local.base.repository import commit


@pytest.mark.skipif(os.name != "posix", reason="the git of this test is a shell script")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "unknown"),
        ("echo 'fatal: detected dubious ownership in repository' >&2; exit 128", "unknown"),
        ("[ $3 = status ] && exit 128; echo 1a2b3c", "1a2b3c with changes"),
        ("[ $3 = status ] && exit 0; echo 1a2b3c", "1a2b3c"),
    ],
    ids=["no git", "git refuses", "git cannot tell what changed", "git answers"],
)
def test_a_commit_is_unknown_without_a_working_git(tmp_path, monkeypatch, script, expected):
    if script:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == expected


def test_only_changes_of_the_code_mark_a_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(repository, "ROOT", tmp_path)
    git("init")
    for path in ("kernel-metadata.json", "kernel/a.py", "local/b.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "kernel-metadata.json").write_text("the owner's name")
    assert "changes" not in commit()
    (tmp_path / "local" / "b.py").write_text("2")
    assert commit().endswith(" with changes")
    assert "changes" not in commit("kernel")

import os

import pytest

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

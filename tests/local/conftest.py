"""A local Kaggle, for the tests of publishing and of training on Kaggle."""

import tempfile
from multiprocessing.util import get_temp_dir

import pytest

from tests.local.publishing.loopback import Loopback


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A local Kaggle, to which the client of this process is directed."""
    get_temp_dir()  # kept by multiprocessing: in the folder below, the names of its sockets would be too long
    with Loopback() as kaggle:
        (tmp_path / "home").mkdir()
        for name in ("KAGGLE_API_TOKEN", "KAGGLE_KERNEL_RUN_TYPE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in kaggle.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", None)  # so that TMPDIR is read again
        from kaggle.api.kaggle_api_extended import KaggleApi

        monkeypatch.setattr(KaggleApi, "args", ["--local"])  # it reads the environment only when it is imported
        yield kaggle
        assert not kaggle.foreign

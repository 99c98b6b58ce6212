"""Where there are GPUs, the tests of what runs on them run on them."""

import os

import pytest

from tests.processes import command

GPUS = os.environ["GPUS_OF_TESTS"]  # as CUDA_VISIBLE_DEVICES, "all", or empty without any; see tests/conftest.py


@pytest.mark.skipif(not GPUS, reason="no GPU")
def test_what_runs_on_gpus_passes_its_tests():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    del environment["CUDA_VISIBLE_DEVICES"]
    if GPUS != "all":
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    done = command("-m", "pytest", "-n", "0", "-m", "gpu", "tests", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

"""A bundle keeps the runs that it is made of as they are, and has the reference of the best of them."""

import shutil

import pytest

from bundle import bundle
from kernel.inputs import InputError
from local.rehearsal.staging import fingerprint


@pytest.mark.parametrize(
    ("run", "out"), [("run", "run"), ("run", "other/../run"), ("run", "run/build"), ("build/weights/run", "build")]
)
def test_an_out_that_would_overwrite_a_run_is_refused_before_anything_is_written(trained, tmp_path, run, out):
    shutil.copytree(trained, tmp_path / run)
    before = fingerprint(tmp_path)
    with pytest.raises(InputError, match=r"would write into the run .*: give another --out"):
        bundle([trained, tmp_path / run], tmp_path / out)
    assert fingerprint(tmp_path) == before

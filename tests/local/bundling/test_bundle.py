"""A bundle keeps the runs that it is made of as they are, and has the reference of the best of them."""

import shutil
from types import SimpleNamespace

import pytest

from bundle import bundle
from kernel.inputs import InputError
from local.base.run_folder import REFERENCE_FILE
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


@pytest.mark.parametrize("kept", ["a", "b"])
def test_the_reference_is_that_of_the_run_that_is_kept_even_where_runs_have_the_same_name(
    trained, tmp_path, monkeypatch, kept
):
    runs = [tmp_path / name / "best" for name in ("a", "b")]
    for run in runs:
        shutil.copytree(trained, run)
        (run / REFERENCE_FILE).write_bytes(run.parent.name.encode())
    ensemble = SimpleNamespace(weights=[float(run.parent.name == kept) for run in runs])
    monkeypatch.setattr("local.bundling.weights.weigh_runs", lambda opened: ensemble)
    bundle(runs, tmp_path / "build")
    assert (tmp_path / "build" / REFERENCE_FILE).read_bytes() == kept.encode()

"""On Kaggle: libraries are installed only where they are needed, and a training uses every GPU."""

import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from kernel.inputs import InputError
from local.remote import on_kaggle
from local.remote.on_kaggle import find_data, find_file, install, launcher, run_training
from tests.layouts import fungiclef


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, none of which starts a process; pip fails."""
    run = []

    def record(command: list[str], **_) -> subprocess.CompletedProcess:
        run.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="GPU 0: Tesla T4\nGPU 1: Tesla T4\n")

    monkeypatch.setattr(subprocess, "run", record)
    return run


def test_what_is_here_in_the_same_or_a_newer_version_is_not_installed(commands):
    install({"timm": version("timm"), "pillow": "1.0"})
    assert commands == []


def test_what_is_missing_or_older_is_installed_without_its_dependencies(commands):
    with pytest.raises(InputError, match=r"pip cannot install timm==99\.0, no-such-library==1\.0"):
        install({"timm": "99.0", "no-such-library": "1.0"})
    assert commands == [
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "timm==99.0", "no-such-library==1.0"]
    ]


def test_fine_tuning_starts_a_process_for_each_gpu_and_embedding_one_for_all(commands):
    assert launcher(is_finetuned=True)[2:-1] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert launcher(is_finetuned=False) == [sys.executable, "-u", str(on_kaggle.TRAIN)]


def test_without_a_gpu_one_process_is_started(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert launcher(is_finetuned=True) == [sys.executable, "-u", str(on_kaggle.TRAIN)]


SLEEP = """
import signal, sys, time
def end(*_):
    print("checkpoint written", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("training", flush=True)
time.sleep(600)
"""


@pytest.fixture
def own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_at_the_deadline_a_training_may_write_its_checkpoint(own_signals, capfd):
    code, last, is_stopped = run_training([sys.executable, "-c", SLEEP], time.monotonic() + 3)
    assert (code, last, is_stopped) == (130, "checkpoint written", True)
    assert "training" in capfd.readouterr().out


def test_a_training_that_does_not_end_is_killed(own_signals, monkeypatch):
    monkeypatch.setattr(on_kaggle, "STOP_SECONDS", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    code, _, is_stopped = run_training([sys.executable, "-c", deaf], time.monotonic() + 2)
    assert (code, is_stopped) == (-signal.SIGKILL, True)


def test_an_error_is_the_last_line_even_if_torchrun_prints_more(own_signals):
    fails = "import sys; print('error: no photos'); print('====='); sys.exit(2)"
    assert run_training([sys.executable, "-c", fails], time.monotonic() + 60) == (2, "error: no photos", False)


@pytest.mark.parametrize("mount", ["competitions/fungi-clef-2025", "fungi-clef-2025"])
def test_the_competition_is_found_wherever_it_is_mounted(tmp_path, mount):
    fungiclef(tmp_path / mount)
    assert find_data(tmp_path, "fungi-clef-2025") == tmp_path / mount
    with pytest.raises(InputError, match="accept its rules"):
        find_data(tmp_path, "herbarium-2020-fgvc7")


@pytest.mark.parametrize("mount", ["datasets/ann/weights", "weights"])
@pytest.mark.parametrize("folder", ["", "parcel"])
def test_a_file_of_a_dataset_is_found_wherever_it_is_mounted(tmp_path, mount, folder):
    target = tmp_path / mount / folder
    target.mkdir(parents=True)
    (target / "contents.json").touch()
    assert find_file(tmp_path, "ann/weights", "contents.json", "parcel.zip") == target
    (target / "contents.json").rename(target / "parcel.zip")
    assert find_file(tmp_path, "ann/weights", "contents.json", "parcel.zip") == target / "parcel.zip"
    with pytest.raises(InputError, match="bob/weights is not mounted"):
        find_file(Path(tmp_path, "nowhere"), "bob/weights", "contents.json")

"""What the kernel of a training does on Kaggle: run train.py as at home, end in time, and pack what is to come back.

The script that is pushed only finds the kit and calls `train`. See training.py for the other end.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kernel.inputs import InputError, escape_control, find_folders, list_folder
from kernel.observations import recognise
from kernel.progress import clock_time, counted
from local.base.run_folder import CACHE
from local.bundling.wheels import is_newer
from local.remote.parcel import CONTENTS, EMBEDDINGS, PARTIAL, RUN, files_of, pack, unpack
from local.training.checks import partial_of

OUTPUT, PARCEL = "run.zip", "parcel.zip"  # what comes back, and what is sent
STOP_SECONDS = 900  # for the step that runs and its checkpoint, before the training is killed
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class LocalEncoder:
    """An encoder that is a path at home, and a dataset on Kaggle.

    Attributes:
        dataset: owner/slug.
        prefix: of --encoder, such as "timm:local-dir:"; often empty.
        marker: name of one of its files.
        stem: what follows the folder in --encoder; empty for a folder or a run.
    """

    dataset: str
    prefix: str
    marker: str
    stem: str


@dataclass(frozen=True)
class Plan:
    """What to train, as the script says it.

    Attributes:
        name: of the run.
        arguments: of train.py, apart from --data, --out and --resume, and from a recipe and an encoder given below.
        competition: its slug.
        seconds: after which the training is stopped; it counts from the start of the script.
        is_finetuned: whether the encoder is trained.
        packages: name -> version of the libraries at home; what is missing here or older is installed.
        recipe: the text of a recipe that is not the kit's own; empty otherwise.
        encoders: those of --encoder, of which some may be paths at home; empty for those of the recipe.
        parcel: owner/slug of the dataset to continue from; empty to begin.
    """

    name: str
    arguments: list[str]
    competition: str
    seconds: float
    is_finetuned: bool
    packages: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    encoders: tuple[str | LocalEncoder, ...] = ()
    parcel: str = ""


def train(plan: Plan, inputs: Path, working: Path) -> None:
    """Train, and leave a parcel in the working folder, which becomes the kernel's output.

    Args:
        inputs: what is mounted.
    """
    started, out = time.monotonic(), working / "runs" / plan.name
    with tempfile.TemporaryDirectory() as temporary:
        try:
            install(plan.packages)
            arguments = make_arguments(plan, inputs, Path(temporary))
            if plan.parcel:
                restore(find_file(inputs, plan.parcel, CONTENTS, PARCEL), Path(temporary), out)
        except InputError as error:
            print(list_folder(inputs), flush=True)
            sys.exit(f"error: {escape_control(error)}")
        command = [*launcher(plan.is_finetuned), *arguments, "--out", str(out), "--resume"]
        code, last_line, is_stopped = run_training(command, started + plan.seconds)
    files = dict(files_of(out.parent / CACHE, EMBEDDINGS))
    files |= files_of(partial_of(out), PARTIAL) if code else files_of(out, RUN)
    keys = {} if code else find_cache_keys(out)
    pack(working / OUTPUT, files, code=code, is_stopped=is_stopped, last_line=last_line, cache_keys=keys)
    shutil.rmtree(out.parent, ignore_errors=True)  # all of it is in the parcel
    took = clock_time(time.monotonic() - started)
    if code and not is_stopped:
        sys.exit(f"error: train.py ended with exit code {code} after {took}")
    print(f"{'stopped' if code else 'done'} after {took}: {counted(len(files), 'file')} in {OUTPUT}", flush=True)


def install(packages: Mapping[str, str]) -> None:
    """Install libraries that are missing here, or older than at home. They are pure Python; torch stays as it is.

    Raises:
        InputError: pip fails.
    """
    missing = []
    for name, wanted in packages.items():
        try:
            if is_newer(wanted, version(name)):
                missing.append(f"{name}=={wanted}")
        except PackageNotFoundError:
            missing.append(f"{name}=={wanted}")
    if not missing:
        return
    print(f"installing {', '.join(missing)}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
    if subprocess.run(pip).returncode:
        raise InputError(f"pip cannot install {', '.join(missing)}: see above; turn the kernel's internet on")


def make_arguments(plan: Plan, inputs: Path, temporary: Path) -> list[str]:
    """The arguments of train.py, with the paths that the files have here.

    Raises:
        InputError: the competition or the encoder is not mounted.
    """
    arguments = [*plan.arguments, "--data", str(find_data(inputs, plan.competition))]
    if plan.recipe:
        recipe = temporary / f"{plan.name}.toml"
        recipe.write_text(plan.recipe, encoding="utf-8")
        arguments += ["--recipe", str(recipe)]
    for encoder in plan.encoders:
        if isinstance(encoder, LocalEncoder):
            folder = find_file(inputs, encoder.dataset, encoder.marker)
            encoder = encoder.prefix + str(folder / encoder.stem if encoder.stem else folder)
        arguments += ["--encoder", encoder]
    return arguments


def find_data(inputs: Path, competition: str) -> Path:
    """The folder of the mounted competition.

    Raises:
        InputError: there is none.
    """

    def has_table(folder: Path) -> bool:
        found = recognise(folder)
        return found is not None and found.table.exists()

    for mount in (inputs / "competitions" / competition, inputs / competition):
        for folder in find_folders(mount, has_table):
            return folder
    raise InputError(f"no supported competition in {competition}, or it is not mounted: accept its rules, push again")


def find_file(inputs: Path, dataset: str, *names: str) -> Path:
    """The folder of a mounted dataset that has the first of some files, or the path of another of them, a zip.

    Raises:
        InputError: the dataset is not mounted, or has none of them.
    """
    mounts = inputs / "datasets" / dataset, inputs / dataset.partition("/")[2]
    for name in names:
        for path in (path for mount in mounts for path in sorted(mount.rglob(name))):
            return path if path.suffix == ".zip" else path.parent
    raise InputError(f"the dataset {dataset} is not mounted, or has no {names[0]}: push again")


def restore(parcel: Path, temporary: Path, out: Path) -> None:
    """Put in place what an earlier session has left: its checkpoints and its embeddings."""
    contents = unpack(parcel, temporary / "parcel")
    for name, target in ((RUN, out), (PARTIAL, partial_of(out)), (EMBEDDINGS, out.parent / CACHE)):
        if (temporary / "parcel" / name).is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(temporary / "parcel" / name, target)
    print(f"continuing from {counted(len(contents.files), 'file')} of {parcel}", flush=True)


def find_cache_keys(run: Path) -> dict[str, str]:
    """As `local.remote.adoption.cache_keys`; empty after an error, which must not cost the run."""
    try:
        from local.remote.adoption import cache_keys  # imports torch, which must not hold a GPU during the training

        return cache_keys(run)
    except Exception as error:
        print(f"warning: the embeddings cannot be used on another machine: {error}", flush=True)
        return {}


def launcher(is_finetuned: bool) -> list[str]:
    """The command that starts train.py. Fine-tuning uses a process per GPU; one process embeds on all of them."""
    gpus = count_gpus() if is_finetuned else 0
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    return [sys.executable, "-u", *processes, str(TRAIN)]


def count_gpus() -> int:
    """The number of GPUs, without importing torch, which would hold memory on each of them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_training(command: list[str], deadline: float) -> tuple[int, str, bool]:
    """Run train.py, and print what it prints. At the deadline, and on SIGTERM, it writes a checkpoint and ends.

    Args:
        deadline: of `time.monotonic`.

    Returns:
        The exit code, the last line or the error, and whether the training was stopped.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    is_stopped = threading.Event()

    def stop(*_: object) -> None:
        if not is_stopped.is_set():
            is_stopped.set()
            signal_training(process.pid, signal.SIGTERM, is_distributed="torch.distributed.run" in command)
            killer.start()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), stop)
    killer = threading.Timer(STOP_SECONDS, process.kill)
    timer.daemon = killer.daemon = True
    signal.signal(signal.SIGTERM, stop)
    timer.start()
    last_line = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.strip() and not last_line.startswith("error: "):  # torchrun prints more after an error
            last_line = line.strip()
    code = process.wait()
    timer.cancel()
    killer.cancel()
    return code, last_line, is_stopped.is_set()


def signal_training(pid: int, number: int, is_distributed: bool) -> None:
    """Send a signal to train.py: under torchrun to the processes that it has started, each of which gets it once."""
    pids = [pid]
    if is_distributed:
        with suppress(OSError):
            pids = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())) or pids
    for each in pids:
        with suppress(ProcessLookupError):
            os.kill(each, number)

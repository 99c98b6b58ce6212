"""The scenarios of a rehearsal: what can happen to a kernel on Kaggle, and what it must do then.

A scenario is a function of the rehearsal. It mounts the inputs, changes them, runs the script and checks the result. It
returns a summary in one line, or raises Failed or Skipped with the reason. SCENARIOS lists them all. Most use a small
part of the test set, so that all of them take minutes.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from math import ceil
from pathlib import Path

from kernel.budget import MARGIN
from kernel.competitions.competition import AnswerForm
from kernel.inputs import shorten
from local.base.console import counted, say
from local.base.metrics import GUESSES, hit_matrix, sample_f1
from local.bundling.record import ScenarioResult
from local.bundling.wheels import IMAGE
from local.rehearsal.rehearsal import DONE, FALLBACK_WRITTEN, NO_SUBMISSION, PLANNED, KernelRun, Rehearsal, Summary
from local.rehearsal.sandbox import duty_cycle, kill_after
from local.rehearsal.staging import Mounts
from local.rehearsal.variations import (
    UNREADABLE,
    exchange_weights,
    keep_observations,
    keep_one_row,
    remove_photos,
    repeat_observations,
    spoil_photos,
    truncate,
)

ENLARGED = 3  # times the size of the test set, in the scenario `larger`
KILLED_OBSERVATIONS = 4  # few, since the script is started for every kill
DISK_DELAY = 0.03  # seconds by which a slow disk delays opening a photo
PATIENCE = 3  # times the expected run time, as a limit that is easy to meet
DUTY = 0.5  # fraction of the time that a throttled process runs
MIN_RATIO = 2  # of the photos' time to the start's time in a throttled run; with less there is little to leave out
MAX_COPIES = 200  # of the test set, to reach MIN_RATIO
PIP_SECONDS = 120  # for installing one wheel
GRACE = 10  # seconds beyond a throttled run's limit, for ending the interpreter
ATTEMPTS = 4  # to find a limit that leaves time for some of the photos
MEMORY_NOISE = 150  # MB by which the peak memory of two equal runs may differ
QUEUED = 1024  # decoded photos that the kernel may hold at once, those ahead and those of its batches
OTHER_TIMM = 0.1  # fraction of the observations that may get another best class with another timm, by rounding
RERUN = {"KAGGLE_IS_COMPETITION_RERUN": "1"}

SLOW_DISK = f"""
import atexit, os, sys, tempfile, time
opened = tempfile.TemporaryFile(buffering=0)  # a byte for each photo, from all processes
def delay(event, arguments):
    is_path = event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike))
    if is_path and os.fsdecode(arguments[0]).lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        opened.write(b".")
        time.sleep({DISK_DELAY})
sys.addaudithook(delay)
atexit.register(lambda: print("slow disk:", os.fstat(opened.fileno()).st_size, "photos opened late", flush=True))
"""
NO_FORK = "import os; del os.fork"
CALL = "network attempt: "
LOG_CALLS = f"""
import sys
CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
def log_calls(event, arguments):
    if event not in CALLS:
        return
    is_local = event != "socket.getaddrinfo" and isinstance(arguments[-1], (str, bytes)) and len(arguments) > 1
    if not is_local:  # the address of a Unix socket is a path
        print({CALL!r} + event, *[argument for argument in arguments if isinstance(argument, (str, tuple))], flush=True)
sys.addaudithook(log_calls)
"""
TIMM_USED = "the script used timm "
USE_OTHER_TIMM = f"""
import atexit, sys
sys.path[:0] = {{folders}}
atexit.register(lambda: print({TIMM_USED!r} + getattr(sys.modules.get("timm"), "__version__", "none"), flush=True))
"""


class Failed(Exception):
    """The kernel failed a scenario; the message is the reason, in one line."""


class Skipped(Exception):
    """A scenario cannot be played here; the message is the reason, in one line."""


def play(rehearsal: Rehearsal, name: str) -> ScenarioResult:
    """Play a scenario, once per rehearsal: others may need its run before."""
    if name not in rehearsal.results:
        shutil.rmtree(rehearsal.output(name), ignore_errors=True)
        is_ok = True
        try:
            reason = SCENARIOS[name](rehearsal)
        except Failed as failure:
            is_ok, reason = False, str(failure)
        except Skipped as obstacle:
            reason = f"skipped: {obstacle}"
        shutil.rmtree(rehearsal.folder / name, ignore_errors=True)
        seconds = sum(run.outcome.seconds for run in rehearsal.runs.get(name, ()))
        rehearsal.results[name] = ScenarioResult(name, is_ok, round(seconds, 2), reason)
    return rehearsal.results[name]


# Checks that several scenarios share


def baseline(rehearsal: Rehearsal) -> KernelRun:
    """The run of `new-mounts`, to compare with.

    Raises:
        Failed: that run failed already.
    """
    play(rehearsal, "new-mounts")
    run = rehearsal.runs["new-mounts"][0]
    if run.failure:
        raise Failed(f"there is no run to compare with, new-mounts failed: {run.failure}")
    return run


def check_scored(*runs: KernelRun) -> None:
    """Kaggle would score every run."""
    for run in runs:
        if run.failure:
            raise Failed(run.failure)


def get_summary(run: KernelRun) -> Summary:
    """The script's last line.

    Raises:
        Failed: it did not print one.
    """
    if run.summary is None:
        raise Failed(f"the log has no line `done: ...` as expected; its last line is {run.lines[-1:]}")
    return run.summary


def check_predicted(run: KernelRun) -> str:
    """Kaggle would score the run, and there was time for every observation."""
    check_scored(run)
    done = get_summary(run)
    observations = counted(done.observations, "observation")
    if done.late:
        raise Failed(f"{done.late} of {observations} too late, although there was enough time")
    return f"{counted(done.photos, 'photo')} of {observations}, {done.views} view{'' if done.views == '1' else 's'}"


def check_refused(rehearsal: Rehearsal, mounts: Mounts) -> str:
    """With wrong weights the visible run ends with one clear line, and the scored rerun leaves the fallback.

    Without weights the fallback is a row of the sample submission. Where there is no sample, none is expected.
    """
    visible, rerun = rehearsal.run(mounts), rehearsal.run(mounts, environment=RERUN)
    errors = [line for line in visible.lines if line.startswith("error: ")]
    if visible.outcome.timed_out or visible.outcome.code != 2:
        raise Failed(f"the visible run ended with exit code {visible.outcome.code}, expected 2")
    if len(errors) != 1 or any(line.startswith("Traceback") for line in visible.lines):
        raise Failed(f"the visible run printed {counted(len(errors), 'error line')}, expected one and no traceback")
    if set(visible.files) - {"submission.csv"}:
        raise Failed(f"the visible run left {', '.join(visible.files)} in the working folder")
    if visible.files and visible.defect:
        raise Failed(f"the visible run left an invalid submission: {visible.defect}")
    has_sample = bool(rerun.table.competition.read_sample(rerun.table.folder))
    if rerun.failure and (has_sample or rerun.failure != NO_SUBMISSION):
        raise Failed(f"in the scored rerun: {rerun.failure}")
    if len({tuple(guesses) for guesses in rerun.guesses.values()}) > 1:
        raise Failed("the scored rerun predicted with the wrong weights")
    said = shorten(re.sub(rf"{re.escape(str(rehearsal.folder))}/[^/]+/input", "/kaggle/input", errors[0]), 160)
    return said if has_sample else f"{said}; no fallback, since there is no sample submission"


def check_hostile(rehearsal: Rehearsal, mounts: Mounts, bootstrap: str = "") -> str:
    """Photos that cannot be read, or look strange: the log counts those that cannot be read."""
    counts = spoil_photos(rehearsal.find_table(mounts.inputs), rehearsal.seed)
    unreadable = sum(count for kind, count in counts.items() if kind in UNREADABLE)
    spoiled = sum(counts.values())
    run = rehearsal.run(mounts, bootstrap=bootstrap)
    note, found = check_predicted(run), get_summary(run).unreadable
    if not spoiled:
        raise Skipped("too few photos to spoil any")
    if not unreadable <= found <= spoiled:  # the decoder may read a photo that is merely strange, or not
        are = "is" if found == 1 else "are"
        raise Failed(
            f"{counted(found, 'photo')} {are} counted as unreadable: {unreadable} are, of {spoiled} that were spoiled"
        )
    return f"{note}; {spoiled} spoiled, {found} of them unreadable"


# The scenarios


def whole_test_set(rehearsal: Rehearsal) -> str:
    """The whole test set; the user sees the log."""
    mounts = rehearsal.mount("plain", is_whole=True)
    run = rehearsal.run(mounts, on_line=lambda line: say(f"  | {line}"))
    check_scored(run)
    return f"{run.outcome.peak_memory_mb:.0f} MB at the peak"


def new_mounts(rehearsal: Rehearsal) -> str:
    """Inputs where Kaggle mounts them now."""
    return check_predicted(rehearsal.run(rehearsal.mount("new-mounts")))


def old_mounts(rehearsal: Rehearsal) -> str:
    """Inputs where Kaggle mounted them earlier."""
    return check_predicted(rehearsal.run(rehearsal.mount("old-mounts", has_old_mounts=True)))


def larger(rehearsal: Rehearsal) -> str:
    """A larger test set."""
    mounts = rehearsal.mount("larger")
    repeat_observations(mounts.competition, ENLARGED, rehearsal.competition)
    return check_predicted(rehearsal.run(mounts))


def one_row(rehearsal: Rehearsal) -> str:
    """A test table of one photo."""
    mounts = rehearsal.mount("one-row")
    keep_one_row(mounts.competition, rehearsal.competition)
    return check_predicted(rehearsal.run(mounts))


def hostile(rehearsal: Rehearsal) -> str:
    """Photos that cannot be read, or look strange."""
    return check_hostile(rehearsal, rehearsal.mount("hostile"))


def threads(rehearsal: Rehearsal) -> str:
    """The same photos where no process can be forked, so that threads decode them."""
    return check_hostile(rehearsal, rehearsal.mount("threads"), NO_FORK)


def gone(rehearsal: Rehearsal) -> str:
    """Observations without photos: they get the fallback, and the rows of the others do not change.

    Batches are composed differently now, and other rounding may swap guesses that were nearly equal. So two swaps are
    allowed in a row of ten. Of a set, one class may come or go.
    """
    mounts = rehearsal.mount("gone")
    table = rehearsal.find_table(mounts.inputs)
    if not table.competition.has_table:
        raise Skipped("no table lists the photos, so none can be missing")
    removed = remove_photos(table, rehearsal.seed)
    run = rehearsal.run(mounts)
    check_scored(run)
    before, fallback = baseline(rehearsal).guesses, rehearsal.fallback(table)
    is_set = table.competition.form.is_set
    allowed = 1 if is_set else int(0.4 * table.competition.guesses)
    for observation, guesses in run.guesses.items():
        if observation in removed and guesses != fallback:
            raise Failed(f"observation {observation} has no photo, but its row is not the fallback")
        pairs = zip_longest(guesses, before[observation])
        different = len({*guesses} ^ {*before[observation]}) if is_set else sum(new != old for new, old in pairs)
        if observation not in removed and different > allowed:
            raise Failed(f"observation {observation} has all its photos, but its row changed")
    count = counted(len(run.guesses), "observation")
    return f"{len(removed)} of {count} without photos, on the fallback; no other row changed"


def slow_disk(rehearsal: Rehearsal) -> str:
    """Photos that open late, with a limit that leaves enough time for it."""
    base = baseline(rehearsal)
    limit = PATIENCE * (base.outcome.seconds + base.photos * DISK_DELAY)
    run = rehearsal.run(rehearsal.mount("slow-disk"), limit, bootstrap=SLOW_DISK)
    note = check_predicted(run)
    late = [line for line in run.lines if re.fullmatch(r"slow disk: [1-9]\d* photos opened late", line)]
    if not late:
        raise Skipped("photos are not opened by the interpreter, so it cannot delay them")
    return f"{note}; {late[0].removeprefix('slow disk: ')}, by {DISK_DELAY * 1000:.0f} ms each"


def throttled(rehearsal: Rehearsal) -> str:
    """A slow machine, with a limit that allows half of the photos' work: the kernel must leave something out.

    The result must be in time, and better than the fallback.
    """
    if not hasattr(signal, "SIGSTOP"):
        raise Skipped("this system cannot stop and continue a process")
    base, mounts = baseline(rehearsal), rehearsal.mount("throttled")
    start, photos = split_time(base)
    copies = min(MAX_COPIES, ceil(MIN_RATIO * start / max(photos, 0.01)))
    originals = repeat_observations(mounts.competition, copies, rehearsal.competition)
    runs = run_throttled(rehearsal, mounts, start / DUTY, copies * photos / DUTY)
    run, views = runs[-1], get_summary(base).views
    check_scored(run)
    done = get_summary(run)
    if run.time_of(DONE) > run.limit:
        raise Failed(f"done after {run.time_of(DONE):.1f} s, the limit was {run.limit:.1f} s")
    note = f"{done.late} of {counted(done.observations, 'observation')}; views {done.views} instead of {views}"
    if rehearsal.truth:
        truth = [rehearsal.truth[originals[observation]] for observation in run.guesses]
        form, fallback = run.table.competition.form, [rehearsal.fallback(run.table)] * len(truth)
        name, value = rate(form, truth, list(run.guesses.values()))
        _, floor = rate(form, truth, fallback)
        note += f", {name} {value:.3f}, of the fallback {floor:.3f}"
        if value <= floor:
            raise Failed(f"no better than the fallback: {note}")
    if not left_something_out(run, base):
        attempts = counted(len(runs), "attempt")
        raise Skipped(f"nothing had to be left out in {attempts}, the machine's speed changes too much: {note}")
    return f"left out {note}"


def rate(form: AnswerForm, truth: Sequence[str], guesses: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The name and the value of a score: a recall, or the mean F1 of sets."""
    if form.is_set:
        return "F1 per observation", sample_f1([own.split() for own in truth], guesses).mean()
    column = 1 if form.guesses >= GUESSES[1] else 0
    return f"Recall@{GUESSES[column]}", hit_matrix(truth, guesses)[:, column].mean()


def split_time(run: KernelRun) -> tuple[float, float]:
    """Seconds until the kernel had planned its views, imports included, and seconds from then to the end."""
    planned = run.time_of(PLANNED)
    if planned is None:
        raise Failed("the log does not show when the views were planned")
    return planned, (run.time_of(DONE) or run.outcome.seconds) - planned


def run_throttled(rehearsal: Rehearsal, mounts: Mounts, start: float, photos: float) -> list[KernelRun]:
    """Run with part of the CPU, and a limit that allows half of the photos' work; the last run is the one to check.

    If everything was done in time, or the start took all the time, the next limit is computed from that run.

    Args:
        start, photos: expected seconds of the start, and of all views of all photos.
    """
    base, runs = baseline(rehearsal), []
    for _ in range(ATTEMPTS):
        limit = (start + photos / 2) / (1 - MARGIN)
        run = rehearsal.run(mounts, limit, grace=GRACE, controller=duty_cycle(DUTY))
        runs.append(run)
        planned, done = run.time_of(PLANNED), run.summary
        if planned is None or planned > limit * (1 - MARGIN) or (done and done.late == done.observations):
            start *= 2
        elif run.failure or left_something_out(run, base):
            break
        else:
            start, photos = split_time(run)
    return runs


def left_something_out(run: KernelRun, base: KernelRun) -> bool:
    """Whether some photos had fewer views than in the baseline, or none."""
    return get_summary(run).late != 0 or get_summary(run).views != get_summary(base).views


def memory(rehearsal: Rehearsal) -> str:
    """The larger test set takes no more memory than the smaller one, except for the photos in a full queue."""
    small = baseline(rehearsal)
    play(rehearsal, "larger")
    large = rehearsal.runs["larger"][0]
    rehearsal.runs["memory"] = [small, large]
    check_scored(small, large)
    more = (ENLARGED - 1) * small.photos
    side = max(spec.preprocessing.decoded_size for member in rehearsal.manifest.members for spec in member.encoders)
    allowed = MEMORY_NOISE + min(more, QUEUED) * 3 * side**2 / 1e6
    before, after = small.outcome.peak_memory_mb, large.outcome.peak_memory_mb
    note = f"{before:.0f} MB, with {counted(more, 'more photo')} {after:.0f} MB; {allowed:.0f} MB more are allowed"
    if after > before + allowed:
        raise Failed(f"memory grows with the number of photos: {note}")
    return note


def weights_missing(rehearsal: Rehearsal) -> str:
    """A kernel to which no dataset is attached."""
    mounts = rehearsal.mount("weights-missing")
    shutil.rmtree(mounts.weights)
    return check_refused(rehearsal, mounts)


def weights_truncated(rehearsal: Rehearsal) -> str:
    """Weights whose upload was cut off."""
    mounts = rehearsal.mount("weights-truncated")
    truncate(max(mounts.weights.rglob("*.safetensors"), key=lambda path: path.stat().st_size))
    return check_refused(rehearsal, mounts)


def weights_other(rehearsal: Rehearsal) -> str:
    """The weights of another bundle."""
    mounts = rehearsal.mount("weights-other")
    exchange_weights(mounts.weights)
    return check_refused(rehearsal, mounts)


def killed(rehearsal: Rehearsal) -> str:
    """Kills at random moments after the fallback was written: a complete submission must always be there."""
    mounts = rehearsal.mount("killed")
    ids = [observation.id for observation in rehearsal.find_table(mounts.inputs).observations]
    keep_observations(mounts.competition, set(ids[:KILLED_OBSERVATIONS]), rehearsal.competition)
    whole = rehearsal.run(mounts)
    check_scored(whole)
    written = whole.time_of(FALLBACK_WRITTEN)
    if written is None:
        raise Failed(f"it did not print that {FALLBACK_WRITTEN}")
    generator = random.Random(rehearsal.seed)
    delays = [generator.uniform(0, whole.outcome.seconds - written) for _ in range(rehearsal.kills)]
    runs = [run_and_kill(rehearsal, mounts, delay) for delay in delays]
    for run in runs:
        if run.defect:
            raise Failed(f"killed after {run.outcome.seconds:.1f} s, {run.defect}")
    ended = [run for run in runs if run.outcome.code != -signal.SIGKILL]
    check_scored(*ended)
    return f"a complete submission after each of {len(runs) - len(ended)} kills; {len(ended)} came after the end"


def run_and_kill(rehearsal: Rehearsal, mounts: Mounts, delay: float) -> KernelRun:
    """Run the script, and kill it some seconds after it has written the fallback."""
    written = threading.Event()

    def on_line(line: str) -> None:
        if FALLBACK_WRITTEN in line:
            written.set()

    return rehearsal.run(mounts, on_line=on_line, controller=kill_after(written, delay))


def network(rehearsal: Rehearsal) -> str:
    """The script attempts no connection, even one whose failure it would handle."""
    run = rehearsal.run(rehearsal.mount("network"), bootstrap=LOG_CALLS)
    calls = [line.removeprefix(CALL) for line in run.lines if line.startswith(CALL)]
    if calls:
        raise Failed(f"{counted(len(calls), 'attempt')} to connect, the first: {shorten(calls[0], 160)}")
    check_scored(run)
    return "no attempt to connect"


def kaggle_image(rehearsal: Rehearsal) -> str:
    """The timm of Kaggle's image, or of the bundle's wheel if there is one: it must predict as the installed timm."""
    mounts = rehearsal.mount("kaggle-image")
    folders = install_timm(rehearsal.folder / mounts.name / "image")
    before = baseline(rehearsal).guesses
    run = rehearsal.run(mounts, bootstrap=USE_OTHER_TIMM.format(folders=list(map(str, folders))))
    check_predicted(run)
    wheels = [name for name in rehearsal.manifest.files if re.match(r"wheels/timm-[^/]+\.whl$", name)]
    expected = wheels[0].split("-")[1] if wheels else IMAGE["timm"]
    used = next((line.removeprefix(TIMM_USED) for line in run.lines if line.startswith(TIMM_USED)), "none")
    if used not in (expected, "none"):
        raise Failed(f"the script used timm {used}, on Kaggle it would use {expected}")
    different = sum(guesses[0] != before[observation][0] for observation, guesses in run.guesses.items())
    note = f"{different} of {counted(len(run.guesses), 'observation')} get another class"
    if different > OTHER_TIMM * len(run.guesses):
        raise Failed(f"{note} with timm {expected}, which Kaggle would use")
    return f"timm {used}, {'from a wheel in the weights' if wheels else 'as in the image of Kaggle'}; {note}"


def install_timm(folder: Path) -> Sequence[Path]:
    """Install the timm of Kaggle's image into a folder; returns the folders to import it from, none if it is ours."""
    requirement = f"timm=={IMAGE['timm']}"
    try:
        if version("timm") == IMAGE["timm"]:
            return []
    except PackageNotFoundError:
        pass
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    limits = ["--retries", "1", "--timeout", "15", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*pip, *limits, "--target", str(folder), requirement], capture_output=True, text=True, timeout=PIP_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Skipped(f"{requirement} of Kaggle's image cannot be installed: {shorten(error)}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise Skipped(f"{requirement} of Kaggle's image cannot be installed: {shorten(reason)}")
    return [folder]


SCENARIOS: dict[str, Callable[[Rehearsal], str]] = {
    "plain": whole_test_set,
    "new-mounts": new_mounts,
    "old-mounts": old_mounts,
    "larger": larger,
    "one-row": one_row,
    "hostile": hostile,
    "threads": threads,
    "gone": gone,
    "slow-disk": slow_disk,
    "throttled": throttled,
    "memory": memory,
    "weights-missing": weights_missing,
    "weights-truncated": weights_truncated,
    "weights-other": weights_other,
    "killed": killed,
    "network": network,
    "kaggle-image": kaggle_image,
}

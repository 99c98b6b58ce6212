"""What can happen to a kernel on Kaggle, and what must come out all the same. Called by `local/rehearse.py`.

A scenario changes what was laid out, runs the script over it, and judges what the run left. Most see a small part of
the test set, so that all of them take minutes.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

from kernel.budget import MARGIN
from kernel.inputs import InputError, shorten
from local.base.console import counted
from local.base.kaggle_image import IMAGE
from local.base.metrics import GUESSES, hit_matrix
from local.rehearsal.sandbox import duty_cycle, kill_after
from local.rehearsal.staging import Stage
from local.rehearsal.trial import ANNOUNCED, DONE, PLANNED, Ran, Rehearsal
from local.rehearsal.variations import (
    UNREADABLE,
    exchange_weights,
    keep_observations,
    keep_one_row,
    remove_photos,
    remove_weights,
    repeat_observations,
    spoil_photos,
    truncate_weights,
)

TIMES = 3  # as large as the test set is the one that scenario `larger` sees
KILLED_OBSERVATIONS = 4  # few, since the script starts again for every kill
DELAY = 0.03  # seconds that a slow disk takes longer to open a photo
PATIENCE = 3  # times what a run should take, where the limit is meant to be met
SHARE = 0.5  # of the time that a throttled process runs
STRETCH = 2  # photos of a throttled run take at least so many times what its start takes, or there is little to shed
MOST_TIMES = 200  # that the test set is repeated for it
PIP_SECONDS = 120  # that installing one wheel may take
GRACE = 10  # seconds beyond a throttled run's limit: ending the interpreter takes some, which beside hours are nothing
ATTEMPTS = 3  # to find a limit that neither leaves time for everything nor for nothing
NOISE = 150  # MB that the peak memory of two equal runs may differ by: allocators, threads, what torch keeps
QUEUED = 512  # decoded photos that the kernel may hold at once, in its queue and in its batches

RERUN = {"KAGGLE_IS_COMPETITION_RERUN": "1"}
SLOW_DISK = f"""
import atexit, os, sys, time
opened = []
def delay(event, arguments):
    is_path = event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike))
    if is_path and os.fsdecode(arguments[0]).lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        opened.append(1)
        time.sleep({DELAY})
sys.addaudithook(delay)
atexit.register(lambda: print("slow disk:", len(opened), "photos opened late", flush=True))
"""
CALL = "network attempt: "
WITNESS = f"""
import sys
CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
def witness(event, arguments):
    is_local = event != "socket.getaddrinfo" and isinstance(arguments[-1], (str, bytes)) and len(arguments) > 1
    if event in CALLS and not is_local:  # a socket of the file system has a path for its address
        print({CALL!r} + event, *[argument for argument in arguments if isinstance(argument, (str, tuple))], flush=True)
sys.addaudithook(witness)
"""


OTHERS = 0.1  # of the observations may get another best class from another timm, whose sums are in another order
TIMM_USED = "the script used timm "
WITH_IMAGES_TIMM = f"""
import atexit, sys
sys.path[:0] = {{folders}}
atexit.register(lambda: print({TIMM_USED!r} + getattr(sys.modules.get("timm"), "__version__", "none"), flush=True))
"""


class Failed(Exception):
    """A scenario did not come out as it must; the message is the reason, in one line."""


class Skipped(Exception):
    """A scenario cannot be played here; the message says why, in one line."""


@dataclass(frozen=True)
class Stretched:
    """A test set made larger, and how long a throttled run takes over it with all views.

    Attributes:
        originals: the original id of every id.
        start: seconds until the views are planned, imports included.
        photos: seconds from then to the end.
    """

    originals: dict[str, str]
    start: float
    photos: float


@dataclass(frozen=True)
class Scenario:
    """One thing that can happen.

    Attributes:
        change: what is done to the stage before the script runs; what it returns, `judge` is given.
        run: runs the script, once or more; is given what `change` returned.
        judge: (rehearsal, runs, what was changed) -> what to tell of the success. Raises Failed, or Skipped.
        is_whole: whether the script sees the whole test set.
    """

    name: str
    change: Callable[[Rehearsal, Stage], Any]
    run: Callable[[Rehearsal, Stage, Any], list[Ran]]
    judge: Callable[[Rehearsal, list[Ran], Any], str]
    is_whole: bool = False
    has_old_mounts: bool = False


def perform(rehearsal: Rehearsal, scenario: Scenario) -> tuple[list[Ran], Any]:
    """Lay out, change, run. Done once per rehearsal: several scenarios compare with the same run."""
    if scenario.name not in rehearsal.performed:
        shutil.rmtree(rehearsal.results(scenario.name), ignore_errors=True)
        stage = rehearsal.lay_out(scenario.name, scenario.is_whole, scenario.has_old_mounts)
        changed = scenario.change(rehearsal, stage)
        rehearsal.performed[scenario.name] = scenario.run(rehearsal, stage, changed), changed
        shutil.rmtree(rehearsal.folder / scenario.name)
    return rehearsal.performed[scenario.name]


def conduct(rehearsal: Rehearsal, scenario: Scenario) -> dict[str, str | bool | float]:
    """Perform a scenario and judge it: {"name", "ok", "seconds", "reason"}; a success has a reason too, if short."""
    is_ok, runs = True, []
    try:
        runs, changed = perform(rehearsal, scenario)
        reason = scenario.judge(rehearsal, runs, changed)
    except Failed as failure:
        is_ok, reason = False, str(failure)
    except Skipped as obstacle:
        reason = f"skipped: {obstacle}"
    seconds = round(sum(ran.outcome.seconds for ran in runs), 2)
    return {"name": scenario.name, "ok": is_ok, "seconds": seconds, "reason": reason}


# How the stage is changed


def leave(rehearsal: Rehearsal, stage: Stage) -> None:
    """Change nothing."""


def enlarge(rehearsal: Rehearsal, stage: Stage) -> dict[str, str]:
    """Make the test set larger; returns the original id of every id."""
    return repeat_observations(stage.competition, TIMES)


def reduce_to_one_row(rehearsal: Rehearsal, stage: Stage) -> None:
    keep_one_row(stage.competition)


def reduce_to_few(rehearsal: Rehearsal, stage: Stage) -> None:
    ids = [observation.id for observation in rehearsal.table(stage).observations]
    keep_observations(stage.competition, set(ids[:KILLED_OBSERVATIONS]))


def make_hostile(rehearsal: Rehearsal, stage: Stage) -> dict[str, int]:
    """Spoil photos; returns how many of each kind."""
    return spoil_photos(rehearsal.table(stage), rehearsal.seed)


def make_gone(rehearsal: Rehearsal, stage: Stage) -> set[str]:
    """Remove all photos of some observations; returns their ids."""
    table = rehearsal.table(stage)
    if not table.competition.has_table:
        raise Skipped("no table lists the photos, so that none can be missing")
    return remove_photos(table, rehearsal.seed)


def stretch(rehearsal: Rehearsal, stage: Stage) -> Stretched:
    """Enlarge the test set until its photos outweigh the start of a throttled run, by one that has all the time."""
    if not hasattr(signal, "SIGSTOP"):
        raise Skipped("this system cannot stop and continue a process")
    start, photos = durations(reference(rehearsal))
    originals = repeat_observations(stage.competition, times_for(start, photos))
    trial = rehearsal.run(stage, companion=duty_cycle(SHARE))
    if trial.fault:
        raise Failed(f"throttled, with all the time there is, {trial.fault}")
    start, photos = durations(trial)
    times = times_for(start, photos)
    again = repeat_observations(stage.competition, times)
    return Stretched({new: originals[old] for new, old in again.items()}, start, photos * times)


def install_image(rehearsal: Rehearsal, stage: Stage) -> list[Path]:
    """Install the timm of Kaggle's image; returns the folder to import it from, none where this system has the same."""
    wanted, folder = f"timm=={IMAGE['timm']}", rehearsal.folder / stage.name / "image"
    try:
        if version("timm") == IMAGE["timm"]:
            return []
    except PackageNotFoundError:
        pass
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    patience = ["--retries", "1", "--timeout", "15", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*pip, *patience, "--target", str(folder), wanted], capture_output=True, text=True, timeout=PIP_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Skipped(f"{wanted} of Kaggle's image cannot be installed: {shorten(str(error))}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise Skipped(f"{wanted} of Kaggle's image cannot be installed: {shorten(reason)}")
    return [folder]


def times_for(start: float, photos: float) -> int:
    """How often to repeat a test set whose photos take so many seconds, so that they outweigh the start."""
    return min(MOST_TIMES, ceil(STRETCH * start / max(photos, 0.01)))


# How the script is run


def once(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    return [rehearsal.run(stage)]


def while_the_user_reads(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    return [rehearsal.run(stage, is_told=True)]


def visible_and_rerun(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    """As Kaggle does: once where the user sees the log, once to score."""
    return [rehearsal.run(stage), rehearsal.run(stage, environment=RERUN)]


def watched(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    return [rehearsal.run(stage, bootstrap=WITNESS)]


def with_images_timm(rehearsal: Rehearsal, stage: Stage, folders: list[Path]) -> list[Ran]:
    """Let the script find the timm of Kaggle's image before the one that is installed."""
    reference(rehearsal)
    return [rehearsal.run(stage, bootstrap=WITH_IMAGES_TIMM.format(folders=list(map(str, folders))))]


def on_a_slow_disk(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    """Open photos late, with a limit that leaves time for it."""
    base = reference(rehearsal)
    photos = sum(len(observation.photos) for observation in base.table.observations)
    return [rehearsal.run(stage, PATIENCE * (base.outcome.seconds + photos * DELAY), bootstrap=SLOW_DISK)]


def throttled(rehearsal: Rehearsal, stage: Stage, stretched: Stretched) -> list[Ran]:
    """Run with a share of the CPU, and a limit that half of the photos' work fills.

    A machine with other work may change its pace meanwhile: where all was done in time, or the start took it all, the
    next limit is measured by that attempt. The last attempt is judged.
    """
    base, start, photos, runs = reference(rehearsal), stretched.start, stretched.photos, []
    for _ in range(ATTEMPTS):
        limit = (start + photos / 2) / (1 - MARGIN)
        ran = rehearsal.run(stage, limit, grace=GRACE, companion=duty_cycle(SHARE))
        runs.append(ran)
        planned = ran.moment(PLANNED)
        if (
            planned is None
            or planned > limit * (1 - MARGIN)
            or ran.done.get("late") == ran.done.get("observations", "")
        ):
            start *= 2
        elif ran.fault or has_shed(ran, base):
            break
        else:
            start, photos = durations(ran)
    return runs


def has_shed(ran: Ran, base: Ran) -> bool:
    """Whether some photos had fewer views than in the plain run, or none."""
    return last_word(ran)["late"] != "0" or last_word(ran)["views"] != last_word(base)["views"]


def killed(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    """Run once to the end, then kill at seeded moments between the announced fallback and the end."""
    whole = rehearsal.run(stage)
    since = whole.moment(ANNOUNCED)
    if whole.fault or since is None:
        return [whole]
    rng, runs = random.Random(rehearsal.seed), [whole]
    for _ in range(rehearsal.kills):
        announced = threading.Event()

        def hear(line: str, announced: threading.Event = announced) -> None:
            if ANNOUNCED in line:
                announced.set()

        delay = rng.uniform(0, whole.outcome.seconds - since)
        runs.append(rehearsal.run(stage, hear=hear, companion=kill_after(announced, delay)))
    return runs


def compare_sizes(rehearsal: Rehearsal, stage: Stage, changed: object) -> list[Ran]:
    """The plain run and the one on the larger set."""
    return [reference(rehearsal), *perform(rehearsal, BY_NAME["larger"])[0]]


def reference(rehearsal: Rehearsal) -> Ran:
    """The run on the small test set in which nothing happens.

    Raises:
        Failed: that one has gone wrong already.
    """
    ran = perform(rehearsal, BY_NAME["new-mounts"])[0][0]
    if ran.fault:
        raise Failed(f"there is nothing to compare with: where nothing happens, {ran.fault}")
    return ran


def durations(ran: Ran) -> tuple[float, float]:
    """Seconds until the kernel had its plan, imports included, and seconds from then to the end."""
    planned = ran.moment(PLANNED)
    if planned is None:
        raise Failed("the log of the plain run does not tell when its views were planned")
    return planned, (ran.moment(DONE) or ran.outcome.seconds) - planned


# How the runs are judged


def must_be_scored(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """Kaggle would score every run."""
    for ran in runs:
        if ran.fault:
            raise Failed(ran.fault)
    return f"{max(ran.outcome.peak_memory_mb for ran in runs):.0f} MB at the peak"


def must_predict(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """Kaggle would score the run, and it had time for every observation."""
    must_be_scored(rehearsal, runs, changed)
    done = last_word(runs[-1])
    observations = counted(int(done["observations"]), "observation")
    if int(done["late"]):
        raise Failed(f"{done['late']} of {observations} too late, with time enough")
    photos = counted(int(done["photos"]), "photo")
    return f"{photos} of {observations}, {done['views']} view{'' if done['views'] == '1' else 's'}"


def must_count_unreadable(rehearsal: Rehearsal, runs: Sequence[Ran], counts: dict[str, int]) -> str:
    """The log counts every photo that cannot be read, and no other; what is merely strange may be read or not."""
    note, found = must_predict(rehearsal, runs, counts), int(last_word(runs[0])["unreadable"])
    least, most = sum(counts[kind] for kind in counts if kind in UNREADABLE), sum(counts.values())
    if not most:
        raise Skipped("too few photos to spoil any")
    if not least <= found <= most:
        are = "is" if found == 1 else "are"
        raise Failed(f"{counted(found, 'photo')} {are} counted as unreadable: {least} are, and {most} are hostile")
    return f"{note}; {most} hostile, {found} of them unreadable"


def must_miss_only(rehearsal: Rehearsal, runs: Sequence[Ran], gone: set[str]) -> str:
    """Rows without photos hold the fallback, the others what they held before.

    Batches are made up differently now, and a sum in another order may swap guesses that were nearly equal: where a row
    has ten, two such swaps are let pass.
    """
    must_be_scored(rehearsal, runs, gone)
    before, after = reference(rehearsal).guesses, runs[0].guesses
    fallback, allowed = rehearsal.fallback(runs[0].table), int(0.4 * runs[0].table.competition.guesses)
    for observation, row in after.items():
        if observation in gone and row != fallback:
            raise Failed(f"observation {observation} has no photo, and its row is not the fallback")
        differing = sum(new != old for new, old in zip(row, before[observation], strict=True))
        if observation not in gone and differing > allowed:
            raise Failed(f"observation {observation} has all its photos, and yet its row changed")
    return f"{len(gone)} of {counted(len(after), 'observation')} without photos, on the fallback; no other changed"


def must_beat_the_fallback_in_time(rehearsal: Rehearsal, runs: Sequence[Ran], stretched: Stretched) -> str:
    """It ended within the limit, left something out for that, and what it kept is worth more than the fallback."""
    must_be_scored(rehearsal, runs[-1:], stretched)
    ran, done, base = runs[-1], last_word(runs[-1]), reference(rehearsal)
    if ran.moment(DONE) > ran.limit:
        raise Failed(f"done after {ran.moment(DONE):.1f} s, the limit was {ran.limit:.1f} s")
    observations = counted(int(done["observations"]), "observation")
    told = f"{done['late']} of {observations}; views {done['views']} in place of {base.done['views']}"
    if rehearsal.truth:
        truth = [class_of(rehearsal, stretched.originals[observation]) for observation in ran.guesses]
        place = 1 if ran.table.competition.guesses >= GUESSES[1] else 0
        reached = hit_matrix(truth, list(ran.guesses.values()))[:, place].mean()
        floor = hit_matrix(truth, [rehearsal.fallback(ran.table)] * len(truth))[:, place].mean()
        told += f", Recall@{GUESSES[place]} {reached:.3f}, of the fallback {floor:.3f}"
        if reached <= floor:
            raise Failed(f"no better than the fallback: {told}")
    if not has_shed(ran, base):
        tried = counted(len(runs), "attempt")
        raise Skipped(f"nothing had to be shed in {tried}, the machine's pace changes too much: {told}")
    return f"shed {told}"


def must_not_grow(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """The larger set takes no more memory than the smaller, but for the photos that a full queue holds."""
    must_be_scored(rehearsal, runs, changed)
    small, large = (ran.outcome.peak_memory_mb for ran in runs)
    more = (TIMES - 1) * sum(len(observation.photos) for observation in runs[0].table.observations)
    side = max(member.encoder.preprocessing.size for member in rehearsal.manifest.members)
    allowed = NOISE + min(more, QUEUED) * 3 * side**2 / 1e6
    told = f"{small:.0f} MB, with {counted(more, 'more photo')} {large:.0f} MB; {allowed:.0f} MB more are allowed"
    if large > small + allowed:
        raise Failed(f"memory grows with the number of photos: {told}")
    return told


def must_refuse(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """In the visible run it fails with one clear line; in the scored rerun it leaves the fallback and ends well."""
    visible, rerun = runs
    errors = [line for line in visible.lines if line.startswith("error: ")]
    if visible.outcome.timed_out or visible.outcome.code != 2:
        raise Failed(f"the visible run ended with exit code {visible.outcome.code}, and must end with 2")
    if len(errors) != 1 or any(line.startswith("Traceback") for line in visible.lines):
        found = counted(len(errors), "line")
        raise Failed(f"the visible run says {found} of error, and must say one, and no traceback")
    if set(visible.left) - {"submission.csv"}:
        raise Failed(f"the visible run left {', '.join(visible.left)} behind")
    if visible.left and visible.damage:
        raise Failed(f"the visible run left half a submission: {visible.damage}")
    if rerun.fault:
        raise Failed(f"in the scored rerun, {rerun.fault}")
    if len({tuple(row) for row in rerun.guesses.values()}) > 1:
        raise Failed("in the scored rerun it predicted, with weights that are not its own")
    return shorten(re.sub(rf"{re.escape(str(rehearsal.folder))}/[^/]+/input", "/kaggle/input", errors[0]), 160)


def must_survive(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """Whenever it is killed after the announcement, a complete submission is there."""
    whole, *rest = runs
    if whole.fault:
        raise Failed(whole.fault)
    if whole.moment(ANNOUNCED) is None:
        raise Failed(f"it never said that {ANNOUNCED}")
    ended = [ran for ran in rest if ran.outcome.code == -signal.SIGKILL]
    for ran in rest:
        if ran.damage:
            raise Failed(f"killed after {ran.outcome.seconds:.1f} s, {ran.damage}")
        if ran not in ended and ran.fault:
            raise Failed(ran.fault)
    return f"a complete submission after each of {len(ended)} kills; {len(rest) - len(ended)} came after the end"


def must_not_call(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """It attempted no connection, whether or not it took the refusal well."""
    calls = [line.removeprefix(CALL) for line in runs[0].lines if line.startswith(CALL)]
    if calls:
        raise Failed(f"{counted(len(calls), 'attempt')} to connect, the first: {shorten(calls[0], 160)}")
    must_be_scored(rehearsal, runs, changed)
    return "no attempt to connect"


def must_agree_with_images_timm(rehearsal: Rehearsal, runs: Sequence[Ran], folders: list[Path]) -> str:
    """The script used the timm that it will have on Kaggle, and its answers are those of the timm that is installed."""
    must_predict(rehearsal, runs, folders)
    brought = [name for name in rehearsal.manifest.files if re.match(r"wheels/timm-[^/]+\.whl$", name)]
    expected = brought[0].split("-")[1] if brought else IMAGE["timm"]
    used = next((line.removeprefix(TIMM_USED) for line in runs[0].lines if line.startswith(TIMM_USED)), "none")
    if used not in (expected, "none"):
        raise Failed(f"the script used timm {used}, on Kaggle it would use {expected}")
    before, after = reference(rehearsal).guesses, runs[0].guesses
    others = [observation for observation, row in after.items() if row[0] != before[observation][0]]
    if len(others) > OTHERS * len(after):
        raise Failed(f"{len(others)} of {len(after)} observations get another class with Kaggle's timm {expected}")
    where = "of a wheel in the weights" if brought else "of Kaggle's image"
    return f"timm {used}, {where}; {len(others)} of {len(after)} observations get another class"


def must_wait_for_the_disk(rehearsal: Rehearsal, runs: Sequence[Ran], changed: object) -> str:
    """It took the time that the disk needs."""
    note = must_predict(rehearsal, runs, changed)
    late = [line for line in runs[0].lines if re.fullmatch(r"slow disk: [1-9]\d* photos opened late", line)]
    if not late:
        raise Skipped("photos are not opened by the interpreter, so it cannot be slowed down")
    return f"{note}; {late[0].removeprefix('slow disk: ')}, by {DELAY * 1000:.0f} ms each"


def last_word(ran: Ran) -> dict[str, str]:
    """What the script's line `done: ...` tells, see DONE.

    Raises:
        Failed: there is none.
    """
    if not ran.done:
        raise Failed(f"the log has no line `done: ...` of the known form; the last is {ran.lines[-1:]}")
    return ran.done


def class_of(rehearsal: Rehearsal, observation: str) -> str:
    """The true class of an observation.

    Raises:
        InputError: the solution is of other observations.
    """
    if observation not in rehearsal.truth:
        raise InputError(f"{rehearsal.solution} lacks observation {observation}: give the matching solution")
    return rehearsal.truth[observation]


def of_weights(change: Callable[[Any], None]) -> Callable[[Rehearsal, Stage], None]:
    """A change of the stage from one of its weights."""
    return lambda rehearsal, stage: change(stage.weights)


SCENARIOS = (
    Scenario("plain", leave, while_the_user_reads, must_be_scored, is_whole=True),
    Scenario("new-mounts", leave, once, must_predict),
    Scenario("old-mounts", leave, once, must_predict, has_old_mounts=True),
    Scenario("larger", enlarge, once, must_predict),
    Scenario("one-row", reduce_to_one_row, once, must_predict),
    Scenario("hostile", make_hostile, once, must_count_unreadable),
    Scenario("gone", make_gone, once, must_miss_only),
    Scenario("slow-disk", leave, on_a_slow_disk, must_wait_for_the_disk),
    Scenario("throttled", stretch, throttled, must_beat_the_fallback_in_time),
    Scenario("memory", leave, compare_sizes, must_not_grow),
    Scenario("weights-missing", of_weights(remove_weights), visible_and_rerun, must_refuse),
    Scenario("weights-truncated", of_weights(truncate_weights), visible_and_rerun, must_refuse),
    Scenario("weights-other", of_weights(exchange_weights), visible_and_rerun, must_refuse),
    Scenario("killed", reduce_to_few, killed, must_survive),
    Scenario("network", leave, watched, must_not_call),
    Scenario("kaggle-image", install_image, with_images_timm, must_agree_with_images_timm),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

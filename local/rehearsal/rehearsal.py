"""Run the bundle over a competition as Kaggle would, and collect everything that a scenario checks."""

import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kernel.competitions import competition_of
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, in_tiles, read_weights
from kernel.observations import TestTable, find_test_table, recognise
from kernel.submission import check_submission, fallback_answer
from local.base.console import Progress, say
from local.base.files import link_or_copy
from local.bundling.metadata import read_kernel_metadata
from local.bundling.record import ScenarioResult, check_bundle
from local.data.folder import find_competition
from local.data.solution import read_solution
from local.rehearsal.sandbox import Controller, Outcome, Sandbox, find_isolation, run_isolated
from local.rehearsal.staging import Mounts, fingerprint, stage_bundle, stage_competition
from local.rehearsal.variations import keep_observations

ROOT = Path(__file__).resolve().parents[2]
TEMPORARY = ".rehearsal-"  # begins the name of a rehearsal's temporary folder; the process id follows
OBSERVATIONS = 60  # of the test set that all scenarios but `plain` use, so that all of them take minutes
FALLBACK_WRITTEN = "the fallback submission is written"
NO_SUBMISSION = "it left no submission.csv"
PLANNED = re.compile(r"\d+ of \d+ views of \d+ photos")
DONE = re.compile(
    r"^done: (?P<photos>\d+) photos \((?P<unreadable>\d+) unreadable.*\), (?P<observations>\d+) observations "
    r"\(\d+ on the fallback, (?P<late>\d+) too late\), (?P<views>.+) views, .* s, (?P<speed>[0-9.]+) photos/s$"
)


@dataclass(frozen=True)
class Summary:
    """The script's last line, `done: ...`.

    Attributes:
        late: observations for which there was no time.
        views: of each member, as text.
        speed: photos per second.
    """

    photos: int
    unreadable: int
    observations: int
    late: int
    views: str
    speed: float


@dataclass(frozen=True)
class KernelRun:
    """One run of the script.

    Attributes:
        limit: time limit of the script, seconds.
        lines: its output.
        times: of each line, in seconds since the start.
        table: the test table.
        guesses: class ids of each observation, best first; empty if the submission is not valid.
        defect: what is wrong with the submission, or an empty string.
        files: names of the files in the working folder at the end.
        has_changed_inputs: whether a file of the inputs was changed.
    """

    outcome: Outcome
    limit: float
    lines: list[str]
    times: list[float]
    table: TestTable
    guesses: dict[str, list[str]]
    defect: str
    files: list[str]
    has_changed_inputs: bool

    @property
    def failure(self) -> str:
        """Why Kaggle would not score this run, or an empty string."""
        if self.outcome.timed_out:
            return f"killed after {self.outcome.seconds:.0f} s, the limit was {self.limit:.0f} s"
        if self.outcome.code:
            return f"exit code {self.outcome.code}: {self.lines[-1] if self.lines else 'no output'}"
        return self.defect or ("it changed its inputs" if self.has_changed_inputs else "")

    @property
    def summary(self) -> Summary | None:
        """The script's last line `done: ...`, or None if there is none."""
        found = [match for line in self.lines if (match := DONE.match(line))]
        if not found:
            return None
        values = found[-1].groupdict()
        counts = {name: int(values[name]) for name in ("photos", "unreadable", "observations", "late")}
        return Summary(**counts, views=values["views"], speed=float(values["speed"]))

    @property
    def photos(self) -> int:
        """Photos in the test table."""
        return sum(len(observation.photos) for observation in self.table.observations)

    def time_of(self, pattern: str | re.Pattern) -> float | None:
        """Seconds from the start to the first line that contains a pattern; None if there is none."""
        return next((at for at, line in zip(self.times, self.lines, strict=True) if re.search(pattern, line)), None)


def remove_abandoned(build: Path) -> None:
    """Remove the temporary folders of rehearsals that were killed; on Linux, where it shows which of them still run."""
    processes = Path("/proc")
    for folder in build.glob(f"{TEMPORARY}*"):
        process = folder.name.removeprefix(TEMPORARY).partition("-")[0]
        if process.isdecimal() and processes.is_dir() and not (processes / process).exists():
            shutil.rmtree(folder, ignore_errors=True)


class Rehearsal(AbstractContextManager):
    """A bundle, a competition, and a temporary folder in which to run the one over the other.

    Attributes:
        truth: class id of each observation, or of a set all, separated by spaces; empty without a solution.
        runs: runs of the script, by scenario.
        results: of the scenarios that were played, by name.
    """

    def __init__(
        self,
        data: Path,
        build: Path,
        solution: Path | None = None,
        time_limit: float | None = None,
        kills: int = 20,
        seed: int = 0,
    ):
        """Check the user's arguments.

        Args:
            data: the competition's folder, as downloaded.
            solution: see `read_solution`; None for no scores.
            time_limit: seconds for the kernel's own budget and for the process; None is the competition's.
            kills: how often the scenario `killed` kills the script.

        Raises:
            InputError: the data, the bundle or the solution is missing or wrong.
        """
        find_competition(data)
        if solution:
            read_solution(solution)  # report a mistake in it before the slow reading of the competition's tables
        self.data, self.build, self.kills, self.seed = data, build, kills, seed
        self.metadata = read_kernel_metadata(ROOT / "kernel-metadata.json")
        check_bundle(build)
        manifest = read_weights(build / "weights").manifest
        check_competition(data, manifest.competition)
        self.competition = competition_of(manifest.competition)
        self.manifest = in_tiles(manifest, self.competition.grids)
        self.limit = time_limit or self.manifest.competition.time_limit
        self.truth: dict[str, str] = {}
        if solution:
            ids = [observation.id for observation in self.find_table(data).observations]
            self.truth = read_solution(solution, ids, self.manifest.class_ids, self.competition.form)
            missing = [identity for identity in ids if identity not in self.truth]
            if missing:
                raise InputError(f"{solution} lacks observation {missing[0]}: give the matching solution")
        self.runs: dict[str, list[KernelRun]] = {}
        self.results: dict[str, ScenarioResult] = {}

    def __enter__(self) -> "Rehearsal":
        remove_abandoned(self.build)
        self.temporary = tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-", dir=self.build)
        self.folder = Path(self.temporary.name).resolve()
        self.isolation = find_isolation(self.folder)
        say("network: " + ("disabled by a namespace" if self.isolation else "refused by an audit hook in Python"))
        return self

    def __exit__(self, *_: object) -> None:
        self.temporary.cleanup()

    def mount(self, name: str, is_whole: bool = False, has_old_mounts: bool = False) -> Mounts:
        """Lay out the bundle and the competition for a scenario.

        Args:
            is_whole: with the whole test set, instead of the part that most scenarios use.
            has_old_mounts: where Kaggle mounted datasets and competitions earlier.
        """
        inputs = self.folder / name / "input"
        competition, weights = self.metadata["competition_sources"][0], self.metadata["dataset_sources"][0]
        if has_old_mounts:
            folders = inputs / competition, inputs / weights.partition("/")[2]
        else:
            folders = inputs / "competitions" / competition, inputs / "datasets" / weights
        mounts = Mounts(name, inputs, *folders, self.folder / name / "src")
        if is_whole:
            stage_competition(self.data, mounts.competition)
        else:
            shutil.copytree(self._part(), mounts.competition, copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
        stage_bundle(self.build, mounts.weights, mounts.source)
        return mounts

    def _part(self) -> Path:
        """A folder of the competition with a random part of the test set."""
        folder = self.folder / "part"
        if not folder.exists():
            stage_competition(self.data, folder)
            ids = [observation.id for observation in self.find_table(folder).observations]
            chosen = random.Random(self.seed).sample(ids, min(OBSERVATIONS, len(ids)))
            keep_observations(folder, set(chosen), self.competition)
        return folder

    def find_table(self, folder: Path) -> TestTable:
        """The test table of the bundle's competition below a folder, with photos of its resolution."""
        trained = self.manifest.competition
        return find_test_table(folder, trained.name, trained.resolution, trained.settings)

    def fallback(self, table: TestTable) -> list[str]:
        """The kernel's guesses for an observation without readable photos."""
        form = table.competition.form
        return list(form.read(form.write(fallback_answer(table, self.manifest))))[: form.guesses]

    def output(self, name: str) -> Path:
        """Where the last submission and the log of a scenario are kept."""
        return self.build / "rehearsal" / name

    def run(
        self,
        mounts: Mounts,
        limit: float | None = None,
        grace: float = 0,
        on_line: Callable[[str], None] | None = None,
        controller: Controller | None = None,
        **sandbox,
    ) -> KernelRun:
        """Run the script in a process and a working folder of its own.

        Args:
            limit: seconds for the kernel's own budget and for the process; None is the rehearsal's.
            grace: seconds that the process may take beyond the limit.
            on_line: called with each line of its output.
            controller: see `run_isolated`.
            sandbox: `environment` and `bootstrap` of `Sandbox`.
        """
        limit, lines, times = limit or self.limit, [], []
        working, out = self.folder / mounts.name / "working", self.output(mounts.name)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        out.mkdir(parents=True, exist_ok=True)
        table, before = self.find_table(mounts.inputs), fingerprint(mounts.inputs)
        arguments = ["--input", str(mounts.inputs), "--working", str(working), "--time-limit", str(limit)]
        allowed = Sandbox(working, (mounts.inputs, mounts.source), self.isolation, **sandbox)
        started = time.monotonic()
        with (out / "kernel.log").open("a", encoding="utf-8") as log:

            def collect(line: str) -> None:
                lines.append(line)
                times.append(time.monotonic() - started)
                log.write(line + "\n")
                if on_line:
                    on_line(line)

            script = mounts.source / "script.py"
            with Progress(f"rehearsing {mounts.name}"):
                outcome = run_isolated(script, arguments, allowed, limit + grace, collect, controller)
        submission = working / "submission.csv"
        defect = self._find_defect(submission, table)
        answers = [] if defect else table.competition.read_submission(submission)
        guesses = {name: list(answer)[: table.competition.guesses] for name, answer in answers}
        if submission.is_file():
            shutil.copyfile(submission, out / "submission.csv")
        files = sorted(path.name for path in working.iterdir())
        has_changed_inputs = fingerprint(mounts.inputs) != before
        run = KernelRun(outcome, limit, lines, times, table, guesses, defect, files, has_changed_inputs)
        self.runs.setdefault(mounts.name, []).append(run)
        return run

    def _find_defect(self, submission: Path, table: TestTable) -> str:
        """What the grader would find wrong with a submission, or an empty string."""
        if not submission.is_file():
            return NO_SUBMISSION
        try:
            check_submission(submission, table, self.manifest.class_ids)
        except InputError as error:
            return str(error).replace(f"{submission.parent}/", "")
        return ""


def check_competition(data: Path, trained: CompetitionSpec) -> None:
    """Check that a folder is the competition that the bundle was trained on.

    Raises:
        InputError: it is another competition, or has other labelled observations.
    """
    found = find_competition(data).competition.name
    if recognise(data, [competition_of(trained)]) is None:
        raise InputError(f"{data} is of {found}, but the bundle was trained on {trained.name}: give its --data")
    digest = trained.observations_sha256
    if not digest:
        return
    from local.data.competition import read_competition  # imports numpy, which `--help` does not need

    with Progress(f"reading {data}, to check that the bundle was trained on it"):
        is_same = read_competition(data).observations_digest() == digest
    if not is_same:
        raise InputError(
            f"the training observations of {data} are not those that the bundle was trained on: give the --data of "
            "the training, or train again"
        )

"""One rehearsal: lay the competition and the bundle out, run the script over them, and note all there is to judge.

Called by the scenarios, which say what is changed before, what happens meanwhile, and what must come out.
"""

import csv
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kernel.competitions import COMPETITIONS, competition_named
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, read_weights
from kernel.observations import TestTable, find_test_table, recognise
from kernel.submission import check_submission, fallback_guesses
from kernel.tables import clean_id
from local.base.console import say
from local.data.folder import find_competition
from local.publishing.metadata import read_kernel_metadata
from local.rehearsal.record import check_bundle
from local.rehearsal.sandbox import Outcome, find_isolation, run_isolated
from local.rehearsal.staging import Stage, fingerprint, place, stage_bundle, stage_competition
from local.rehearsal.variations import keep_observations

ROOT = Path(__file__).resolve().parents[2]
OBSERVATIONS = 60  # of the test set that all scenarios but `plain` see, so that all of them take minutes
ANNOUNCED = "the fallback submission is written"
PLANNED = re.compile(r"\d+ of \d+ views of \d+ photos")
DONE = re.compile(
    r"^done: (?P<photos>\d+) photos \((?P<unreadable>\d+) unreadable.*\), (?P<observations>\d+) observations "
    r"\(\d+ on the fallback, (?P<late>\d+) too late\), (?P<views>.+) views, .* s, (?P<speed>[0-9.]+) photos/s$"
)


@dataclass(frozen=True)
class Ran:
    """What one run of the script left behind.

    Attributes:
        limit: seconds that it was given.
        lines: what it printed.
        moments: when each line was heard, in seconds since the start.
        table: what it was asked.
        guesses: of each observation, class ids, best first; empty where the submission cannot be read.
        damage: what is wrong with the submission, or an empty string.
        left: names of what lies in the working folder at the end.
        has_changed_inputs: whether a file that was mounted is another one now.
    """

    outcome: Outcome
    limit: float
    lines: list[str]
    moments: list[float]
    table: TestTable
    guesses: dict[str, list[str]]
    damage: str
    left: list[str]
    has_changed_inputs: bool

    @property
    def fault(self) -> str:
        """Why Kaggle would not score this run, or an empty string."""
        if self.outcome.timed_out:
            return f"killed after {self.outcome.seconds:.0f} s, the limit was {self.limit:.0f} s"
        if self.outcome.code:
            return f"exit code {self.outcome.code}: {self.lines[-1] if self.lines else 'no output'}"
        return self.damage or ("it changed its inputs" if self.has_changed_inputs else "")

    @property
    def done(self) -> dict[str, str]:
        """The named parts of DONE in the script's last word; empty where it said none."""
        found = [match for line in self.lines if (match := DONE.match(line))]
        return found[-1].groupdict() if found else {}

    def moment(self, pattern: str | re.Pattern) -> float | None:
        """Seconds from the start to the first line that holds a pattern; None if none did."""
        return next((at for at, line in zip(self.moments, self.lines, strict=True) if re.search(pattern, line)), None)


class Rehearsal(AbstractContextManager):
    """A competition and a bundle to rehearse, and a temporary folder in which to do it."""

    def __init__(
        self,
        data: Path,
        build: Path,
        solution: Path | None = None,
        time_limit: float | None = None,
        kills: int = 20,
        seed: int = 0,
    ):
        """Check what the user gave.

        Args:
            data: the competition's folder, as downloaded.
            solution: CSV of observation and class id, to score against.
            time_limit: seconds for the kernel's own budget and for the process; None is the competition's.
            kills: how often the script is killed to see what is left.

        Raises:
            InputError: the data, the bundle or the solution is not what it should be.
        """
        find_competition(data)
        if solution:
            read_solution(solution)  # a mistake in it is told before the competition's tables are read
        self.data, self.build, self.kills, self.seed = data, build, kills, seed
        self.metadata = read_kernel_metadata(ROOT / "kernel-metadata.json")
        check_bundle(build)
        self.manifest = read_weights(build / "weights").manifest
        refuse_other_competition(data, self.manifest.competition)
        self.limit = time_limit or self.manifest.competition.time_limit
        observations = [observation.id for observation in self.find_table(data).observations]
        self.truth = read_solution(solution, observations, self.manifest.class_ids) if solution else {}
        self.solution = solution
        self.performed: dict[str, tuple] = {}  # scenarios that others compare with

    def __enter__(self) -> "Rehearsal":
        self.temporary = tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=self.build)
        self.folder = Path(self.temporary.name).resolve()
        self.isolation = find_isolation(self.folder)
        say("network: " + ("cut off by a namespace" if self.isolation else "refused by a guard in the interpreter"))
        return self

    def __exit__(self, *_: object) -> None:
        self.temporary.cleanup()

    def lay_out(self, name: str, is_whole: bool = False, has_old_mounts: bool = False) -> Stage:
        """Lay out the bundle, and the competition or the few observations of it that most scenarios see."""
        inputs = self.folder / name / "input"
        competition, weights = self.metadata["competition_sources"][0], self.metadata["dataset_sources"][0]
        if has_old_mounts:
            mounts = inputs / competition, inputs / weights.partition("/")[2]
        else:
            mounts = inputs / "competitions" / competition, inputs / "datasets" / weights
        stage = Stage(name, inputs, *mounts, self.folder / name / "src")
        if is_whole:
            stage_competition(self.data, stage.competition)
        else:
            shutil.copytree(self._few(), stage.competition, copy_function=lambda a, b: place(Path(a), Path(b)))
        stage_bundle(self.build, stage.weights, stage.source)
        return stage

    def _few(self) -> Path:
        """The folder of a competition whose test set is a seeded part of the whole."""
        folder = self.folder / "few"
        if not folder.exists():
            stage_competition(self.data, folder)
            ids = [observation.id for observation in self.find_table(folder).observations]
            keep_observations(folder, set(random.Random(self.seed).sample(ids, min(OBSERVATIONS, len(ids)))))
        return folder

    def find_table(self, folder: Path) -> TestTable:
        """The test table in a folder, of the layout and the resolution that the bundle was trained on."""
        trained = self.manifest.competition
        return find_test_table(folder, trained.name, trained.resolution)

    def table(self, stage: Stage) -> TestTable:
        """What a stage asks."""
        return self.find_table(stage.inputs)

    def fallback(self, table: TestTable) -> list[str]:
        """What the kernel answers where no photo speaks."""
        return fallback_guesses(table, self.manifest.fallback_classes)

    def results(self, name: str) -> Path:
        """Where a scenario's last submission and its log are kept."""
        return self.build / "rehearsal" / name

    def run(
        self,
        stage: Stage,
        limit: float | None = None,
        grace: float = 0,
        hear: Callable[[str], None] | None = None,
        is_told: bool = False,
        **sandbox,
    ) -> Ran:
        """Run the script over a stage, in a process and a working folder of its own.

        Args:
            limit: seconds for the kernel's own budget and for the process; None is the rehearsal's.
            grace: seconds that the process may take beyond that.
            hear: called with each line of its output.
            is_told: whether the user sees these lines.
            sandbox: of `run_isolated`.
        """
        limit, lines, moments = limit or self.limit, [], []
        working, out = self.folder / stage.name / "working", self.results(stage.name)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        out.mkdir(parents=True, exist_ok=True)
        table, before = self.table(stage), fingerprint(stage.inputs)
        arguments = ["--input", str(stage.inputs), "--working", str(working), "--time-limit", str(limit)]
        read_only = [stage.inputs, stage.source]
        with (out / "kernel.log").open("a", encoding="utf-8") as log:

            def note(line: str) -> None:
                lines.append(line)
                moments.append(time.monotonic() - started)
                log.write(line + "\n")
                if is_told:
                    say(f"  | {line}")
                if hear:
                    hear(line)

            started = time.monotonic()
            outcome = run_isolated(
                stage.source / "script.py",
                arguments,
                read_only,
                working,
                self.isolation,
                limit + grace,
                note,
                **sandbox,
            )
        damage = self._examine(working / "submission.csv", table)
        guesses = {} if damage else read_guesses(working / "submission.csv", table)
        if (working / "submission.csv").is_file():
            shutil.copyfile(working / "submission.csv", out / "submission.csv")
        left = sorted(path.name for path in working.iterdir())
        return Ran(outcome, limit, lines, moments, table, guesses, damage, left, fingerprint(stage.inputs) != before)

    def _examine(self, submission: Path, table: TestTable) -> str:
        """What the grader would find wrong with a submission, or an empty string."""
        if not submission.is_file():
            return "it left no submission.csv"
        try:
            check_submission(submission, table, self.manifest.class_ids)
        except InputError as error:
            return str(error).replace(f"{submission.parent}/", "")
        return ""


def refuse_other_competition(data: Path, trained: CompetitionSpec) -> None:
    """The bundle is rehearsed on the competition that its runs were trained on.

    Args:
        trained: what they were trained on.

    Raises:
        InputError: the folder is another competition's, or has other labelled observations.
    """
    found = find_competition(data).competition.name
    if recognise(data, [competition_named(trained.name)]) is None:
        raise InputError(f"{data} is of {found}, but the bundle was trained on {trained.name}: give its --data")
    from local.data.competition import read_competition  # imports numpy, which `--help` should not wait for

    digest = trained.observations_sha256
    if digest and read_competition(data).observations_digest() != digest:
        raise InputError(
            f"the training observations of {data} are not those that the bundle was trained on: give the --data of "
            "the training, or train again"
        )


def read_solution(solution: Path, observations: Iterable[str] = (), classes: Iterable[str] = ()) -> dict[str, str]:
    """The class id of each observation, of a CSV with the two in its first columns, or of a test table with labels.

    Args:
        observations, classes: ids that are known, as the submission spells them.

    Raises:
        InputError: there is no such file, or it is no such CSV.
    """
    known = [set(observations), set(classes)]
    try:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        labels = [
            one.solution_columns
            for one in COMPETITIONS
            if one.solution_columns and set(one.solution_columns).issubset(header)
        ]
        columns = [header.index(name) for name in labels[0]] if labels else [0, 1]
        pairs = [[row[column] for column in columns] for row in rows if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error, IndexError) as error:
        raise InputError(f"no solution in {solution} ({error}): give a CSV of observation and class id") from error
    spelt = ([text if text in ids else clean_id(text) for text, ids in zip(pair, known, strict=True)] for pair in pairs)
    return dict(spelt)


def read_guesses(submission: Path, table: TestTable) -> dict[str, list[str]]:
    """The class ids, best first, that a submission gives each observation."""
    return dict(table.competition.read_submission(submission))

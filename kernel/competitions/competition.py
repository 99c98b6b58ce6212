"""What a competition is: one object that knows all that differs between competitions."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from kernel.inputs import InputError
from kernel.manifest import from_json
from kernel.tables import RESOLUTIONS, find_path, is_blank, iterate_table, visible

# Patterns of usual names of the sample submission, in lower case, the likely ones first.
SAMPLES = (r"sample.*sub|sub.*sample", r"^sample", r"^submission\.csv$", r"submission|submit")
SUM_TOLERANCE = 1e-3  # by which the probabilities of a row may miss 1, since they are written with few digits


def matching(names: Sequence[str], patterns: Sequence[str], without: str = "^$") -> list[list[str]]:
    """The names that match each pattern, each name once, the shortest first; patterns that none matches are left out.

    A copy has a longer name, such as "train (1).csv".
    """
    found: list[list[str]] = []
    names = sorted(names, key=len)
    for pattern in patterns:
        left = [name for name in names if not any(name in own for own in found)]
        own = [name for name in left if re.search(pattern, name.lower()) and not re.search(without, name.lower())]
        found += [own] if own else []
    return found


def find_tables_of(folder: Path) -> list[str]:
    """The names of the CSV files in a folder, sorted."""
    return [path.name for path in visible(folder.glob("*.[cC][sS][vV]")) if path.is_file()]


@dataclass(frozen=True, slots=True)  # there may be millions
class PhotoRow:
    """One photo of the test set.

    Attributes:
        observation: its id.
        photo: path relative to the folder of photos, with "/"; empty if the table names none.
        cells: the whole row, by column or key; empty without a table.
    """

    observation: str
    photo: str
    cells: Mapping = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)  # there may be millions
class LabelledPhoto:
    """One photo of the training set.

    Attributes:
        split: "train" or "val".
        observation: its id.
        class_id: as the table spells it.
        path: of the file.
        metadata: of the observation, by the columns of `Competition.metadata`; "" for a blank.
        taxa: name at each rank of `kernel.tables.TAXONOMY`, "" if unknown; empty if the competition has no taxonomy.
        species: name of the class; "" if unknown.
        poisonous: "1" if it is; "" if unknown.
    """

    split: str
    observation: str
    class_id: str
    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    taxa: tuple[str, ...] = ()
    species: str = ""
    poisonous: str = ""


@dataclass(frozen=True)
class AnswerForm:
    """How a submission answers for an observation: class ids in one cell, or the probability of each class in its own.

    An answer is a mapping from class ids to probabilities, the most probable first. The first form writes its keys, and
    the second one its values.

    Attributes:
        header: the columns, spelt as the grader expects them; the first is that of the observation's id.
        guesses: class ids in a cell, separated by spaces, best first. Of probabilities, how many of the most probable
            classes are scored here.
        classes: the class id of each column of probabilities; empty where a cell has class ids. A last class without a
            column has the rest of the probability.
        is_set: whether a cell has all classes that the observation shows, from 1 to `guesses`.
    """

    is_set: ClassVar[bool] = False
    header: tuple[str, ...]
    guesses: int
    classes: tuple[str, ...] = ()

    def ranked(self, classes: int) -> int:
        """How many of the best of `classes` classes an answer needs."""
        return classes if self.classes else min(self.guesses, classes)

    def write(self, answer: Mapping[str, float]) -> list[str]:
        """The cells of an answer. Probabilities of the columns' classes are scaled to sum to 1."""
        if not self.classes:
            return [" ".join(answer)]
        values = [answer.get(class_id, 0.0) for class_id in self.classes]
        total = sum(values)
        values = [value / total for value in values] if total > 0 else [1 / len(values)] * len(values)
        return [f"{value:.6g}" for value in values[: len(self.header) - 1]]

    def read(self, cells: Sequence[str]) -> dict[str, float]:
        """The answer in the cells of a row; class ids without probabilities get equal ones.

        Raises:
            ValueError: a probability is not a number.
        """
        if self.classes:
            values = [float(cell) for cell in cells]
            values += [1 - sum(values)] * (len(self.classes) - len(values))
            answer = dict(zip(self.classes, values, strict=True))
            return dict(sorted(answer.items(), key=lambda item: -item[1]))
        ids = cells[0].split() if self.guesses > 1 else cells[:1]  # the one id may be a folder's name, with spaces
        return dict.fromkeys(ids, 1 / len(ids)) if ids else {}

    def find_defect(self, cells: Sequence[str], class_ids: Collection[str]) -> str:
        """What the grader would refuse or score wrongly in the cells of a row; empty if nothing.

        Args:
            class_ids: that may be predicted; quick to search.
        """
        if not self.classes:
            answer, expected = self.read(cells), self.ranked(len(class_ids))
            is_right = (
                len(answer) == expected and all(one in class_ids for one in answer) and self.write(answer) == [*cells]
            )
            return "" if is_right else f"{cells[0]!r} is not {expected} distinct class ids"
        try:
            values = list(self.read(cells).values())
        except ValueError as error:
            return f"not all cells are probabilities ({error})"
        if not all(0 <= value <= 1 for value in values):  # false for NaN
            return "not all cells are probabilities from 0 to 1"
        if not math.isclose(sum(values), 1, abs_tol=SUM_TOLERANCE):
            return f"the probabilities sum to {sum(values):.6g}, not to 1"
        return ""


def default_metric(form: AnswerForm) -> str:
    """The usual metric of competitions with such answers, where nothing says which one a competition has."""
    if form.classes:
        return "log_loss"
    return "recall_at_5" if form.guesses >= 5 else "recall_at_1"


@dataclass(frozen=True, kw_only=True)
class Competition:
    """A competition: its files, the form of its submission, and its rules.

    Attributes:
        name: identifies the competition in a manifest.
        slug: its name in Kaggle's URLs; empty if it is not on Kaggle.
        table: glob of the test table in the competition's folder, of which the first match by name is used. Without a
            table, the folder of test photos.
        has_table: whether a table lists the test photos. If not, every photo is an observation, with a name made from
            its path, and a folder can be recognised by its photos alone.
        generality: 0 if the competition has files of its own by which it is recognised. Where several competitions
            recognise a folder, those with the lowest number count.
        is_recognised: without a table, whether a folder looks right.
        arrangement: without a table of a fixed name, what is looked for; for messages.
        find_settings: where the files and columns of a competition are not known beforehand, finds them in a folder, or
            what the kernel needs of them; None if it is not such a competition's.
        configure: the competition with the settings that were found, or that a manifest has.
        settings_type: the dataclass of these settings.
        settings: those that were found, a dataclass of the module; None where there is nothing to find.
        notes: what was found, and what was left out, in lines for the user.
        problem: why the folder cannot be trained on, in one line; empty if it can.
        photos: folder of the photos of a split, with {split} ("train", "val" or "test") and {subset}, the name of the
            table's folder.
        splits: what stands for {split}, where it is not the name of the split.
        resolutions: subfolders of `photos`, if the competition ships the photos in several sizes.
        sample: glob of the sample submission.
        form: of an answer in the submission.
        grids: where a test photo shows several classes, and is its own observation: it is cut into n x n tiles for each
            of these n, and a class is as probable as in its best tile. An answer is then a set.
        metric: score of the leaderboard, by its name in a run's validation scores.
        time_limit: of a kernel with a GPU, seconds.
        leaderboard: number of observations of its public and its private part, if known.
        solution_columns: of the observation and the class in a test table with labels, which can serve as a solution.
        metadata: columns that describe an observation; the test table has them too.
        read_rows: reads the test set, with ids as the table spells them; counts what it leaves out.
        read_labelled: reads the training set, with photos in the given resolution; counts what it leaves out.
        format_tables: makes the files that list the given rows, by their paths; for the rehearsal; none without a
            table.
        visible_tables: for the rehearsal, the tables that a kernel can read on Kaggle. Maps the path of each to its
            content without test labels, or to None if it has none.
    """

    name: str
    slug: str = ""
    table: str
    has_table: bool = True
    generality: int = 0
    is_recognised: Callable[[Path], bool] = lambda folder: True
    arrangement: str = ""
    find_settings: Callable[[Path], "Competition | None"] | None = None
    configure: Callable[[Any], "Competition"] | None = None
    settings_type: type | None = None
    settings: Any = None
    notes: tuple[str, ...] = ()
    problem: str = ""
    photos: str
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    resolutions: tuple[str, ...] = ()
    sample: str
    form: AnswerForm
    grids: tuple[int, ...] = ()
    metric: str
    time_limit: float
    leaderboard: tuple[int, ...] = ()
    solution_columns: tuple[str, str] | None = None
    metadata: tuple[str, ...] = ()
    read_rows: Callable[["CompetitionFolder", Counter], list[PhotoRow]]
    read_labelled: Callable[["CompetitionFolder", str, Counter], list[LabelledPhoto]]
    format_tables: Callable[["CompetitionFolder", Sequence[PhotoRow]], dict[Path, bytes]] = lambda found, rows: {}
    visible_tables: Callable[["CompetitionFolder"], dict[Path, bytes | None]] = lambda found: {found.table: None}

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of the submission."""
        return self.form.header

    @property
    def guesses(self) -> int:
        """Class ids in one row of the submission, best first; of probabilities, those that are scored here."""
        return self.form.guesses

    def with_settings(self, settings: Any) -> "Competition":
        """The same with its settings, also those of a manifest; without any, or where none are needed, itself.

        Raises:
            InputError: the settings of a manifest are damaged.
        """
        if not settings or not self.configure:
            return self
        if isinstance(settings, Mapping):
            try:
                settings = from_json(self.settings_type, dict(settings), "competition.settings")
            except ValueError as error:
                raise InputError(f"the manifest is damaged: {error}; train or bundle again") from error
        return self.configure(settings)

    def recognise(self, folder: Path) -> "CompetitionFolder | None":
        """The folder with its test table, or None if it is not this competition's, or cannot be read."""
        try:
            if self.find_settings and self.settings is None:
                configured = self.find_settings(folder)
                return configured.recognise(folder) if configured else None
            tables = visible(folder.glob(self.table))[:1] if self.has_table else [folder / self.table]
            return CompetitionFolder(folder, self, tables[0]) if tables and self.is_recognised(folder) else None
        except OSError:
            return None

    def boards(self, observations: int) -> dict[str, int]:
        """How many observations each part of the leaderboard scores.

        Args:
            observations: in the test set. The parts are known for the competition's own test set only.
        """
        if self.leaderboard and sum(self.leaderboard) == observations:
            return dict(zip(("public", "private"), self.leaderboard, strict=True))
        return {"whole test": observations}

    def smallest_resolution(self, side: int) -> str:
        """The smallest resolution whose photos are not enlarged to `side` pixels, or the largest."""
        if not self.resolutions:
            return RESOLUTIONS[0]
        return next((name for name in self.resolutions[:-1] if int(name.rstrip("p")) >= side), self.resolutions[-1])

    def sample_ids(self, folder: Path) -> list[str]:
        """The id in each row of the sample submission; none if there is no readable one."""
        return self._read_samples(folder, lambda path: [row[self.header[0]] for row in self._iterate(path)])

    def sample_classes(self, folder: Path) -> list[str]:
        """The class ids that the sample submission names."""
        return [*self.form.classes] or [class_id for _, answer in self.read_sample(folder) for class_id in answer]

    def read_sample(self, folder: Path) -> list[tuple[str, dict[str, float]]]:
        """The rows of the sample submission, as of `read_submission`; none if there is no readable one."""
        return self._read_samples(folder, partial(self.read_submission, is_missing=is_blank))

    def read_submission(
        self, path: Path, is_missing: Callable[[str | None], bool] = lambda cell: not cell
    ) -> list[tuple[str, dict[str, float]]]:
        """The observation and the answer of each row. Rows with a missing cell are left out.

        Args:
            is_missing: whether a cell holds nothing; by default an empty one, since a class may be named "none".

        Raises:
            InputError: the file is not CSV text, has another header, or a probability is not a number.
        """
        answers = []
        for row in self._iterate(path):
            cells = [row[column] for column in self.header[1:]]
            if not any(map(is_missing, cells)):
                try:
                    answers.append((row[self.header[0]], self.form.read(cells)))
                except ValueError as error:
                    raise InputError(f"{path}, row {row[self.header[0]]!r}: {error}: write it again") from error
        return answers

    def _iterate(self, path: Path) -> Iterator[dict[str, str]]:
        return iterate_table(path, self.header, filled=self.header[:1])

    def _read_samples(self, folder: Path, read: Callable[[Path], list]) -> list:
        for path in visible(folder.glob(self.sample)):
            try:
                if rows := read(path):
                    return rows
            except InputError:
                continue
        return []


@dataclass(frozen=True)
class CompetitionFolder:
    """A folder that was recognised as a competition's.

    Attributes:
        table: the test table. Without one, the folder of test photos, which may not exist.
    """

    path: Path
    competition: Competition
    table: Path

    def split_folder(self, split: str) -> Path:
        """The folder of a split's photos, or that of its resolutions."""
        competition = self.competition
        name = competition.splits.get(split, split)
        return self.path / find_path(self.path, competition.photos.format(subset=self.table.parent.name, split=name))

    def resolutions(self, split: str) -> list[str]:
        """The resolutions in which a split has been downloaded, smallest first."""
        return [name for name in self.competition.resolutions if (self.split_folder(split) / name).is_dir()]

    def photo_folder(self, split: str, resolution: str = RESOLUTIONS[0]) -> Path:
        """The folder of a split's photos in a resolution, or in the next larger one, or in the largest there is."""
        if not self.competition.resolutions:
            return self.split_folder(split)
        there = self.resolutions(split)
        larger = [name for name in there if RESOLUTIONS.index(name) >= RESOLUTIONS.index(resolution)]
        return self.split_folder(split) / (larger or there[-1:] or [resolution])[0]

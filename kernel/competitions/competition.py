"""What a competition is: one object that knows all that differs between competitions."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel.inputs import InputError
from kernel.tables import RESOLUTIONS, read_table, visible


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
        is_recognised: without a table, whether a folder looks right.
        arrangement: without a table, how the photos are arranged; for messages.
        photos: folder of the photos of a split, with {split} ("train", "val" or "test") and {subset}, the name of the
            table's folder.
        resolutions: subfolders of `photos`, if the competition ships the photos in several sizes.
        sample: glob of the sample submission.
        header: the two columns of the submission, spelt as the grader expects them.
        guesses: class ids in one row, best first.
        metric: score of the leaderboard, by its name in a run's validation scores.
        time_limit: of a kernel with a GPU, seconds.
        leaderboard: number of observations of its public and its private part, if known.
        solution_columns: of the observation and the class in a test table with labels, which can serve as a solution.
        metadata: columns that describe an observation; the test table has them too.
        read_rows: reads the test set, with ids as the table spells them; counts what it leaves out.
        read_labelled: reads the training set, with photos in the given resolution; counts what it leaves out.
        format_rows: makes a test table of the given rows; for the rehearsal; None without a table.
        visible_tables: for the rehearsal, the tables that a kernel can read on Kaggle. Maps the path of each to its
            content without test labels, or to None if it has none.
    """

    name: str
    slug: str = ""
    table: str
    has_table: bool = True
    is_recognised: Callable[[Path], bool] = lambda folder: True
    arrangement: str = ""
    photos: str
    resolutions: tuple[str, ...] = ()
    sample: str
    header: tuple[str, str]
    guesses: int
    metric: str
    time_limit: float
    leaderboard: tuple[int, ...] = ()
    solution_columns: tuple[str, str] | None = None
    metadata: tuple[str, ...] = ()
    read_rows: Callable[["CompetitionFolder", Counter], list[PhotoRow]]
    read_labelled: Callable[["CompetitionFolder", str, Counter], list[LabelledPhoto]]
    format_rows: Callable[["CompetitionFolder", Sequence[PhotoRow]], bytes] | None = None
    visible_tables: Callable[["CompetitionFolder"], dict[Path, bytes | None]] = lambda found: {found.table: None}

    def recognise(self, folder: Path) -> "CompetitionFolder | None":
        """The folder with its test table, or None if it is not this competition's, or cannot be read."""
        try:
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

    def format_answer(self, class_ids: Sequence[str]) -> str:
        """The second cell of a submission's row."""
        return " ".join(class_ids)

    def read_answer(self, cell: str) -> list[str]:
        """The class ids in the second cell of a submission's row, best first."""
        return cell.split() if self.guesses > 1 else [cell]  # the one id may be a folder's name, with spaces

    def read_sample(self, folder: Path) -> list[tuple[str, list[str]]]:
        """The rows of the sample submission, as of `read_submission`; none if there is no readable one."""
        for path in visible(folder.glob(self.sample)):
            try:
                rows = self.read_submission(path)
            except InputError:
                continue
            if rows:
                return rows
        return []

    def read_submission(self, path: Path) -> list[tuple[str, list[str]]]:
        """The observation and the class ids of each row, best first. Rows with a blank cell are left out.

        Raises:
            InputError: the file is not CSV text, or has another header.
        """
        identity, predictions = self.header
        rows = read_table(path, self.header, filled=self.header)
        return [(row[identity], self.read_answer(row[predictions])) for row in rows]


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
        return self.path / self.competition.photos.format(subset=self.table.parent.name, split=split)

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

"""What a competition is: everything that differs between competitions, in one object of each module beside this one."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel.inputs import InputError
from kernel.tables import RESOLUTIONS, read_table, visible


@dataclass(frozen=True)
class PhotoRow:
    """One photo of the test set.

    Attributes:
        observation: its id.
        photo: path relative to the folder of photos, with "/"; empty where the table names none.
        cells: all that the table says of it, by column or key; empty without a table.
    """

    observation: str
    photo: str
    cells: Mapping = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LabelledPhoto:
    """One photo of the training set.

    Attributes:
        split: "train" or "val".
        observation: its id.
        class_id: as the table spells it.
        path: of the file.
        metadata: what is known of the observation, by the competition's `metadata` columns; blanks are "".
        taxa: names by `kernel.tables.TAXONOMY`, "" where one is unknown; empty where the competition names none.
        species: name of the class; "" where it is unknown.
        poisonous: "1" if it is; "" where it is unknown.
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
    """One competition: its files, its submission and its rules.

    Attributes:
        name: by which a manifest knows it.
        slug: Kaggle's name of it; empty where it is none of Kaggle's, or stands for several.
        table: glob of the test table in the competition's folder, the first by name counts; or, without a table, the
            folder of test photos.
        has_table: whether a table lists the test photos. Without one, every photo is an observation, its id is the
            name of its file, and a folder can only be recognised by its photos.
        arrangement: for messages, how the photos are arranged where that is not what `table` says.
        is_recognised: whether a folder looks right, where there is no table to recognise it by.
        photos: folder of a split's photos, with {split} ("train", "val" or "test") and {subset}, the name of the
            table's folder.
        resolutions: subfolders of `photos`, where the competition ships the photos in several sizes.
        sample: glob of the sample submission.
        header: the two columns of the submission, spelt as the grader expects them.
        guesses: class ids in one row, best first.
        metric: by which the leaderboard ranks, named as in a run's validation scores.
        time_limit: for a kernel with a GPU, seconds.
        leaderboard: observations of the public and of the private part, where they are known.
        metadata: columns that describe an observation, in the test table too.
        read_rows: reads the test set; counts what it leaves out.
        read_labelled: reads the training set, with photos in one of the resolutions; counts what it leaves out.
        format_rows: a test table of other rows, for the rehearsal; only where there is a table.
        visible_tables: the tables that a kernel sees on Kaggle, for the rehearsal: the path of each, with the content
            that it has without the test labels, or None where it has none.
    """

    name: str
    slug: str = ""
    table: str
    has_table: bool = True
    arrangement: str = ""
    is_recognised: Callable[[Path], bool] = lambda folder: True
    photos: str
    resolutions: tuple[str, ...] = ()
    sample: str
    header: tuple[str, str]
    guesses: int
    metric: str
    time_limit: float
    leaderboard: tuple[int, ...] = ()
    metadata: tuple[str, ...] = ()
    read_rows: Callable[["CompetitionFolder", Counter], list[PhotoRow]]
    read_labelled: Callable[["CompetitionFolder", str, Counter], list[LabelledPhoto]]
    format_rows: Callable[["CompetitionFolder", Sequence[PhotoRow]], bytes] | None = None
    visible_tables: Callable[["CompetitionFolder"], dict[Path, bytes | None]] = lambda found: {found.table: None}

    def recognise(self, folder: Path) -> "CompetitionFolder | None":
        """The folder as this competition's, or None if it is not."""
        tables = visible(folder.glob(self.table))[:1] if self.has_table else [folder / self.table]
        return CompetitionFolder(folder, self, tables[0]) if tables and self.is_recognised(folder) else None

    def boards(self, observations: int) -> dict[str, int]:
        """How many observations each part of the leaderboard scores.

        Args:
            observations: size of the test set; the parts are known only for the competition's own.
        """
        if self.leaderboard and sum(self.leaderboard) == observations:
            return dict(zip(("public", "private"), self.leaderboard, strict=True))
        return {"whole test": observations}

    def format_answer(self, class_ids: Sequence[str]) -> str:
        """The second cell of a submission's row."""
        return " ".join(class_ids)

    def read_answer(self, cell: str) -> list[str]:
        """The class ids in the second cell of a submission's row, best first."""
        return cell.split() if self.guesses > 1 else [cell]  # the one id may be a folder's name, with spaces

    def read_sample(self, folder: Path) -> list[tuple[str, list[str]]]:
        """The ids and answers of the sample submission in a competition's folder; none without a readable one."""
        for path in visible(folder.glob(self.sample)):
            try:
                rows = self.read_submission(path)
            except InputError:
                continue
            if rows:
                return rows
        return []

    def read_submission(self, path: Path) -> list[tuple[str, list[str]]]:
        """The observation of each row and the class ids that it is given, best first; without rows that have a blank.

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
        table: the test table; without one, the folder of test photos, which may be missing.
    """

    path: Path
    competition: Competition
    table: Path

    def split_folder(self, split: str) -> Path:
        """The folder of a split's photos, or of its subfolders by resolution."""
        return self.path / self.competition.photos.format(subset=self.table.parent.name, split=split)

    def resolutions(self, split: str) -> list[str]:
        """The resolutions in which a split's photos are there, smallest first."""
        return [name for name in self.competition.resolutions if (self.split_folder(split) / name).is_dir()]

    def photo_folder(self, split: str, resolution: str = RESOLUTIONS[0]) -> Path:
        """The folder of a split's photos in a resolution, else in the next larger one, else in the largest there is."""
        if not self.competition.resolutions:
            return self.split_folder(split)
        there = self.resolutions(split)
        larger = [name for name in there if RESOLUTIONS.index(name) >= RESOLUTIONS.index(resolution)]
        return self.split_folder(split) / (larger or there[-1:] or [resolution])[0]

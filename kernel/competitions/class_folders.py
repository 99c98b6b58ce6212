"""Photos in one folder per class.

train/CLASS/photo     or CLASS/photo, without train/; a folder in this and the following may have another usual name,
                      such as train_images, and may be in a folder of the same name
val/CLASS/photo       may be missing
test/photo            in subfolders too
sample_submission.csv or as `SAMPLES` say; may be missing; its columns say how an answer is written: the class, or a
                      probability of each
classes.csv           of any name, where the sample submission has ids of classes and not the names of their folders: a
                      column of each

Every photo is an observation; if the sample submission has the names of the folders in test/, each of these is one, and
so is each folder in train/CLASS/.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from itertools import permutations
from pathlib import Path

from kernel.competitions.competition import (
    SAMPLES,
    AnswerForm,
    Competition,
    CompetitionFolder,
    LabelledPhoto,
    PhotoRow,
    default_metric,
    find_tables_of,
    matching,
)
from kernel.inputs import InputError
from kernel.manifest import MANIFEST
from kernel.tables import RESOLUTIONS, clean_id, compose, is_hidden, read_header, read_table, visible

SPLITS = ("train", "val", "test")
# Usual names of the folders of splits in lower case, such as "validation_set", "train images" and "test_stg1".
SPLIT_FOLDER = re.compile(
    r"(train|val|test)(ing|id|idation)?"
    r"([_\- ]?(images?|imgs?|photos?|pictures?|jpe?gs?|pngs?|(data)?set|data|features|sta?ge?\d+|\d+))*"
)
# All formats that Pillow decodes by itself. A list, because Pillow cannot be imported this early.
PHOTO_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga",
    ".icb", ".vda", ".vst", ".blp", ".cur", ".dcx", ".dds", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr",
    ".icns", ".ico", ".iim", ".im", ".msp", ".pcd", ".pcx", ".psd", ".pxr", ".qoi", ".bw", ".rgb", ".rgba", ".sgi",
    ".ras", ".xbm", ".xpm",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """What the sample submission says.

    Attributes:
        header: its columns.
        classes: the class of each column of probabilities; empty if a row names a class.
        sample: the name of the sample submission.
        test_folder: of the test photos, relative to the competition's folder.
    """

    sample: str = "sample_submission.csv"
    test_folder: str = "test"
    header: tuple[str, ...] = ("image_name", "pred_label")
    classes: tuple[str, ...] = ()


def find_photos(folder: Path, left_out: Counter) -> list[Path]:
    """The photos in a folder and its subfolders, sorted by path. Follows links.

    Args:
        left_out: counts the other files by their suffix, without hidden ones.
    """
    seen: set[str] = set()  # a link may lead back to a folder above

    def visit(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen or not folder.is_dir():
            return
        seen.add(real)
        with os.scandir(folder) as entries:
            folders = {entry.name: _is_folder(entry) for entry in entries if not is_hidden(entry.name)}
        for path in (folder / name for name in sorted(folders)):
            if folders[path.name]:
                yield from visit(path)
            elif path.suffix.lower() in PHOTO_SUFFIXES:
                yield path
            else:
                left_out[f"{path.suffix.lower()} files" if path.suffix else "files without a suffix"] += 1

    return list(visit(folder))


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether a file that was listed is a folder. Unlike `Path.is_dir`, it asks nothing of the disk but for links."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _is_recognised(folder: Path, test_folder: str = "test") -> bool:
    """Whether a folder has folders of classes, or a test folder of photos that is not another competition's."""
    test = folder / test_folder
    if _find_classes(folder):
        return True
    others = (*RESOLUTIONS, *SPLITS, "valid", "validation", "metadata.json")
    return test.is_dir() and not any((test / name).exists() for name in others) and not any(folder.glob("*train*.csv"))


def _split_of(path: Path) -> str:
    """The split that the name of a folder says; empty if it says none."""
    match = SPLIT_FOLDER.fullmatch(path.name.lower())
    return match[1] if match else ""


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split: of its name, or else the only one with another usual name.

    Some archives are unpacked into a folder that has nothing but a folder of the same name.
    """
    named = [path for path in visible(folder.iterdir()) if _split_of(path) == split and path.is_dir()]
    found = named[0] if len(named) == 1 else folder / split
    inner = found / found.name
    return inner if inner.is_dir() and visible(found.iterdir()) == [inner] else found


def _find_classes(folder: Path) -> list[Path]:
    """The folders of the classes, in train/ if it exists; none if these folders are something else.

    Folders named after resolutions are not classes, nor are those named after splits, except in train/ beside classes
    of other names, a folder of the kit's own runs, and what lies in one split beside others.
    """
    own = _split_of(folder)
    is_split = own and any(_split_folder(folder.parent, split).is_dir() for split in SPLITS if split != own)
    train = _split_folder(folder, "train")
    root = train if train.is_dir() else folder
    found = visible(path for path in root.iterdir() if path.is_dir())
    if root == folder:
        found = [path for path in found if not _has_runs(path)]
    reserved = [path for path in found if _split_of(path)]
    if reserved and (root == folder or reserved == found):
        return []
    if not found or is_split or any(path.name.lower() in RESOLUTIONS for path in found):
        return []

    def have_photos(pattern: str) -> bool:
        files = (path for one in found for path in one.glob(pattern) if path.suffix.lower() in PHOTO_SUFFIXES)
        return any(not is_hidden(path.name) for path in files)

    return found if have_photos("*") or (_has_folders(folder) and have_photos("*/*")) else []


def _has_runs(folder: Path) -> bool:
    """Whether a folder is a run, or has runs or their cache of embeddings in it. A run's plots are no photos."""
    manifests = [folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")]
    is_run = any(any(path.parent.glob("bank*.safetensors")) for path in manifests if path.is_file())
    return is_run or (folder / ".embeddings").is_dir()


def _has_folders(folder: Path) -> bool:
    """Whether the sample submission names folders in test/, each with the photos of one observation."""
    names = {compose(path.name) for path in _split_folder(folder, "test").glob("*") if path.is_dir()}
    return bool(names) and not names.isdisjoint(map(compose, _read_form(folder).sample_ids(folder)))


def _read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    photos = [path.relative_to(found.table) for path in find_photos(found.table, left_out)]
    ids = _name_photos(photos, found.competition.sample_ids(found.path))
    return [PhotoRow(id, photo.as_posix()) for id, photo in zip(ids, photos, strict=True)]


def _name_photos(photos: Sequence[Path], sample: Iterable[str]) -> list[str]:
    """The ids of the test photos: stem, file name, path without or with the suffix, or the folder of an observation.

    The ids must be distinct, except those of folders. Of the ways in which they are, the one that gives most ids of the
    sample submission counts, and of equals the first. Ids are spelt as it spells them.
    """
    ways = (
        [path.stem for path in photos],
        [path.name for path in photos],
        [path.with_suffix("").as_posix() for path in photos],
        [path.as_posix() for path in photos],
    )
    allowed = [ids for ids in ways if len(set(ids)) == len(ids)]
    allowed += [[path.parent.name for path in photos], [path.parent.as_posix() for path in photos]]
    known = {compose(name): name for name in sample}
    best = max(allowed, key=lambda ids: len(known.keys() & set(map(compose, ids))))
    spelt = [known.get(compose(name), name) for name in best]
    return spelt if len(set(spelt)) == len(set(best)) else best


# The kernel does not need the functions below: training reads the labelled photos, and how the sample submission names
# their classes.


def _read_labelled(found: CompetitionFolder, resolution: str, left_out: Counter) -> list[LabelledPhoto]:
    folder, classes = found.path, _find_classes(found.path)
    if not classes:
        raise InputError(
            f"{folder} (class-folders) has no folders of classes: arrange the photos as train/CLASS/photo, "
            "val/CLASS/photo and test/photo, or as CLASS/photo alone, or list them with their classes in a train.csv; "
            "names of splits, such as train or test1, are reserved: rename a class with such a name"
        )
    val = _split_folder(folder, "val")
    roots = [root for root in (classes[0].parent, val) if root.is_dir()]
    outside = [path for root in roots for path in visible(root.iterdir()) if path.is_file()]
    if outside:
        left_out["files in no class's folder"] += len(outside)
    folders = [("train", path) for path in classes]
    folders += [("val", path) for path in visible(val.iterdir() if val.is_dir() else ()) if path.is_dir()]
    has_folders = _has_folders(folder)
    id_of = _find_ids(found.competition, folder, [own.name for own in classes])
    photos = [
        LabelledPhoto(
            split,
            (path.parent if has_folders and path.parent != own else path).relative_to(folder).as_posix(),
            id_of.get(compose(own.name), own.name),
            path,
            species=own.name,
        )
        for split, own in folders
        for path in find_photos(own, left_out)
    ]
    for photo in photos:
        try:
            photo.observation.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{photo.observation!a} in {folder} is not UTF-8: unzip it as such, or rename it"
            ) from error
    return photos


def _read_form(folder: Path) -> Competition:
    """The competition with the columns of the sample submission of a folder."""
    test = _split_folder(folder, "test").relative_to(folder).as_posix()
    samples = matching(find_tables_of(folder), SAMPLES)
    settings = FolderSettings(sample=samples[0][0] if samples else FolderSettings.sample, test_folder=test)
    header = tuple(read_header(folder / settings.sample))
    if len(header) < 2:
        return configure(settings)
    return configure(replace(settings, header=header, classes=header[1:] if len(header) > 2 else ()))


def _find(folder: Path) -> Competition:
    """The same, with a problem if its classes are no folders."""
    found = _read_form(folder)
    names = [path.name for path in _find_classes(folder)]
    sample = folder / found.settings.sample
    if not names:  # a folder of test photos with another name may be any other competition's; of tables, more is known
        return replace(configure(replace(found.settings, test_folder=FolderSettings.test_folder)), generality=4)
    twice = [name for name, count in Counter(found.sample_ids(folder)).items() if count > 1]
    if twice:
        return replace(
            found,
            problem=f"{sample} lists {twice[0]!r} more than once: expected the ids of test photos in its first column",
        )
    said = found.sample_classes(folder)
    ids = _find_ids(found, folder, names)
    others = sorted({*map(compose, said)} - {*map(compose, ids.values() or names)})
    is_understood = not found.form.classes and (
        ids  # a row may have any class of them
        or len(others) < len(set(said))
        or (_is_placeholder(set(said)) and all(name.isdecimal() for name in names))
    )
    if is_understood or not others:
        has = f"{sample}: a row has the probabilities of {len(found.form.classes)} classes; scored by {found.metric}"
        return replace(found, notes=(*((has,) if found.form.classes else ()), *_unused_folders(folder)))
    if any(re.fullmatch(r"\d*\.\d+", name) for name in others):
        return replace(
            found,
            problem=f"{sample} has one number in a row, such as {others[0]!r}: list the photos with their classes in a "
            "train.csv, of which the probability of one class can be predicted",
        )
    named = ", ".join(map(repr, others[:3]))
    return replace(
        found,
        problem=f"{sample} has classes that are no folders of classes, such as {named}: rename the folders, write "
        "their names there, or add a classes.csv with a column of these names and one of the ids",
    )


def _unused_folders(folder: Path) -> list[str]:
    """A line for folders of photos beside that of train: one of the classes may be named like a split."""
    train = _split_folder(folder, "train")
    beside = visible(path for path in folder.iterdir() if path.is_dir() and not _split_of(path))
    unused = [
        path.name
        for path in beside
        if not _has_runs(path) and any(one.suffix.lower() in PHOTO_SUFFIXES for one in path.iterdir())
    ]
    if not unused or not train.is_dir():
        return []
    named = ", ".join(map(repr, unused[:3])) + (", ..." if len(unused) > 3 else "")
    verb = "is" if len(unused) == 1 else "are"
    return [
        f"{folder}: {named} beside {train.name}/ {verb} not read, since the folders in {train.name}/ are the classes; "
        f"if {train.name}/ is a class itself, rename it"
    ]


def _find_ids(found: Competition, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The ids by which the sample submission names classes, by the names of their folders, in Unicode's composed form.

    They are in a table with a column of the folders' names and one of the ids. It is looked for only if the sample
    submission has none of these names.

    Returns:
        Empty if there is no such table, or if it has several columns that may be the ids.
    """
    names, said = set(map(compose, names)), set(map(compose, found.sample_classes(folder) if names else ()))
    if not said or said & names:
        return {}
    matched: list[dict[str, str]] = []
    for path in visible(folder.glob("*.csv")):
        rows, header = read_table(path, ()) if path.name != found.settings.sample else [], read_header(path)
        columns = {column: [clean_id(row[column] or "") for row in rows] for column in header}
        for own, ids in permutations(columns.values(), 2):
            pairs = set(zip(map(compose, own), ids, strict=True))
            id_of = dict(pairs)
            is_one_to_one = len(pairs) == len(id_of) == len(set(id_of.values()))
            if is_one_to_one and names <= id_of.keys() and id_of not in matched:
                matched.append(id_of)
    named = [id_of for id_of in matched if said <= set(map(compose, id_of.values()))]
    if not named and _is_placeholder(said):
        named = [id_of for id_of in matched if all(one.isdecimal() for one in id_of.values())]
    return named[0] if len(named) == 1 else {}


def _is_placeholder(said: Collection[str]) -> bool:
    """Whether a sample submission answers with the same number everywhere, which says only that ids are numbers."""
    return len(said) == 1 and all(one.isdecimal() for one in said)


def configure(settings: FolderSettings) -> Competition:
    """The competition that some settings describe."""
    form = AnswerForm(settings.header, min(10, len(settings.classes)) or 1, settings.classes)
    return replace(
        CLASS_FOLDERS,
        settings=settings,
        form=form,
        metric=default_metric(form),
        table=settings.test_folder,
        is_recognised=partial(_is_recognised, test_folder=settings.test_folder),
        splits={"test": settings.test_folder},
        sample=escape(settings.sample),
    )


CLASS_FOLDERS = Competition(
    name="class-folders",
    table="test",
    has_table=False,
    generality=2,
    arrangement="train/CLASS/photo or CLASS/photo, where no class is named like a split, such as test",
    is_recognised=_is_recognised,
    find_settings=_find,
    configure=configure,
    settings_type=FolderSettings,
    photos="{split}",
    sample=FolderSettings.sample,
    form=AnswerForm(FolderSettings.header, guesses=1),
    metric="recall_at_1",
    time_limit=9 * 3600,
    read_rows=_read_rows,
    read_labelled=_read_labelled,
)
COMPETITIONS = (CLASS_FOLDERS,)

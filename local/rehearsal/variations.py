"""Change a staged competition or staged weights, as Kaggle or an accident might. Called by the scenarios.

Each function is one variation. Files are replaced and never written to, since they may be hard links to the user's own.
"""

import io
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from kernel.competitions.competition import Competition, CompetitionFolder, PhotoRow
from kernel.manifest import MANIFEST, read_manifest, write_manifest
from kernel.observations import TestTable, read_rows, recognise
from kernel.tables import compose
from local.base.files import link_or_copy
from local.data.folder import COMPETITIONS
from local.rehearsal.staging import photo_folders, replace_file


def recognise_staged(folder: Path, competition: Competition | None) -> CompetitionFolder:
    """The folder of a staged competition.

    Args:
        competition: with the settings of the bundle; None finds them again, where there are any.
    """
    return recognise(folder, [competition] if competition else COMPETITIONS)


def write_rows(found: CompetitionFolder, rows: Sequence[PhotoRow]) -> None:
    """Replace the test table by one of these rows, and remove the photos that only other rows name."""
    folders, before = photo_folders(found), read_rows(found, Counter())
    for path, content in found.competition.format_tables(found, rows).items():
        replace_file(path, content)
    kept = {row.photo for row in rows}
    for path in {folder / row.photo for folder in folders for row in before if row.photo and row.photo not in kept}:
        if path.is_dir():  # it stood for a photo that cannot be read
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def keep_observations(folder: Path, kept: Collection[str], competition: Competition | None = None) -> None:
    """Reduce a staged test set to some observations; for `competition` see `recognise_staged`."""
    found = recognise_staged(folder, competition)
    write_rows(found, [row for row in read_rows(found, Counter()) if row.observation in kept])


def keep_one_row(folder: Path, competition: Competition | None = None) -> None:
    """Reduce a staged test set to the first photo of the first observation."""
    found = recognise_staged(folder, competition)
    write_rows(found, read_rows(found, Counter())[:1])


def repeat_observations(folder: Path, times: int, competition: Competition | None = None) -> dict[str, str]:
    """Enlarge a staged test set by repeating its observations under new ids and file names.

    Returns:
        The original id of every id.
    """
    found = recognise_staged(folder, competition)
    rows, folders = read_rows(found, Counter()), photo_folders(found)
    repeated, originals = list(rows), {row.observation: row.observation for row in rows}
    for copy in range(1, times):
        # Digits, so that an id that was a number stays one; with the number of rows, so that it can be repeated again.
        prefix = f"9{len(rows)}0{copy}0"
        for row in rows:
            identity, photo = Path(row.observation), Path(row.photo)  # without a table, the path may be the id
            parent = photo.parent
            if compose(parent.name) == compose(identity.name) != compose(photo.stem):  # of one observation's photos
                photo = parent.with_name(prefix + parent.name) / photo.name
            elif row.photo:
                photo = photo.with_name(prefix + photo.name)
            new = replace(
                row,
                observation=identity.with_name(prefix + identity.name).as_posix(),
                photo=photo.as_posix() if row.photo else "",
            )
            for folder in folders:
                source = folder / row.photo
                if source.is_file():
                    link_or_copy(source, folder / new.photo)
            repeated.append(new)
            originals[new.observation] = row.observation
    write_rows(found, repeated)
    return originals


def truncate(path: Path) -> None:
    """Keep the first half of a file, as after an interrupted upload."""
    replace_file(path, path.read_bytes()[: path.stat().st_size // 2])


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_image(path: Path, image: Image.Image, form: str) -> None:
    content = io.BytesIO()
    image.save(content, form)
    replace_file(path, content.getvalue())


# No decoder can read photos of the first kinds; some decoders can read those of the others.
UNREADABLE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: replace_file(path, b""),
    "HTML": lambda path: replace_file(path, b"<!DOCTYPE html><title>404 Not Found</title>"),
    "a folder": _replace_by_folder,
    "missing": Path.unlink,
}
STRANGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "1x1": lambda path: _replace_by_image(path, Image.new("RGB", (1, 1)), "JPEG"),
    "16-bit PNG": lambda path: _replace_by_image(path, Image.new("I;16", (300, 400), 30000), "PNG"),
    "CMYK": lambda path: _replace_by_image(path, Image.new("CMYK", (300, 400), (20, 90, 60, 10)), "JPEG"),
}
SPOILED = 0.1  # fraction of the photos; more if that is less than one of each kind


def spoil_photos(table: TestTable, seed: int) -> dict[str, int]:
    """Replace photos by unreadable or strange ones, of each kind in turn; returns the number of each kind."""
    kinds = UNREADABLE | STRANGE
    photos = [photo for observation in table.observations for photo in observation.photos]
    has_folders = any(compose(one.id) == compose(path.parent.name) for one in table.observations for path in one.photos)
    if not table.competition.has_table or has_folders:
        del kinds["missing"]  # a photo that no table lists cannot be missing
    # The kernel takes a quarter of unreadable photos for a broken mount, so a small table cannot have every kind.
    count = min(max(len(kinds), round(SPOILED * len(photos))), len(photos) // 5)
    counts = dict.fromkeys(kinds, 0)
    for index, photo in enumerate(random.Random(seed).sample(photos, count)):
        kind = list(kinds)[index % len(kinds)]
        kinds[kind](photo)
        counts[kind] += 1
    return counts


def remove_photos(table: TestTable, seed: int) -> set[str]:
    """Remove all photos of a tenth of the observations, at least of one; returns their ids."""
    chosen = random.Random(seed).sample(table.observations, max(1, round(0.1 * len(table.observations))))
    for observation in chosen:
        for photo in observation.photos:
            photo.unlink()
    return {observation.id for observation in chosen}


def exchange_weights(weights: Path) -> None:
    """Replace the manifest by one of another run."""
    manifest = read_manifest(weights / MANIFEST)
    first, *others = manifest.members
    renamed = replace(first, name=f"{first.name}, another run")
    write_manifest(replace(manifest, members=(renamed, *others)), weights / MANIFEST)

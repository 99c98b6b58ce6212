"""Change a staged competition or staged weights as Kaggle, or bad luck, might. Called by the scenarios.

Each function is one variation. All rewrite what was staged, and none writes into a file, which may be the user's own.
"""

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from kernel.manifest import MANIFEST, read_manifest, write_manifest
from kernel.observations import (
    PHOTO_SUFFIXES,
    RESOLUTIONS,
    Layout,
    TestTable,
    clean_id,
    coco_id,
    find_photos,
    name_photos,
    photo_path,
    read_coco,
    read_sample,
    read_table,
)
from local.data.layout import find_layout
from local.rehearsal.staging import place, replace_file, write_csv


@dataclass(frozen=True)
class Row:
    """One photo in a test table of any layout.

    Attributes:
        name: of the file, relative to each folder of photos.
        entry: all that the table says of it; columns of a CSV, or an object of JSON.
    """

    observation: str
    name: str
    entry: dict


def read_rows(marker: Path) -> list[Row]:
    """The test table's rows, in its order."""
    if marker.suffix == ".csv":
        rows = read_table(marker, (), filled=("observationID",))
        return [Row(clean_id(row["observationID"]), row["filename"] or "", row) for row in rows]
    if marker.suffix == ".json":
        return [Row(coco_id(image, "image"), image["file_name"], image) for image in read_coco(marker)[1]["images"]]
    photos = find_photos(marker, Counter())
    names = name_photos(photos, marker, read_sample(marker.parent, find_layout(marker.parent)[0])[0])
    return [Row(name, path.relative_to(marker).as_posix(), {}) for name, path in zip(names, photos, strict=True)]


def write_rows(competition: Path, layout: Layout, marker: Path, rows: Sequence[Row]) -> None:
    """Put rows in the place of the test table, and remove the photos that none of them names."""
    if marker.suffix == ".csv":
        entries = [row.entry | {"observationID": row.observation, "filename": row.name} for row in rows]
        write_csv(marker, list(rows[0].entry), entries)
    elif marker.suffix == ".json":
        identity = "id" if "id" in rows[0].entry else "image_id"
        entries = [
            row.entry | {identity: type(row.entry[identity])(row.observation), "file_name": row.name} for row in rows
        ]
        is_bare = marker.read_bytes().lstrip().startswith(b"[")
        said = entries if is_bare else read_coco(marker)[1] | {"images": entries}
        replace_file(marker, json.dumps(said).encode("ascii"))
    for folder in photo_folders(competition, layout, marker):
        named = {photo_path(folder, row.name) for row in rows} | {marker}
        for path in [path for path in folder.rglob("*") if path not in named]:
            if path.is_file():
                path.unlink()
            elif path.suffix.lower() in PHOTO_SUFFIXES:
                path.rmdir()


def photo_folders(competition: Path, layout: Layout, marker: Path) -> list[Path]:
    """The folders of test photos; several where a competition ships several resolutions."""
    photos = layout.photo_folder(competition, marker, "test")
    return [photos / name for name in RESOLUTIONS if (photos / name).is_dir()] or [photos]


def keep_observations(competition: Path, wanted: Collection[str]) -> None:
    """Reduce a staged test set to some observations."""
    layout, marker = find_layout(competition)
    write_rows(competition, layout, marker, [row for row in read_rows(marker) if row.observation in wanted])


def keep_one_row(competition: Path) -> None:
    """Reduce a staged test set to the first photo of the first observation."""
    layout, marker = find_layout(competition)
    write_rows(competition, layout, marker, read_rows(marker)[:1])


def repeat_observations(competition: Path, times: int) -> dict[str, str]:
    """Enlarge a staged test set by repeating its observations under new ids and file names.

    Returns:
        The original id of every id.
    """
    layout, marker = find_layout(competition)
    rows, folders = read_rows(marker), photo_folders(competition, layout, marker)
    repeated, originals = list(rows), {row.observation: row.observation for row in rows}
    for copy in range(1, times):
        # Digits, so that an id which was a number stays one; the table's length, so that it can be repeated again.
        prefix = f"9{len(rows)}0{copy}0"
        for row in rows:
            name = photo_path(Path(), row.name)
            identity = Path(row.observation)  # of a photo that no table names, the path may be the id
            new = replace(
                row,
                observation=(identity.with_name(prefix + identity.name)).as_posix(),
                name=str(name.with_name(prefix + name.name)) if row.name else "",
            )
            for folder in folders:
                source = photo_path(folder, row.name)
                if source.is_file():
                    place(source, source.with_name(prefix + source.name))
            repeated.append(new)
            originals[new.observation] = row.observation
    write_rows(competition, layout, marker, repeated)
    return originals


def truncate(path: Path) -> None:
    """Leave the first half of a file, as an upload that broke off does."""
    replace_file(path, path.read_bytes()[: path.stat().st_size // 2])


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_image(path: Path, image: Image.Image, form: str) -> None:
    content = io.BytesIO()
    image.save(content, form)
    replace_file(path, content.getvalue())


# Photos of the first kinds cannot be read; whether those of the others can be is the decoder's affair.
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
HOSTILE_SHARE = 0.1  # of the photos; more where that is less than one of each kind


def spoil_photos(table: TestTable, seed: int) -> dict[str, int]:
    """Replace photos by hostile ones, of each kind in turn.

    Returns:
        How many photos of each kind there are now.
    """
    kinds = UNREADABLE | STRANGE
    if table.layout.name == "class-folders":
        del kinds["missing"]  # there the photos are the table
    photos = [photo for observation in table.observations for photo in observation.photos]
    # The kernel takes a quarter of unreadable photos for a broken mount, so a small table cannot have every kind.
    count = min(max(len(kinds), round(HOSTILE_SHARE * len(photos))), len(photos) // 5)
    counts = dict.fromkeys(kinds, 0)
    for index, photo in enumerate(random.Random(seed).sample(photos, count)):
        kind = list(kinds)[index % len(kinds)]
        kinds[kind](photo)
        counts[kind] += 1
    return counts


def remove_photos(table: TestTable, seed: int, share: float = 0.1) -> set[str]:
    """Remove all photos of some observations, at least of one; returns their ids."""
    gone = random.Random(seed).sample(table.observations, max(1, round(share * len(table.observations))))
    for observation in gone:
        for photo in observation.photos:
            photo.unlink()
    return {observation.id for observation in gone}


def remove_weights(weights: Path) -> None:
    """Take staged weights away, as a kernel has it whose dataset was not attached."""
    shutil.rmtree(weights)


def truncate_weights(weights: Path) -> None:
    """Break off the largest file of staged weights."""
    truncate(max(weights.rglob("*.safetensors"), key=lambda path: path.stat().st_size))


def exchange_weights(weights: Path) -> None:
    """Put the weights of another run in the place of staged ones, as far as the manifest can tell."""
    manifest = read_manifest(weights / MANIFEST)
    first, *others = manifest.members
    renamed = replace(first, name=f"{first.name}, another run")
    write_manifest(replace(manifest, members=(renamed, *others)), weights / MANIFEST)  # in the place of a link, too

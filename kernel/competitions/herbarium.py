"""Herbarium 2020, 2021 and 2022.

sample_submission.csv         Id,Predicted: one class id
nybg2020/test/metadata.json   COCO: a list of images; train/metadata.json has annotations and categories too
nybg2020/test/images/000/...  the path in the metadata begins with images/

In 2021 the folders are test/ and train/. In 2022 they are test_images/ and train_images/ beside test_metadata.json and
train_metadata.json.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel.competitions.competition import AnswerForm, Competition, CompetitionFolder, LabelledPhoto, PhotoRow
from kernel.inputs import InputError, shorten
from kernel.tables import TAXONOMY, clean_id, is_blank, photo_name


def _read_coco(path: Path) -> tuple[dict[str, PhotoRow], dict]:
    """The photos of COCO metadata by their ids, and the whole content.

    2020 and 2021 are written in ISO-8859-1. 2022 is UTF-8, calls an id `image_id` or `category_id`, and its test
    metadata are only a list of images.

    Raises:
        InputError: the file is not JSON, or an image lacks its id or file name.
    """
    try:
        content = path.read_bytes()
        try:
            coco = json.loads(content)
        except UnicodeDecodeError:
            coco = json.loads(content.decode("ISO-8859-1"))
        coco = {"images": coco} if isinstance(coco, list) else coco
        rows = [
            PhotoRow(_coco_id(image, "image"), photo_name(_coco_text(image, "file_name")), image)
            for image in _coco_value(coco, "images")
        ]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(path, error) from error
    return {row.observation: row for row in rows}, coco


def _refusal(path: Path, reason: object) -> InputError:
    """That COCO metadata are damaged."""
    return InputError(f"{path} cannot be read as COCO metadata: {shorten(reason)}; download it again")


def _coco_value(entry: dict, *keys: str) -> Any:
    """The value of the first of some keys that an image, an annotation or the whole has.

    Raises:
        ValueError: it has none of them.
    """
    for key in keys:
        if key in entry:
            return entry[key]
    raise ValueError(f"{' or '.join(keys)} is missing in {shorten(entry, 80)}")


def _coco_text(entry: dict, *keys: str) -> str:
    """The same as text; empty for null."""
    value = _coco_value(entry, *keys)
    return "" if value is None else str(value)


def _coco_id(entry: dict, kind: str) -> str:
    """The id of an image or category."""
    return clean_id(_coco_text(entry, "id", f"{kind}_id"))


def _read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    images, _ = _read_coco(found.table)
    return list(images.values())


# The kernel does not need the functions below. Training reads the labelled photos, and the rehearsal writes test sets.


def _read_labelled(found: CompetitionFolder, resolution: str, left_out: Counter) -> list[LabelledPhoto]:
    table = found.path / found.table.relative_to(found.path).as_posix().replace("test", "train")
    images, coco = _read_coco(table)
    folder, unknown = found.split_folder("train"), (("",) * len(TAXONOMY), "")
    try:
        classes = {
            _coco_id(category, "category"): (
                tuple(str(category.get(rank) or "") for rank in TAXONOMY),
                str(category.get("name") or category.get("scientificName") or ""),
            )
            for category in coco.get("categories", ())
        }
        photos, unknown_images = [], []
        for annotation in _coco_value(coco, "annotations"):
            image, class_id = (clean_id(_coco_text(annotation, key)) for key in ("image_id", "category_id"))
            if is_blank(class_id):
                left_out[f"annotations of {table.name} without category_id"] += 1
            elif image not in images:
                unknown_images.append(image)
            elif not images[image].photo:
                left_out[f"annotations of {table.name} whose image has no file_name"] += 1
            else:
                taxa, species = classes.get(class_id, unknown)
                path = folder / images[image].photo
                photos.append(LabelledPhoto("train", image, class_id, path, taxa=taxa, species=species))
    except (ValueError, TypeError, AttributeError) as error:
        raise _refusal(table, error) from error
    if unknown_images:
        named = ", ".join(map(repr, unknown_images[:3]))
        raise _refusal(table, f"annotations of images that it does not list: {len(unknown_images)}, such as of {named}")
    return photos


def _format_tables(found: CompetitionFolder, rows: Sequence[PhotoRow]) -> dict[Path, bytes]:
    key = "id" if "id" in rows[0].cells else "image_id"
    images = []
    for row in rows:
        observation = type(row.cells[key])(row.observation)  # an id that was a number stays one
        images.append({**row.cells, key: observation, "file_name": row.photo})
    is_list = found.table.read_bytes().lstrip().startswith(b"[")
    content = images if is_list else {**_read_coco(found.table)[1], "images": images}
    return {found.table: json.dumps(content).encode("ascii")}


_HERBARIUM_2020 = Competition(
    name="herbarium",
    slug="herbarium-2020-fgvc7",
    table="nybg2020/test/metadata.json",
    photos="nybg2020/{split}",
    sample="sample_submission.csv",
    form=AnswerForm(("Id", "Predicted"), guesses=1),
    metric="macro_f1",
    time_limit=9 * 3600,
    read_rows=_read_rows,
    read_labelled=_read_labelled,
    format_tables=_format_tables,
)
COMPETITIONS = (
    _HERBARIUM_2020,
    replace(
        _HERBARIUM_2020,
        name="herbarium-2021",
        slug="herbarium-2021-fgvc8",
        table="test/metadata.json",
        photos="{split}",
    ),
    replace(
        _HERBARIUM_2020,
        name="herbarium-2022",
        slug="herbarium-2022-fgvc9",
        table="test_metadata.json",
        photos="{split}_images",
    ),
)

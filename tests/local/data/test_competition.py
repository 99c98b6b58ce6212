"""Every layout's training tables are read as the competition spells them, and split without leaks.

python -m pytest tests/local/data/test_competition.py
"""

import csv
import gc
import json
import os
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from kernel.inputs import InputError
from kernel.tables import TAXONOMY
from local.data.competition import read_competition
from local.data.folder import find_competition
from local.data.photos import refuse_missing
from local.report.evidence import name_ranks, names_of
from tests import layouts
from tests.conftest import photo
from tests.labelled import photo_rows

DATASET = "FungiTastic-FewShot"
COLUMNS = ("year", "observationID", "species", "filename", "category_id")
TRAIN = [
    ("2021", "900", "Russula rosea", "0-900.JPG", "10"),
    ("2021", "70", "Amanita muscaria", "0-70.JPG", "9"),
    ("2021", "900", "Russula rosea", "1-900.JPG", "10"),
    ("2021", "71", "Boletus edulis", "0-71.JPG", "0100"),
]
VAL = [("2022", "8", "Amanita muscaria", "0-8.JPG", "9")]


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def fungiclef(
    folder: Path,
    train: list | None = TRAIN,
    val: list | None = VAL,
    columns: tuple[str, ...] = COLUMNS,
    resolutions: tuple[str, ...] = ("300p",),
) -> Path:
    """A competition in the form of FungiCLEF 2025; a table that is None is left out."""
    tables = folder / "metadata" / DATASET
    write_csv(tables / f"{DATASET}-Test.csv", ("observationID", "filename"), [("1", "0-1.JPG")])
    for split, rows in (("train", train), ("val", val)):
        if rows is None:
            continue
        write_csv(tables / f"{DATASET}-{split.title()}.csv", columns, rows)
        for resolution in resolutions:
            photos = folder / "images" / DATASET / split / resolution
            photos.mkdir(parents=True)
            for row in rows:
                (photos / row[3]).write_text(f"{split} {resolution}", encoding="utf-8")
    return folder


def of_sizes(folder: Path, sizes: dict[str, int]) -> Path:
    """A competition without a validation split, with so many observations of each class, two photos each."""
    numbers = iter(range(1000))
    rows = [
        ("2021", str(number), "", f"{photo}-{number}.JPG", name)
        for name, size in sizes.items()
        for number in (next(numbers) for _ in range(size))
        for photo in range(2)
    ]
    return fungiclef(folder, train=rows, val=None)


def herbarium(folder: Path, images: list[dict], annotations: list[dict], **more: object) -> Path:
    """A competition in the form of Herbarium 2020: COCO in ISO-8859-1."""
    metadata = {"annotations": annotations, "images": images, **more}
    for split, text in (("train", json.dumps(metadata, ensure_ascii=False)), ("test", '{"images": []}')):
        path = folder / "nybg2020" / split / "metadata.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode("ISO-8859-1"))
    return folder


def class_folders(folder: Path, *names: str) -> Path:
    (folder / "test").mkdir(parents=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        read_competition(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_fungiclefs_tables_give_photos_with_the_ids_as_they_are_spelt(tmp_path: Path) -> None:
    labelled = read_competition(fungiclef(tmp_path))
    photos = tmp_path / "images" / DATASET
    assert labelled.competition.name == "fungiclef"
    assert photo_rows(labelled) == [
        ("train", "900", "10", photos / "train" / "300p" / "0-900.JPG"),
        ("train", "900", "10", photos / "train" / "300p" / "1-900.JPG"),
        ("train", "70", "9", photos / "train" / "300p" / "0-70.JPG"),
        ("train", "71", "0100", photos / "train" / "300p" / "0-71.JPG"),
        ("val", "8", "9", photos / "val" / "300p" / "0-8.JPG"),
    ]
    train = labelled.in_splits("train")
    assert [(observation.id, len(observation.photos)) for observation in train.observations] == [
        ("900", 2),
        ("70", 1),
        ("71", 1),
    ]
    assert train.class_ids.tolist() == ["10", "9", "0100"]
    assert len(labelled) == 4


def test_a_photo_that_is_listed_twice_is_one(tmp_path: Path) -> None:
    labelled = read_competition(fungiclef(tmp_path, train=[*TRAIN, TRAIN[0]]))
    assert len(labelled.photos) == 5


def test_the_wanted_resolution_is_read_or_the_next_larger_one(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path, resolutions=("300p", "720p"))
    for requested, found in (("300p", "300p"), ("500p", "720p"), ("720p", "720p"), ("fullsize", "720p")):
        photos = read_competition(folder, requested).photos
        assert {path.parent.name for path in photos} == {found}
        assert all(path.is_file() for path in photos)


def test_herbariums_metadata_is_read_in_its_own_encoding(tmp_path: Path) -> None:
    labelled = read_competition(
        herbarium(
            tmp_path,
            images=[
                {"id": 33, "file_name": "images/000/00/33.jpg"},
                {"id": 7, "file_name": "images/000/01/Bétula.jpg"},
            ],
            annotations=[{"image_id": 7, "category_id": 1000}, {"image_id": 33, "category_id": 2}],
            categories=[{"id": 2, "name": "Betula pubéscens", "family": "Betulaceæ"}],
        )
    )
    photos = tmp_path / "nybg2020" / "train" / "images" / "000"
    assert labelled.competition.name == "herbarium"
    assert photo_rows(labelled) == [
        ("train", "7", "1000", photos / "01" / "Bétula.jpg"),
        ("train", "33", "2", photos / "00" / "33.jpg"),
    ]


@pytest.mark.parametrize(
    ("year", "lineage"),
    [
        (2020, ("", "", "", "Boletaceae", "Boletus")),
        (2021, ("", "", "Boletales", "Boletaceae", "")),
        (2022, ("", "", "", "Boletaceae", "Boletus")),
    ],
)
def test_the_herbaria_of_three_years_give_photos_classes_and_what_they_name_of_the_taxonomy(
    tmp_path: Path, year: int, lineage: tuple[str, ...]
) -> None:
    layouts.herbarium(tmp_path, year)
    labelled = read_competition(tmp_path)
    assert len(labelled.photos) == 3 * len(layouts.SPECIES)
    assert set(labelled.class_ids) == set(layouts.SPECIES)
    assert all(photo.is_file() for photo in labelled.photos)
    assert all(path.parent.name == class_id for _, _, class_id, path in photo_rows(labelled))
    assert labelled.taxa["12"] == lineage


@pytest.mark.parametrize("subset", ["FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot"])
def test_fungitastic_is_learnt_from_the_subset_whose_photos_are_there(tmp_path: Path, subset: str) -> None:
    layouts.fungitastic(tmp_path, subset)
    labelled = read_competition(tmp_path)
    assert labelled.competition.name == subset.lower()
    train, val = labelled.in_splits("train"), labelled.in_splits("val")
    assert (len(train), len(val)) == (2 * len(layouts.SPECIES), len(layouts.SPECIES))
    assert set(train.class_ids) == set(val.class_ids) == set(layouts.SPECIES)
    assert not {one.id for one in train.observations} & {one.id for one in val.observations}
    photos = {photo for one in (*train.observations, *val.observations) for photo in one.photos}
    assert {photo.relative_to(tmp_path).parts[0] for photo in photos} == {subset}
    assert all(photo.is_file() for photo in photos)
    assert train.observations[0].metadata == {"habitat": "garden"}
    assert labelled.taxa == {label: ranks[:5] for label, ranks in layouts.SPECIES.items()}


def test_a_resolution_that_is_absent_is_one_line_with_those_there_are(tmp_path: Path, capsys) -> None:
    layouts.fungitastic(tmp_path, resolutions=("300p", "720p"))
    for requested, found in (("300p", None), ("500p", "720p"), ("720p", None), ("fullsize", "720p")):
        photos = read_competition(tmp_path, requested).photos
        assert {photo.parent.name for photo in photos} == {found or requested}
        line = f"{tmp_path / 'FungiTastic-Mini'} has 300p, 720p, not {requested}: reading {found}\n"
        assert capsys.readouterr().out == (line if found else "")


def test_photos_in_no_folder_of_a_resolution_are_refused_with_what_is_there(tmp_path: Path) -> None:
    layouts.fungitastic(tmp_path)
    (tmp_path / "FungiTastic-Mini" / "train" / "300p").rename(tmp_path / "FungiTastic-Mini" / "train" / "300")
    message = refusal(tmp_path)
    assert str(tmp_path / "FungiTastic-Mini" / "train") in message
    assert "none of 300p, 500p, 720p, fullsize, but 300:" in message


def test_an_observation_in_train_and_val_is_refused_with_its_id(tmp_path: Path) -> None:
    shared = [("2022", "70", "Amanita muscaria", "9-70.JPG", "9")]
    assert "observation 70 in" in (message := refusal(fungiclef(tmp_path, val=shared)))
    assert "2 splits" in message


def test_class_folders_give_a_class_for_each_folder_and_an_observation_for_each_photo(tmp_path: Path) -> None:
    folder = class_folders(
        tmp_path,
        "train/red oak/b.jpg",
        "train/red oak/a.PNG",
        "train/elm/a.jpeg",
        "train/elm/notes.txt",
        "val/elm/a.jpeg",
    )
    labelled = read_competition(folder)
    assert labelled.competition.name == "class-folders"
    assert photo_rows(labelled) == [
        ("train", "train/elm/a.jpeg", "elm", tmp_path / "train/elm/a.jpeg"),
        ("train", "train/red oak/a.PNG", "red oak", tmp_path / "train/red oak/a.PNG"),
        ("train", "train/red oak/b.jpg", "red oak", tmp_path / "train/red oak/b.jpg"),
        ("val", "val/elm/a.jpeg", "elm", tmp_path / "val/elm/a.jpeg"),
    ]


def test_metadata_and_taxonomy_are_the_first_that_an_observation_and_a_class_have(tmp_path: Path) -> None:
    columns = (*COLUMNS, "habitat", "phylum", "order", "family", "genus")
    more = [
        ("", "Basidiomycota", "Russulales", "", "Russula"),
        ("bog", "", "", "", "Amanita"),
        ("dune", "", "", "Russulaceae", ""),
        ("",) * 5,
    ]
    rows = [(*row, *cells) for row, cells in zip(TRAIN, more, strict=True)]
    labelled = read_competition(fungiclef(tmp_path, train=rows, val=None, columns=columns))
    train = labelled.in_splits("train")
    assert [observation.metadata for observation in train.observations] == [
        {"year": "2021", "habitat": "dune"},
        {"year": "2021", "habitat": "bog"},
        {"year": "2021"},
    ]
    assert labelled.taxa == {
        "10": ("Basidiomycota", "", "Russulales", "Russulaceae", "Russula"),
        "9": ("", "", "", "", "Amanita"),
        "0100": ("",) * 5,
    }


def test_a_competition_without_a_taxonomy_has_blank_lineages(tmp_path: Path) -> None:
    class_folders(tmp_path, "train/a/1.png", "train/b/2.png")
    labelled = read_competition(tmp_path)
    assert labelled.taxa == {"a": ("",) * 5, "b": ("",) * 5}
    assert not labelled.in_splits("train").observations[0].metadata


BLANKS = (
    "", " ", "None", "nan", "NaN", "NULL", "<NA>", "N/A", "n/a", "unknown", "Unknown ", "incertae sedis",
    "Incertae_sedis", "Agaricales incertae sedis", "unclassified", "unclassified Agaricales", "unidentified", "?", "-",
)  # fmt: skip


@pytest.mark.parametrize("blank", BLANKS)
def test_classes_whose_taxon_is_blank_are_no_relatives_at_any_rank(tmp_path: Path, blank: str) -> None:
    columns = (*COLUMNS, *TAXONOMY)
    rows = [(*row, *(blank,) * 5) for row in TRAIN]
    labelled = read_competition(fungiclef(tmp_path, train=rows, val=None, columns=columns))
    classes = labelled.classes
    assert set(labelled.taxa.values()) == {("",) * 5}
    taxonomy = labelled.taxonomy(classes)
    assert len(set(taxonomy.genus)) == len(set(taxonomy.family)) == len(classes)
    assert set(labelled.group_by_rank(classes).values()) == {None}
    assert [rank.name for rank in name_ranks(labelled, classes, classes)] == ["species"]


def test_a_taxon_that_one_row_of_a_class_names_counts_for_the_class(tmp_path: Path) -> None:
    columns, (first, other, second, _) = (*COLUMNS, "family", "genus"), TRAIN  # two photos of class 10
    rows = [(*first, " Russulaceae ", "unclassified"), (*second, "unknown", " Russula"), (*other, "?", "-")]
    labelled = read_competition(fungiclef(tmp_path, train=rows, val=None, columns=columns))
    assert labelled.taxa == {"10": ("", "", "", "Russulaceae", "Russula"), "9": ("",) * 5}


def test_a_null_in_a_herbariums_categories_is_no_taxon(tmp_path: Path) -> None:
    layouts.herbarium(tmp_path, 2020)
    table = tmp_path / "nybg2020" / "train" / "metadata.json"
    said = json.loads(table.read_text(encoding="ISO-8859-1"))
    for category, blank in zip(said["categories"], (None, "Incertae sedis", float("nan")), strict=False):
        category |= {"family": blank, "genus": blank, "name": None}
    table.write_text(json.dumps(said), encoding="utf-8")
    labelled, classes = read_competition(tmp_path), [str(one["id"]) for one in said["categories"][:3]]
    assert [labelled.taxa[one] for one in classes] == [("",) * 5] * 3
    assert names_of(labelled, classes) == classes


def test_an_unknown_layout_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    message = refusal(tmp_path)
    assert message.startswith(f"no supported competition found in {tmp_path}")
    for looked_for in (
        "metadata/*/*-Test.csv",
        "nybg2020/test/metadata.json",
        "test_metadata.json",
        "train/CLASS/photo",
    ):
        assert looked_for in message


def test_a_folder_that_is_not_there_and_one_that_is_a_file_are_named_as_such(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").startswith(f"{tmp_path / 'gone'} does not exist")
    (tmp_path / "data.zip").touch()
    assert refusal(tmp_path / "data.zip").startswith(f"{tmp_path / 'data.zip'} is a file: unpack it")


def test_a_folder_inside_or_around_the_right_one_is_refused_with_the_right_one(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path / "downloads" / "fungi")
    for wrong in ("images", f"images/{DATASET}", f"images/{DATASET}/train", f"images/{DATASET}/train/300p", "metadata"):
        assert f"did you mean {folder}?" in refusal(folder / wrong)
    assert f"did you mean {folder}?" in refusal(folder.parent)
    folders = class_folders(tmp_path / "folders", "train/elm/a.jpg", "train/oak/a.jpg", "test/b.jpg")
    assert f"did you mean {folders}?" in refusal(folders / "train")


@pytest.mark.parametrize(
    "names",
    [("elm/a.jpg", "oak/a.jpg"), ("train/elm/a.jpg", "train/oak/a.jpg"), ("train/elm/young/a.jpg", "train/oak/a.jpg")],
)
def test_class_folders_without_a_test_set_are_learnt_from(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        photo(tmp_path / name)
    labelled = read_competition(tmp_path)
    assert labelled.competition.name == "class-folders"
    assert labelled.class_ids.tolist() == ["elm", "oak"]
    assert [path.relative_to(tmp_path).as_posix() for path in labelled.photos] == list(names)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_of_any_usual_name_is_val(tmp_path: Path, name: str) -> None:
    labelled = read_competition(class_folders(tmp_path, "train/elm/a.jpg", "train/oak/a.jpg", f"{name}/elm/b.jpg"))
    assert labelled.is_val.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "names",
    [
        ("train/elm/a.jpg",),
        ("train/train/elm/a.jpg", "train/val/elm/a.jpg"),
        ("train/300p/a.jpg", "train/500p/a.jpg"),
        ("train/trees/elm/a.jpg", "train/trees/oak/a.jpg"),
        ("train/a.jpg", "train/b.jpg"),
    ],
    ids=["one class", "splits", "resolutions", "one level too deep", "no folders"],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    refusal(class_folders(tmp_path, *names))


def test_photos_of_every_format_are_learnt_from_and_other_files_are_counted(tmp_path: Path, capsys) -> None:
    names = ("a.jpg", "b.BMP", "c.tif", "d.gif", "e.avif", "f.jp2", "a.png")
    others = ("g.HEIC", "h.heic", "notes.txt", ".DS_Store", "._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg")
    hidden = ("train/.ipynb_checkpoints/a.jpg", "train/__MACOSX/a.jpg")
    class_folders(
        tmp_path, *(f"train/elm/{name}" for name in (*names, *others)), "train/oak/a.jpg", "train/x.jpg", *hidden
    )
    assert Counter(read_competition(tmp_path).class_ids) == {"elm": len(names), "oak": 1}
    line = "(left out: .heic files: 2, files in no class's folder: 1, .txt files: 1)"
    assert capsys.readouterr().out == f"{tmp_path} {line}\n"


def test_numbers_that_two_tables_spell_differently_are_one_class_and_one_observation(tmp_path: Path) -> None:
    train = [(*row[:4], f"{int(row[4])}.0") for row in TRAIN]
    train[2] = ("2021", " 900.0", *train[2][2:])
    labelled = read_competition(fungiclef(tmp_path, train=train))
    assert labelled.classes == ["9", "10", "100"]
    assert len(labelled.in_splits("train")) == 3


def test_classes_are_spelt_as_in_the_sample_submission(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path)
    write_csv(folder / "FungiCLEF25-SAMPLE_SUBMISSION.csv", ("observationId", "predictions"), [("1", "009 010 0100")])
    assert read_competition(folder).classes == ["009", "010", "0100"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_sample_submission_that_is_not_utf_8_is_refused_with_its_name(tmp_path: Path, encoding: str) -> None:
    fungi, folders = fungiclef(tmp_path / "fungi"), tmp_path / "folders"
    class_folders(folders, "train/elm/a.jpg", "train/oak/a.jpg", "test/b.jpg")
    for folder, name in ((fungi, "FungiCLEF25-SAMPLE_SUBMISSION.csv"), (folders, "sample_submission.csv")):
        (folder / name).write_text("observationId,espèce\nb,elm\n", encoding=encoding)
        message = refusal(folder)
        assert message.startswith(f"{folder / name} cannot be read as CSV: ")
        assert message.endswith("; save it as UTF-8")


def test_classes_that_differ_in_leading_zeros_alone_are_refused(tmp_path: Path) -> None:
    val = [(*VAL[0][:4], "0009")]
    assert "'9' and '0009' differ only in leading zeros" in refusal(fungiclef(tmp_path, val=val))


def test_rows_that_lack_an_id_a_label_or_a_photo_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    blank = [("",) * 5, ("2021", "72", "", "0-72.JPG", ""), ("2021", "73", "", "0-73.JPG", "NaN"), ("2021", "74", "x")]
    folder = fungiclef(tmp_path)
    write_csv(folder / "metadata" / DATASET / f"{DATASET}-Train.csv", COLUMNS, [*TRAIN, *blank])
    labelled = read_competition(folder)
    assert set(labelled.class_ids) == {"9", "10", "0100"}
    lines = capsys.readouterr().out
    for count, column in ((1, "observationID"), (1, "filename"), (2, "category_id")):
        assert f"rows of {DATASET}-Train.csv without {column}: {count}" in lines


def test_an_annotation_without_a_class_is_left_out_and_counted(tmp_path: Path, capsys) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    annotations = [{"image_id": number, "category_id": label} for number, label in enumerate((1.0, 2, None))]
    labelled = read_competition(herbarium(tmp_path, images, annotations))
    assert labelled.class_ids.tolist() == ["1", "2"]
    assert "annotations of metadata.json without category_id: 1" in capsys.readouterr().out


def test_an_annotation_of_an_image_without_a_file_is_left_out_and_counted(tmp_path: Path, capsys) -> None:
    names = (None, "", "2.jpg", "3.jpg")
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [{"image_id": number, "category_id": number} for number in range(4)]
    labelled = read_competition(herbarium(tmp_path, images, annotations))
    assert [path.name for path in labelled.photos] == ["2.jpg", "3.jpg"]
    assert "annotations of metadata.json whose image has no file_name: 2" in capsys.readouterr().out


def test_photos_that_are_named_with_backslashes_are_found(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path, train=[(*row[:3], f"more\\{row[3]}", row[4]) for row in TRAIN], val=None)
    photos = folder / "images" / DATASET / "train" / "300p"
    for path in photos.iterdir():
        path.rename(photos / path.name.removeprefix("more\\"))
    (photos / "more").mkdir()
    for path in photos.glob("*.JPG"):
        path.rename(photos / "more" / path.name)
    labelled = read_competition(folder)
    assert all(path.is_file() for path in labelled.photos)
    refuse_missing(labelled)


def test_a_split_with_most_photos_missing_is_refused_and_a_few_missing_are_not(tmp_path: Path) -> None:
    folder = of_sizes(tmp_path, {"a": 4, "b": 4})  # 16 photos
    photos = sorted(path for path in folder.rglob("*.JPG"))
    for number, path in enumerate(photos[:5]):
        labelled = read_competition(folder)
        refuse_missing(labelled)
        path.unlink()
        assert number < 5
    with pytest.raises(InputError, match="5 of 16 photos of train are missing") as error:
        refuse_missing(read_competition(folder))
    assert str(photos[0].parent) in str(error.value)


@pytest.mark.parametrize("column", ["observationID", "filename", "category_id"])
def test_a_missing_column_is_refused_with_the_table_and_the_columns_that_it_has(tmp_path: Path, column: str) -> None:
    folder = fungiclef(tmp_path, columns=tuple(name.replace(column, "other") for name in COLUMNS))
    message = refusal(folder)
    assert f"{DATASET}-Train.csv lacks the column {column!r}" in message
    assert "species" in message


def test_a_row_whose_cells_are_shifted_by_a_comma_is_refused_with_its_observation(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path, train=[*TRAIN, ("2021", "72", "Amanita", " muscaria", "0-72.JPG", "9")])
    assert "observation 72: the row has more cells than columns" in refusal(folder)


def test_photos_of_one_observation_share_one_metadata_and_others_have_their_own(tmp_path: Path) -> None:
    layouts.fungiclef(tmp_path)
    photos = find_competition(tmp_path).competition.read_labelled(find_competition(tmp_path), "300p", Counter())
    for one, other in combinations(photos, 2):
        if one.observation == other.observation:
            assert one.metadata is other.metadata
        assert one.taxa is other.taxa or one.class_id != other.class_id
    assert all(photo.metadata["habitat"] == "garden" for photo in photos)


def test_reading_the_tables_leaves_the_garbage_collector_as_it_was(tmp_path: Path) -> None:
    layouts.fungiclef(tmp_path)
    read_competition(tmp_path)
    assert gc.isenabled()


def test_a_missing_training_table_is_refused_with_its_path(tmp_path: Path) -> None:
    assert f"{DATASET}-Train.csv" in refusal(fungiclef(tmp_path, train=None))


def test_an_observation_of_two_classes_is_refused_with_its_id(tmp_path: Path) -> None:
    folder = fungiclef(tmp_path / "fungi", train=[*TRAIN, ("2021", "900", "Boletus edulis", "2-900.JPG", "9")])
    assert "observation 900 in" in refusal(folder)
    annotations = [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 2}]
    assert "observation 7 in" in refusal(herbarium(tmp_path / "plants", [{"id": 7, "file_name": "7.jpg"}], annotations))


def test_tables_without_a_labelled_photo_are_refused(tmp_path: Path) -> None:
    for folder in (
        fungiclef(tmp_path / "fungi", train=[]),
        herbarium(tmp_path / "plants", [], []),
    ):
        assert "no labelled photo" in refusal(folder)
    assert "no folders of classes" in refusal(class_folders(tmp_path / "folders", "train/notes.txt"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"images": [', "Expecting value"),
        ('{"images": []}', r"annotations is missing in \{'images': \[\]\}"),
        ("[]", "annotations is missing"),
        ('{"images": [{"id": 1}], "annotations": []}', r"file_name is missing in \{'id': 1\}"),
        ('{"images": [{"file_name": "1.jpg"}], "annotations": []}', "id or image_id is missing in"),
        (
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1}]}',
            r"category_id is missing in \{'image_id': 1\}",
        ),
        (
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "category_id": 5},'
            '{"image_id": 1, "category_id": 5}, {"image_id": null, "category_id": 5}]}',
            "annotations of images that it does not list: 2, such as of '2', ''",
        ),
        ('{"images": [3], "annotations": []}', "int"),
        ("[" * 100_000, "recursion"),
    ],
    ids=[
        "cut off",
        "no annotations",
        "a list",
        "an image without a file",
        "an image without an id",
        "a note without a class",
        "an unknown image",
        "no image",
        "too deep",
    ],
)
def test_damaged_herbarium_metadata_is_refused_with_its_path(tmp_path: Path, text: str, reason: str) -> None:
    folder = herbarium(tmp_path, [], [])
    table = folder / "nybg2020" / "train" / "metadata.json"
    table.write_text(text, encoding="utf-8")
    message = refusal(folder)
    assert message.startswith(f"{table} cannot be read as COCO metadata: ")
    assert re.search(reason, message)


def test_a_folder_whose_name_is_no_utf8_is_named_in_one_line(tmp_path):
    photo(tmp_path / "test" / "a.jpg")
    folder = tmp_path / "train" / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir(parents=True)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such name")
    photo(folder / "a.jpg")
    with pytest.raises(InputError, match="is not UTF-8: unzip it as such, or rename it") as error:
        read_competition(tmp_path)
    str(error.value).encode()

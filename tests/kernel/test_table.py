"""Competitions whose photos are listed in tables: what is found in them, and in which form they are answered.

python -m pytest tests/kernel/test_table.py
"""

import csv
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from kernel.competitions import competition_of
from kernel.competitions.competition import AnswerForm
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, read_manifest, to_json, write_manifest
from kernel.observations import find_test_table, read_test, recognise
from kernel.submission import check_submission, fallback_answer, write_submission
from local.data.competition import read_competition
from local.data.folder import COMPETITIONS, find_competition
from local.data.solution import read_solution
from local.rehearsal.staging import stage_competition
from local.rehearsal.variations import keep_observations, repeat_observations
from tests import layouts, manifests
from tests.conftest import photo
from tests.layouts import write_csv

LABELS = ("oak", "elm", "ash")


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def trees(
    folder: Path,
    train: list | None = None,
    sample: list | None = None,
    settings: str = "",
    photos: str = "{}.jpg",
    folders: tuple[str, str] = ("train", "test"),
) -> Path:
    """Photos a0 to a5 of three classes to train on, and b0 to b2 to predict.

    Args:
        train, sample: rows of the tables with their headers.
        settings: the competition.toml.
        photos: names of the files.
    """
    for name, where, count in (("a", folders[0], 6), ("b", folders[1], 3)):
        for number in range(count):
            photo(folder / where / photos.format(f"{name}{number}"), number % 3)
    write_csv(folder / "train.csv", train or [("image", "label"), *((f"a{i}.jpg", LABELS[i % 3]) for i in range(6))])
    write_csv(
        folder / "sample_submission.csv", sample or [("image", "label"), *((f"b{i}.jpg", "oak") for i in range(3))]
    )
    if settings:
        (folder / "competition.toml").write_text(settings, encoding="utf-8")
    return folder


def train_rows(*columns: str, make=lambda number: (LABELS[number % 3],)) -> list:
    """The rows of a training table with columns beside that of the photos."""
    return [("image", *columns), *((f"a{number}.jpg", *make(number)) for number in range(6))]


def sample_rows(*columns: str, answer=("oak",)) -> list:
    """The rows of a sample submission with the same answer in each."""
    return [("image", *columns), *((f"b{number}.jpg", *answer) for number in range(3))]


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as refused:
        find_competition(folder)
    message = str(refused.value)
    assert "\n" not in message
    return message


def said_of(folder: Path) -> str:
    return "\n".join(recognise(folder, COMPETITIONS).competition.notes)


LAYOUTS = {
    "several photos of an observation": {},
    "no test table": {"has_test_table": False, "is_grouped": False},
    "names without suffix": {"names": "{}", "is_grouped": False},
    "names without suffix, no test table": {"names": "{}", "is_grouped": False, "has_test_table": False},
    "nested folders": {"folders": ("data/train_images", "data/test_images")},
    "one folder": {"folders": ("images", "images")},
    "paths in the table": {"names": "photos/{}.jpg", "folders": ("photos", "photos")},
    "numbers": {"labels": ("3", "11", "7")},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("answer", layouts.ANSWERS)
def test_photos_classes_and_the_form_of_the_answer_are_found(tmp_path, answer, layout):
    layout = {"labels": LABELS} | layout
    layouts.table(tmp_path, answer, **layout)
    labelled, table = read_competition(tmp_path), read_test(find_competition(tmp_path))
    assert set(labelled.class_ids) == set(layout["labels"])
    assert len(labelled) == 9
    assert all(path.is_file() for path in labelled.photos)
    assert all(path.is_file() for one in table.observations for path in one.photos)
    header, *rows = rows_of(tmp_path / "sample_submission.csv")
    assert [one.id for one in table.observations] == [row[0] for row in rows]
    assert sum(len(one.photos) for one in table.observations) == (18 if layout.get("is_grouped", True) else 12)
    form = table.competition.form
    assert list(form.header) == header
    assert (form.guesses, bool(form.classes)) == {"class": (1, False), "several": (2, False)}.get(answer, (3, True))


@pytest.mark.parametrize("answer", layouts.ANSWERS)
def test_a_bundle_predicts_other_rows_by_the_settings_that_training_found(tmp_path, answer):
    """Also where the mounted folder has no training table, and a sample submission of the earlier rows."""
    layouts.table(tmp_path / "data", answer, labels=LABELS)
    competition = find_competition(tmp_path / "data").competition
    spec = CompetitionSpec(name="table", resolution="300p", time_limit=60, settings=to_json(competition.settings))
    classes = sorted(LABELS)
    write_manifest(
        manifests.manifest(competition=spec, class_ids=tuple(classes), class_counts=(3, 2, 1)), tmp_path / "m"
    )
    manifest = read_manifest(tmp_path / "m")
    trained = competition_of(manifest.competition)
    assert (trained.form, trained.settings) == (competition.form, competition.settings)
    stage_competition(tmp_path / "data", tmp_path / "hidden")
    sample = (tmp_path / "hidden" / "sample_submission.csv").read_bytes()
    originals = repeat_observations(tmp_path / "hidden", 3, trained)
    (tmp_path / "hidden" / "train.csv").unlink()
    for content in (None, sample):
        if content:
            (tmp_path / "hidden" / "sample_submission.csv").write_bytes(content)
        table = find_test_table(tmp_path / "hidden", "table", "300p", spec.settings)
        assert {one.id for one in table.observations} == set(originals)
        assert sum(len(one.photos) for one in table.observations) == 3 * 18
        assert all(path.is_file() for one in table.observations for path in one.photos)
        write_submission(tmp_path / "s.csv", table, [fallback_answer(table, manifest)] * len(originals), classes)
        assert rows_of(tmp_path / "s.csv")[0] == list(competition.header)


def test_the_rows_are_those_of_the_sample_submission_in_its_order_whatever_the_test_table_has(tmp_path):
    trees(tmp_path)
    write_csv(tmp_path / "test.csv", [("image", "habitat"), ("b0.jpg", "bog"), ("b9.jpg", ""), ("b2.jpg", "fen")])
    write_csv(tmp_path / "sample_submission.csv", [("image", "label"), ("b2", "oak"), ("b1", "oak"), ("b0", "oak")])
    table = read_test(find_competition(tmp_path))
    assert [one.id for one in table.observations] == ["b2", "b1", "b0"]
    assert [[path.name for path in one.photos] for one in table.observations] == [["b2.jpg"], [], ["b0.jpg"]]
    assert table.left_out == {"rows of test.csv that sample_submission.csv lacks": 1}


def test_ids_are_written_as_the_sample_submission_spells_them(tmp_path):
    ids = ["Ä b 0", "007", "x/y"]
    for number, name in enumerate(ids):
        photo(tmp_path / "test" / f"{name}.png", number)
    write_csv(tmp_path / "train.csv", [("image", "label"), *((f"a{i}", LABELS[i % 3]) for i in range(6))])
    for number in range(6):
        photo(tmp_path / "train" / f"a{number}.png", number % 3)
    write_csv(tmp_path / "test.csv", [("file",), ("7.png",), ("x/y.png",), ("Ä b 0.png",)])
    (tmp_path / "test" / "007.png").rename(tmp_path / "test" / "7.png")
    write_csv(tmp_path / "SampleSubmission.csv", [("id", "label"), *((name, "elm") for name in ids)])
    table = read_test(find_competition(tmp_path))
    assert [one.id for one in table.observations] == ids
    assert all(path.is_file() for one in table.observations for path in one.photos)
    write_submission(tmp_path / "submission.csv", table, [{"oak": 1.0}] * 3, LABELS)
    assert rows_of(tmp_path / "submission.csv") == [["id", "label"], *([name, "oak"] for name in ids)]


@pytest.mark.parametrize(
    ("named", "file"),
    [
        ("{}.0", "{}.jpg"),
        ("{}", "{:05}.jpg"),
        ("{:05}.jpg", "{}.jpg"),
        ("{}.jpg", "{}.JPG"),
        ("{}.dcm", "{}.png"),
        ("{}.png", "{}.jpg"),
        ("{}", "{}_rgb.jpg"),
    ],
)
def test_photos_are_found_whose_names_another_program_wrote(tmp_path, named, file):
    """Numbers as floats or without zeros; suffixes of another format, in capitals, or with a word before them."""
    for split, first, count in (("train", 0, 6), ("test", 10, 3)):
        for number in range(first, first + count):
            photo(tmp_path / split / "more" / file.format(number), number % 3)
    write_csv(tmp_path / "train.csv", [("image", "label"), *((named.format(i), LABELS[i % 3]) for i in range(6))])
    sample = [("image", "label"), *((named.format(i), "oak") for i in range(10, 13))]
    write_csv(tmp_path / "sample_submission.csv", sample)
    labelled, table = read_competition(tmp_path), read_test(find_competition(tmp_path))
    assert [path.name for path in labelled.photos] == [file.format(number) for number in range(6)]
    assert [one.id for one in table.observations] == [row[0] for row in sample[1:]]
    assert [one.photos[0].name for one in table.observations] == [file.format(number) for number in range(10, 13)]
    assert "may be" not in said_of(tmp_path)
    assert all(path.is_file() for one in table.observations for path in one.photos)


def test_files_that_are_no_photos_are_passed_over(tmp_path):
    rows = [("id", "label"), *((f"a{i}", LABELS[i % 3]) for i in range(6))]
    for name, photos in (("both", "jpeg/{}.jpg"), ("one", "../others/{}.jpg")):
        trees(tmp_path / name, rows, photos=photos)
        for number in range(6):
            (tmp_path / name / "train" / f"a{number}.dcm").touch()
    assert all(path.suffix == ".jpg" and path.is_file() for path in read_competition(tmp_path / "both").photos)
    shutil.rmtree(tmp_path / "one" / "others")
    assert "no column of" in (message := refusal(tmp_path / "one"))
    assert message.endswith("; .dcm files cannot be read: convert them to .png")


@pytest.mark.parametrize("folder", ["train", "photos"])
def test_too_few_photos_of_a_table_are_counted(tmp_path, folder):
    """The folder of photos is not taken for one of a class, nor the sample submission for one of class folders."""
    rows = [("image", "label"), *((f"a{number}", LABELS[number % 3]) for number in range(20))]
    trees(tmp_path, rows, folders=(folder, folder))
    assert f"only 6 of the 20 photos that 'image' of {tmp_path / 'train.csv'} names are in" in refusal(tmp_path)


def test_a_table_of_any_name_may_have_the_classes(tmp_path):
    trees(tmp_path, train_rows("subject", "label", make=lambda number: (f"p{number % 2}", LABELS[number % 3])))
    (tmp_path / "train.csv").rename(tmp_path / "drivers.csv")
    write_csv(tmp_path / "colours.csv", [("name", "colour"), ("oak", "green"), ("elm", "red")])
    assert set(read_competition(tmp_path).class_ids) == set(LABELS)


def test_one_table_may_list_training_and_test_photos(tmp_path):
    trees(tmp_path, folders=("images/known", "images/new"))
    known = [(number, f"images/known/a{number}.jpg", LABELS[number % 3], "known") for number in range(6)]
    unlabelled = [(6 + number, f"images/new/b{number}.jpg", "", "new") for number in range(3)]
    write_csv(tmp_path / "metadata.csv", [("image_id", "path", "identity", "split"), *known, *unlabelled])
    (tmp_path / "train.csv").unlink()
    write_csv(tmp_path / "sample_submission.csv", [("image_id", "identity"), *((row[0], "new") for row in unlabelled)])
    labelled, found = read_competition(tmp_path), find_competition(tmp_path)
    assert [path.name for path in labelled.photos] == [f"a{number}.jpg" for number in range(6)]
    assert "answers with 'new', which is no class in metadata.csv: it is never predicted" in said_of(tmp_path)
    stage_competition(tmp_path, tmp_path / "staged")
    assert "identity" not in rows_of(tmp_path / "staged" / "metadata.csv")[0]
    table = find_test_table(tmp_path / "staged", "table", settings=found.competition.settings)
    assert {one.id: one.photos[0].name for one in table.observations} == {"6": "b0.jpg", "7": "b1.jpg", "8": "b2.jpg"}
    assert all(path.is_file() for one in table.observations for path in one.photos)


def test_tables_of_labelled_photos_that_are_not_read_are_said(tmp_path):
    trees(tmp_path)
    write_csv(tmp_path / "val_labels.csv", [("image", "label"), ("a0.jpg", "oak")])
    assert "val_labels.csv has 'image' and 'label' too, but is not read: to train on its rows" in said_of(tmp_path)


def test_photos_in_two_columns_are_said(tmp_path):
    trees(
        tmp_path,
        [("left", "right", "label"), *((f"a{2 * i}.jpg", f"a{2 * i + 1}.jpg", LABELS[i % 2]) for i in range(3))],
    )
    assert "the column of photos in train.csv is taken to be 'left', but may be 'right'" in said_of(tmp_path)


def test_several_photos_of_one_name_are_said_with_the_key_that_decides(tmp_path):
    trees(tmp_path, [("id", "label"), *((f"a{i}", LABELS[i % 3]) for i in range(6))], photos="{}_red.png")
    for path in sorted(tmp_path.rglob("*_red.png")):
        shutil.copy(path, path.with_name(path.name.replace("red", "blue")))
    write_csv(tmp_path / "sample_submission.csv", [("id", "label"), *((f"b{i}", "oak") for i in range(3))])
    assert "is taken to be '_blue.png', but may be '_red.png': to decide, write suffixes into" in said_of(tmp_path)
    (tmp_path / "competition.toml").write_text('suffixes = ["_red.png"]')
    assert "may be" not in said_of(tmp_path)
    assert [path.name for path in read_competition(tmp_path).photos] == [f"a{number}_red.png" for number in range(6)]


@pytest.mark.parametrize("missing", ["train", "test"])
def test_photos_of_the_other_split_are_not_read_where_one_is_missing(tmp_path, missing):
    """Where both are called 0.jpg, 1.jpg and so on."""
    for split, count in (("train", 6), ("test", 3)):
        for number in range(count):
            photo(tmp_path / split / f"{number}.jpg", number % 3)
    write_csv(tmp_path / "train.csv", [("id", "label"), *((i, LABELS[i % 3]) for i in range(6))])
    write_csv(tmp_path / "sample_submission.csv", [("id", "label"), *((i, "oak") for i in range(3))])
    shutil.rmtree(tmp_path / missing)
    assert f"'{'test' if missing == 'train' else 'train'}/0.jpg' in" in (message := refusal(tmp_path))
    assert "would be both a training and a test photo: unpack the photos of both" in message


def test_of_two_folders_with_the_names_of_the_test_photos_the_other_one_has_those_of_train(tmp_path):
    trees(tmp_path, sample=[("image", "label"), *((f"a{i}.jpg", "oak") for i in range(3))], folders=("known", "a"))
    for number in range(3):
        (tmp_path / "a" / f"b{number}.jpg").rename(tmp_path / "a" / f"a{number}.jpg")
    settings = find_competition(tmp_path).competition.settings
    assert (settings.train_folder, settings.test_folder) == ("known", "a")
    (tmp_path / "a").rename(tmp_path / "new")
    settings = find_competition(tmp_path.rename(tmp_path.with_name("other names"))).competition.settings
    assert (settings.train_folder, settings.test_folder) == ("known", "new")


def test_a_column_that_the_test_table_lacks_has_the_classes(tmp_path):
    trees(
        tmp_path, train_rows("sex", "grade", make=lambda i: ("fm"[i % 2], i % 3)), sample_rows("answer", answer=("0",))
    )
    write_csv(tmp_path / "test.csv", [("image", "sex"), *((f"b{i}.jpg", "f") for i in range(3))])
    assert read_competition(tmp_path).classes == ["0", "1", "2"]


def test_a_number_that_is_no_class_may_be_an_id_too(tmp_path):
    trees(
        tmp_path,
        train_rows("label", make=lambda number: (1 + number % 3,)),
        [("id", "label"), *((i, 0) for i in range(3))],
    )
    for number in range(3):
        (tmp_path / "test" / f"b{number}.jpg").rename(tmp_path / "test" / f"{number}.jpg")
    assert read_competition(tmp_path).classes == ["1", "2", "3"]


def test_tabs_may_separate_cells(tmp_path):
    trees(tmp_path)
    for name in ("train.csv", "sample_submission.csv"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(",", "\t"))
    assert set(read_competition(tmp_path).class_ids) == set(LABELS)


@pytest.mark.parametrize(
    ("rows", "left_out"), [([], ""), ([("", "1")], r" \(left out: rows of test.csv without image: 1\)")]
)
def test_a_test_table_without_rows_is_refused_by_its_name_in_a_kernel_too(tmp_path, rows, left_out):
    trees(tmp_path)
    write_csv(tmp_path / "test.csv", [("image", "x"), *((f"b{number}.jpg", number) for number in range(3))])
    settings = find_competition(tmp_path).competition.settings
    write_csv(tmp_path / "test.csv", [("image", "x"), *rows])
    with pytest.raises(InputError, match=rf"test\.csv has no test observation{left_out}: download it again"):
        find_test_table(tmp_path, "table", settings=settings)


@pytest.mark.parametrize("table", ["train.csv", "test.csv", "sample_submission.csv", "solution.csv"])
def test_a_comment_in_a_table_is_refused_with_its_line_and_no_photo_is_read(tmp_path, table):
    solution = layouts.table(tmp_path, labels=LABELS)
    (tmp_path / table).write_text("# made by me, 2024\n" + (tmp_path / table).read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=rf"{table}, line 1 begins with '#': remove"):
        read_solution(solution) if table == solution.name else find_competition(tmp_path)


@pytest.mark.parametrize(
    ("table", "becomes", "complaint"),
    [
        ("sample_submission.csv", "kept", "no sample submission: name it in competition.toml as sample, or write one"),
        (
            "sample_submission.csv",
            "sample_submission.csv.zip",
            "no sample submission: unpack sample_submission.csv.zip",
        ),
        ("train.csv", "kept", "no training table: name it in competition.toml as train_table, write a train.csv"),
        ("train.csv", "train.json", r"arrange the photos as train/CLASS/photo \(train.json is not read\)"),
        ("train.csv", "train/train.csv", "no training table: write its path, such as train_table = 'train/train.csv'"),
    ],
)
def test_a_missing_table_is_named_with_what_to_do(tmp_path, table, becomes, complaint):
    trees(tmp_path)
    (tmp_path / table).rename(tmp_path / becomes)
    with pytest.raises(InputError, match=complaint):
        find_competition(tmp_path)


def test_tables_may_be_in_folders_that_competition_toml_names(tmp_path):
    trees(tmp_path, settings='train_table = "train/train.csv"')
    (tmp_path / "train.csv").rename(tmp_path / "train" / "train.csv")
    assert set(read_competition(tmp_path).class_ids) == set(LABELS)


def test_photos_of_several_suffixes_that_the_tables_leave_out_are_found(tmp_path):
    trees(tmp_path, [("image", "label"), *((f"a{i}", LABELS[i % 3]) for i in range(6))], sample_rows("label"))
    (tmp_path / "train" / "a1.jpg").rename(tmp_path / "train" / "a1.png")
    assert all(path.is_file() for path in read_competition(tmp_path).photos)


def test_the_classes_are_in_the_column_that_the_sample_submission_answers_with(tmp_path):
    train = train_rows("genus", "kind", "fold", make=lambda number: ("xy"[number % 2], LABELS[number % 3], number % 2))
    trees(tmp_path, train, sample_rows("answer", answer=("elm",)))
    assert set(read_competition(tmp_path).class_ids) == set(LABELS)


def test_a_number_everywhere_in_the_sample_submission_says_nothing_of_the_classes(tmp_path):
    train = train_rows("fold", "species", make=lambda number: (number % 2, LABELS[number % 3]))
    trees(tmp_path, train, sample_rows("answer", answer=("0",)))
    assert set(read_competition(tmp_path).class_ids) == set(LABELS)


def test_undecided_columns_of_classes_are_named_with_the_key_that_decides(tmp_path):
    train = train_rows("kind", "family", make=lambda number: (LABELS[number % 3], "xy"[number % 2]))
    trees(tmp_path, train, sample_rows("answer", answer=("0",)))
    message = refusal(tmp_path)
    assert "'kind' or 'family': write label_column into" in message
    (tmp_path / "competition.toml").write_text('label_column = "family"\nmetric = "macro_f1"\ntime_limit = 3600')
    labelled = read_competition(tmp_path)
    assert set(labelled.class_ids) == {"x", "y"}
    assert (labelled.competition.metric, labelled.competition.time_limit) == ("macro_f1", 3600)


def test_a_guess_among_equals_is_said_with_the_key_that_decides(tmp_path):
    trees(tmp_path)
    shutil.copytree(tmp_path / "train", tmp_path / "train_small")
    assert "'train', but may be 'train_small': to decide, write train_folder into" in said_of(tmp_path)
    (tmp_path / "competition.toml").write_text('train_folder = "train_small"')
    assert "may be" not in said_of(tmp_path)
    assert {path.parent.name for path in read_competition(tmp_path).photos} == {"train_small"}


def test_photos_that_only_kaggle_has_are_expected_beside_those_of_train(tmp_path):
    trees(tmp_path, folders=("train_images", "gone"))
    shutil.rmtree(tmp_path / "gone")
    assert "none of the test photos is there, so they are expected in test_images/" in said_of(tmp_path)
    assert read_test(find_competition(tmp_path)).observations[0].photos == (tmp_path / "test_images" / "b0.jpg",)


HOT = train_rows(*LABELS, make=lambda number: [int(number % 3 == index) for index in range(3)])
THIRDS = sample_rows(*LABELS, answer=("0.3", "0.3", "0.4"))
SEVERAL = {
    "boxes": (train_rows("label", "xmin", "ymin", make=lambda number: ("oak", 1, 2)), None, "boxes or masks"),
    "a box": (train_rows("label", "bbox", make=lambda number: (LABELS[number % 3], "[0, 1]")), None, "boxes or masks"),
    "rows of one photo": ([("image", "label"), ("a0.jpg", "oak"), ("a0.jpg", "elm")], None, "several rows of photo"),
    "spaces": (train_rows("label", make=lambda number: (("oak", "elm", "oak elm")[number % 3],)), None, "'oak elm'"),
    "commas": (
        train_rows("label", make=lambda number: (("oak,elm", "oak", "elm,ash")[number % 3],)),
        None,
        "multi-label",
    ),
    "bars": (train_rows("label", make=lambda number: (("oak|elm", "ash|oak")[number % 2],)), None, "multi-label"),
    "several ones": ([*HOT[:-1], ("a5.jpg", 1, 1, 0)], THIRDS, "photo a5.jpg has 2 classes"),
    "an answer for each part": (
        None,
        [("image", "label"), ("b0.jpg", "oak"), ("b0.jpg", "elm")],
        "'b0.jpg' more than once",
    ),
    "other columns": (None, sample_rows("label", "part", answer=("oak", "leaf")), "cells such as 'oak'"),
    "commas in an answer": (None, sample_rows("label", answer=("oak,elm",)), "separated by ','"),
    "no class in common": (None, sample_rows("A", "B", answer=("0.5", "0.5")), "none is both"),
    "no photo": ([("image", "label"), ("c0.jpg", "oak"), ("c1.jpg", "elm")], None, "no column of .* names photos"),
    "no class twice": (
        train_rows("title", make=lambda number: (f"no. {number}",)),
        None,
        "another 'title' in each row",
    ),
    "masks": (train_rows("label", "Encoding", make=lambda number: ("oak", "1 5 9 2")), None, "boxes or masks"),
    "numbers": (
        train_rows("score", make=lambda number: (7 + number % 3,)),
        sample_rows("score", answer=("8.25",)),
        "answers with numbers, such as '8.25'",
    ),
    "a confidence": (None, sample_rows("label", answer=("oak 0.1",)), "a class and a number, such as 'oak 0.1'"),
    "photos of the same class": (None, sample_rows("label", answer=("b0.jpg b2.jpg",)), "with its own ids, such as"),
    "words of several classes": (
        train_rows("label", make=lambda number: (("old oak", "young elm", "old elm")[number % 3],)),
        sample_rows("label", answer=("old young oak",)),
        "words of several classes, such as 'old young oak'",
    ),
    "words for numbers": (
        train_rows("label", make=lambda number: (number % 3,)),
        sample_rows("name", answer=("oak",)),
        "words such as 'oak', but 'label' of train.csv has numbers",
    ),
    "no id of a test photo": (
        None,
        [("row", "label"), *((f"{number}", "oak") for number in range(3))],
        "ids such as '0' in 'row', but .* photos such as 'test/b0.jpg'",
    ),
}


@pytest.mark.parametrize(("train", "sample", "complaint"), SEVERAL.values(), ids=SEVERAL.keys())
def test_what_is_no_classification_of_photos_is_refused_in_one_line(tmp_path, train, sample, complaint):
    trees(tmp_path, train, sample)
    with pytest.raises(InputError, match=complaint):
        find_competition(tmp_path)


@pytest.mark.parametrize(
    "names", [("red oak", "red elm", "ash"), ("oak, red", "elm, red", "ash"), ("1.10", "2", "a|b")]
)
def test_the_name_of_one_class_is_not_taken_for_several(tmp_path, names):
    trees(
        tmp_path, train_rows("label", make=lambda number: (names[number % 3],)), sample_rows("label", answer=names[:1])
    )
    assert set(read_competition(tmp_path).class_ids) == set(names)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("labels = 'x'", "unknown key 'labels': expected sample, train_table, "),
        ("guesses = '5'", "expected an int for guesses, got '5'"),
        ("guesses = 0", "positive number for guesses"),
        ("guesses = ", "cannot be read as TOML"),
        ("metric = 'f1'", "one of recall_at_1, .* for metric, got 'f1'"),
        ("label_column = 'x'", "train.csv lacks the column 'x', which competition.toml gives as label_column"),
        (
            "metadata_columns = ['x']",
            "train.csv lacks the column 'x', which .* in metadata_columns: it has image, label",
        ),
        ("train_folder = 'nowhere'", "train_folder names 'nowhere'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        find_competition(trees(tmp_path, settings=settings))


def test_metadata_that_the_test_table_lacks_is_refused(tmp_path):
    layouts.table(tmp_path)
    (tmp_path / "competition.toml").write_text("metadata_columns = ['habitat', 'fold']")
    said = "test.csv lacks the column 'fold', which competition.toml gives in metadata_columns: it has image, specimen"
    assert said in refusal(tmp_path)
    (tmp_path / "competition.toml").write_text("metadata_columns = ['habitat']")
    assert find_competition(tmp_path).competition.metadata == ("habitat",)


def test_copies_and_earlier_submissions_beside_the_tables_are_passed_over_in_silence(tmp_path):
    trees(tmp_path)
    before = said_of(tmp_path)
    for name, copy in (
        ("sample_submission.csv", "sample_submission (1).csv"),
        ("sample_submission.csv", "submission.csv"),
        ("train.csv", "train (1).csv"),
    ):
        shutil.copy(tmp_path / name, tmp_path / copy)
    found = find_competition(tmp_path).competition
    assert (found.settings.sample, found.settings.train_table) == ("sample_submission.csv", "train.csv")
    assert said_of(tmp_path) == before
    assert recognise(tmp_path).competition.settings.sample == "sample_submission.csv"  # by the kernel alone


def test_a_second_sample_submission_of_other_ids_is_named_and_the_plain_name_is_taken(tmp_path):
    trees(tmp_path)
    write_csv(tmp_path / "sample_submission (1).csv", [("image", "label"), ("b7.jpg", "oak")])
    assert find_competition(tmp_path).competition.settings.sample == "sample_submission.csv"
    said = "is taken to be 'sample_submission.csv', but may be 'sample_submission (1).csv': to decide, write sample"
    assert said in said_of(tmp_path)


def test_settings_with_a_byte_order_mark_are_read(tmp_path):
    trees(tmp_path)
    (tmp_path / "competition.toml").write_text('metric = "macro_f1"\n', encoding="utf-8-sig")  # as Notepad saves it
    assert find_competition(tmp_path).competition.metric == "macro_f1"


def test_settings_without_a_sample_submission_say_what_is_missing(tmp_path):
    (tmp_path / "competition.toml").write_text("guesses = 1")
    assert "no sample submission: name it in competition.toml as sample" in refusal(tmp_path)


def test_stray_tables_do_not_make_a_table_competition_of_class_folders(tmp_path):
    layouts.class_folders(tmp_path)
    write_csv(tmp_path / "sample_submission.csv", [("image_name", "pred_label"), ("apple 0", "apple")])
    write_csv(tmp_path / "labels.csv", [("id", "name"), ("0", "apple"), ("1", "carrot")])
    assert find_competition(tmp_path).competition.name == "class-folders"
    assert len(find_test_table(tmp_path, "class-folders").observations) == 12


@pytest.mark.parametrize("name", [one.name for one in COMPETITIONS if not one.generality])
def test_a_competition_with_files_of_its_own_comes_before_tables(tmp_path, name):
    layouts.SMALLEST[name](tmp_path)
    trees(tmp_path, folders=("more/train", "more/test"))
    assert find_competition(tmp_path).competition.name == name


# Probabilities


FORM = AnswerForm(("id", "oak", "yew", "elm"), 3, ("oak", "yew", "elm"))


def test_probabilities_are_written_in_the_columns_of_the_sample_and_sum_to_one():
    """The sample has a class that was never trained, and lacks one that was."""
    cells = FORM.write({"elm": 0.6, "ash": 0.2, "oak": 0.2})
    assert cells == ["0.25", "0", "0.75"]
    assert FORM.find_defect(cells, ()) == ""
    assert FORM.read(cells) == {"elm": 0.75, "oak": 0.25, "yew": 0.0}
    assert list(FORM.read(cells)) == ["elm", "oak", "yew"]
    assert FORM.write({"ash": 1.0}) == ["0.333333"] * 3


@pytest.mark.parametrize(
    ("cells", "defect"),
    [
        (("0.5", "0.5", "0.5"), "sum to 1.5, not to 1"),
        (("1.5", "-0.5", "0"), "from 0 to 1"),
        (("nan", "0.5", "0.5"), "from 0 to 1"),
        (("oak", "0.5", "0.5"), "could not convert"),
        (("", "0.5", "0.5"), "could not convert"),
    ],
)
def test_what_is_no_probability_is_named(cells, defect):
    assert defect in FORM.find_defect(cells, ())


def test_a_single_column_has_the_probability_of_one_class_of_two(tmp_path):
    train = train_rows("has_oak", make=lambda number: (number % 2,))
    form = read_competition(trees(tmp_path, train, sample_rows("has_oak", answer=("0.5",)))).competition.form
    assert form == AnswerForm(("image", "has_oak"), 2, ("1", "0"))
    assert form.write({"0": 0.9, "1": 0.1}) == ["0.1"]
    assert form.read(["0.25"]) == {"0": 0.75, "1": 0.25}


def test_a_single_column_of_numbers_may_be_a_class_or_a_probability(tmp_path):
    train = train_rows("has_oak", make=lambda number: (number % 2,))
    trees(tmp_path, train, sample_rows("has_oak", answer=("0",)))
    assert """if it has the probability of '1', write classes = ["1", "0"] into""" in said_of(tmp_path)
    assert find_competition(tmp_path).competition.form == AnswerForm(("image", "has_oak"), 1)
    (tmp_path / "competition.toml").write_text('classes = ["1", "0"]')
    assert find_competition(tmp_path).competition.form == AnswerForm(("image", "has_oak"), 2, ("1", "0"))
    assert "if it has" not in said_of(tmp_path)
    (tmp_path / "competition.toml").write_text('classes = ["1"]')
    assert "has 1 classes for 1 columns" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [
        (
            ["yes", "noo"],
            "competition.toml has 'noo' in classes, but 'has_oak' of .*train.csv has 'no', 'yes'",
        ),
        (["1", "0"], "competition.toml has '1' in classes, but 'has_oak' of .*train.csv has 'no', 'yes'"),
        (["yes", "yes"], "competition.toml repeats 'yes' in classes: write each class once"),
    ],
)
def test_classes_that_are_no_labels_and_repeated_ones_are_refused(tmp_path, classes, complaint):
    train = train_rows("has_oak", make=lambda number: (("yes", "no")[number % 2],))
    trees(tmp_path, train, sample_rows("has_oak", answer=("0.5",)), f"classes = {classes}")
    assert re.search(complaint, refusal(tmp_path))


def test_given_classes_may_be_in_another_unicode_form_than_the_labels(tmp_path):
    train = train_rows("has_oak", make=lambda number: (("ja", unicodedata.normalize("NFC", "nö"))[number % 2],))
    settings = f"classes = ['ja', '{unicodedata.normalize('NFD', 'nö')}']"
    trees(tmp_path, train, sample_rows("has_oak", answer=("0.5",)), settings)
    assert set(find_competition(tmp_path).competition.form.classes) == set(read_competition(tmp_path).class_ids)


def test_repeated_classes_of_several_columns_are_refused(tmp_path):
    sample = sample_rows("p_oak", "p_elm", "p_ash", answer=("0.3", "0.3", "0.4"))
    trees(tmp_path, sample=sample, settings="classes = ['oak', 'oak', 'ash']")
    assert "repeats 'oak' in classes" in refusal(tmp_path)


def test_classes_that_only_one_side_has_are_said(tmp_path):
    trees(tmp_path, sample=sample_rows("p_oak", "p_elm", "p_yew", answer=("0.3", "0.3", "0.4")))
    said = said_of(tmp_path)
    assert "lacks 1 of the 3 classes of train.csv, such as 'ash': their probability is left out" in said
    assert "lacks 1 of the 3 classes of sample_submission.csv, such as 'yew': their probability is 0" in said
    assert find_competition(tmp_path).competition.form.classes == ("oak", "elm", "yew")


@pytest.mark.parametrize("null", ["None", "NA", "null", "nan", "N/A"])
@pytest.mark.parametrize("answer", layouts.ANSWERS)
def test_a_class_that_is_named_like_a_missing_value_is_one_where_the_sample_submission_has_it(
    tmp_path, answer, null, capsys
):
    layouts.table(tmp_path, answer, labels=(null, "elm", "ash"))
    table = tmp_path / "train.csv"
    rows = rows_of(table)
    rows[2][2], rows[3][2] = "", "NaN"  # these are missing all the same
    write_csv(table, rows)
    labelled = read_competition(tmp_path)
    assert labelled.classes == sorted((null, "elm", "ash"))
    assert Counter(labelled.class_ids) == {null: 3, "elm": 2, "ash": 2}
    said = capsys.readouterr().out
    assert f"train.csv: {null!r} in 'label' is taken to be a class" in said
    assert "rows of train.csv without label: 2" in said
    assert "never predicted" not in said
    assert "their probability is" not in said


def test_a_class_of_competition_toml_may_be_named_like_a_missing_value(tmp_path):
    train = train_rows("label", make=lambda number: (("elm", "None")[number % 2],))
    trees(tmp_path, train, sample_rows("probability", answer=(0.5,)), 'classes = ["None", "elm"]')
    assert read_competition(tmp_path).classes == ["None", "elm"]


def test_what_the_sample_submission_has_not_as_a_class_is_a_missing_label(tmp_path, capsys):
    names = ("oak", "elm", "None")
    trees(tmp_path, train_rows("label", make=lambda number: (names[number % 3],)), sample_rows("label"))
    assert read_competition(tmp_path).classes == ["elm", "oak"]
    assert "rows of train.csv without label: 2" in capsys.readouterr().out


@pytest.mark.parametrize("folders", [("train", "test"), ("images", "images")])
def test_rows_of_test_photos_in_the_training_table_have_no_class_whatever_the_sample_answers(tmp_path, folders):
    train = [*train_rows("label"), *((f"b{number}.jpg", "NA") for number in range(3))]
    trees(tmp_path, train, sample_rows("label", answer=("NA",)), folders=folders)
    assert read_competition(tmp_path).classes == sorted(LABELS)


def test_a_column_for_each_class_in_the_training_table_gives_the_classes(tmp_path):
    labelled = read_competition(trees(tmp_path, HOT, THIRDS))
    assert [(path.name, name) for path, name in zip(labelled.photos, labelled.class_ids, strict=True)] == [
        (f"a{number}.jpg", LABELS[number % 3]) for number in range(6)
    ]


def test_the_fallback_has_the_frequency_of_each_class(tmp_path):
    layouts.table(tmp_path, "probabilities", labels=LABELS)
    table = read_test(find_competition(tmp_path))
    manifest = manifests.manifest(class_ids=("ash", "elm", "oak"), class_counts=(1, 2, 5))
    write_submission(tmp_path / "s.csv", table, [fallback_answer(table, manifest)] * 12, manifest.class_ids)
    assert rows_of(tmp_path / "s.csv")[1][1:] == ["0.625", "0.25", "0.125"]  # oak, elm, ash, as in the sample
    assert list(fallback_answer(table).values()) == [0.333] * 3  # without weights, the sample's


def test_a_submission_of_probabilities_is_checked_row_by_row(tmp_path):
    layouts.table(tmp_path, "probabilities", labels=LABELS)
    table = read_test(find_competition(tmp_path))
    path = tmp_path / "s.csv"
    write_submission(path, table, [{"oak": 1.0}] * 12)
    good = path.read_text(encoding="utf-8")
    check_submission(path, table, LABELS)
    lines = good.splitlines()
    for content, complaint in (
        (good.replace(",1,0,0", ",1,0", 1), "not a CSV of 4 columns"),
        (good.replace(",1,0,0", ",1,1,0", 1), "observation ö 12: the probabilities sum to 2"),
        (good.replace("oak", "elm", 1), "header"),
        ("\n".join([lines[0], *lines[:0:-1]]), "in order"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=complaint):
            check_submission(path, table, LABELS)


# Solutions and metadata


def test_a_solution_may_have_its_own_names_in_any_order(tmp_path):
    solution = layouts.table(tmp_path, labels=("3", "11", "7"))
    table = read_test(find_competition(tmp_path))
    ids = [one.id for one in table.observations]
    assert rows_of(solution)[0] == ["Usage", "label", "specimen"]
    truth = read_solution(solution, ids, ("3", "7", "11"))
    assert set(truth) == set(ids)
    assert set(truth.values()) == {"3", "7", "11"}


def test_metadata_that_both_tables_have_describe_observations(tmp_path):
    layouts.table(tmp_path, labels=LABELS)
    labelled, table = read_competition(tmp_path), read_test(find_competition(tmp_path))
    assert labelled.competition.metadata == ("habitat",)  # the test table has no fold
    assert {one.metadata["habitat"] for one in (*labelled.observations, *table.observations)} == {"soil", "wood"}


def test_a_staged_test_set_without_training_photos_is_reduced_by_the_settings_of_the_bundle(tmp_path):
    layouts.table(tmp_path / "data", labels=LABELS)
    competition = find_competition(tmp_path / "data").competition
    stage_competition(tmp_path / "data", tmp_path / "staged")
    assert not (tmp_path / "staged" / "train").exists()
    assert not (tmp_path / "staged" / "solution.csv").exists()
    table = find_test_table(tmp_path / "staged", "table", settings=competition.settings)
    assert all(path.is_file() for one in table.observations for path in one.photos)
    ids = [one.id for one in table.observations]
    keep_observations(tmp_path / "staged", ids[3:5], competition)
    assert [row[0] for row in rows_of(tmp_path / "staged" / "sample_submission.csv")[1:]] == ids[3:5]
    assert {row[1] for row in rows_of(tmp_path / "staged" / "test.csv")[1:]} == set(ids[3:5])


def test_without_weights_the_kernel_answers_as_the_sample_submission_does(tmp_path):
    """It does not find the photos then, and needs none."""
    for answer in layouts.ANSWERS:
        layouts.table(tmp_path / answer, answer, labels=LABELS)
        table = find_test_table(tmp_path / answer)
        write_submission(tmp_path / "s.csv", table, [fallback_answer(table)] * len(table.observations))
        written, sample = rows_of(tmp_path / "s.csv"), rows_of(tmp_path / answer / "sample_submission.csv")
        assert [row[0] for row in written] == [row[0] for row in sample]
        if answer != "probabilities":
            assert written == sample


def test_the_labels_of_a_test_table_are_not_mounted(tmp_path):
    trees(tmp_path / "data")
    write_csv(tmp_path / "data" / "test.csv", [("image", "label"), *((f"b{i}.jpg", LABELS[i]) for i in range(3))])
    stage_competition(tmp_path / "data", tmp_path / "staged")
    assert rows_of(tmp_path / "staged" / "test.csv")[0] == ["image"]
    trees(tmp_path / "hot", HOT, THIRDS)
    write_csv(tmp_path / "hot" / "test.csv", [("image", *LABELS), *((f"b{i}.jpg", 1, 0, 0) for i in range(3))])
    stage_competition(tmp_path / "hot", tmp_path / "staged hot")
    assert rows_of(tmp_path / "staged hot" / "test.csv")[0] == ["image"]


def test_photos_in_folders_of_classes_are_found_by_the_names_in_the_table(tmp_path):
    trees(tmp_path, [("image", "label"), *((f"a{number}", LABELS[number % 3]) for number in range(6))])
    for number in range(6):
        target = tmp_path / "train" / LABELS[number % 3] / f"a{number}.jpg"
        target.parent.mkdir(exist_ok=True)
        (tmp_path / "train" / f"a{number}.jpg").rename(target)
    labelled = read_competition(tmp_path)
    assert labelled.competition.name == "table"
    assert [path.relative_to(tmp_path).as_posix() for path in labelled.photos] == [
        f"train/{LABELS[number % 3]}/a{number}.jpg" for number in range(6)
    ]
    assert all(one.photos[0].is_file() for one in read_test(find_competition(tmp_path)).observations)


@pytest.mark.parametrize("spelt", [("NFC", "NFD"), ("NFD", "NFC")], ids="-".join)
@pytest.mark.parametrize("answer", layouts.ANSWERS)
@pytest.mark.parametrize("is_nested", [False, True])
def test_photos_ids_and_classes_are_found_in_another_unicode_form(tmp_path, answer, spelt, is_nested):
    on_disk, in_tables = spelt
    labels = [unicodedata.normalize(in_tables, name) for name in ("Rüster", "Ahorn", "Föhre")]
    solution = layouts.table(tmp_path, answer, labels=labels, folders=("trainü", "testü"))
    for path in sorted(tmp_path.rglob("*.jpg")):  # with "ö" in the name of each photo, and perhaps in a folder's
        name, folder = f"ö {path.name}", path.parent / ("Ä" if is_nested else "")
        (target := folder / unicodedata.normalize(on_disk, name)).parent.mkdir(exist_ok=True)
        path.rename(target)
    for split in ("train", "test"):
        (tmp_path / f"{split}ü").rename(tmp_path / unicodedata.normalize(on_disk, f"{split}ü"))
        table = tmp_path / f"{split}.csv"
        text = table.read_text(encoding="utf-8").replace("img", unicodedata.normalize(in_tables, "ö img"))
        table.write_text(text, encoding="utf-8")
    sample = tmp_path / "sample_submission.csv"
    other = unicodedata.normalize(on_disk, sample.read_text(encoding="utf-8"))
    sample.write_text(other, encoding="utf-8")
    labelled, test = read_competition(tmp_path), read_test(find_competition(tmp_path))
    assert len(labelled) == 9
    assert all(path.is_file() for path in labelled.photos)
    assert [one.id for one in test.observations] == [row[0] for row in rows_of(sample)[1:]]
    assert all(path.is_file() for one in test.observations for path in one.photos)
    said = test.competition.sample_classes(tmp_path)
    assert set(said) <= set(labelled.classes)
    truth = read_solution(solution, [one.id for one in test.observations], labelled.classes)
    assert set(truth) == {one.id for one in test.observations}
    assert set(truth.values()) == set(labelled.classes)


def test_a_folder_in_competition_toml_may_be_in_the_other_unicode_form(tmp_path):
    trees(
        tmp_path,
        settings='train_folder = "tr\u00e4in"\ntest_folder = "t\u00e4st"',
        folders=("tra\u0308in", "ta\u0308st"),
    )
    labelled, table = read_competition(tmp_path), read_test(find_competition(tmp_path))
    assert all(path.is_file() for path in labelled.photos)
    assert all(path.is_file() for one in table.observations for path in one.photos)


def test_the_settings_of_one_machine_find_a_folder_in_the_other_unicode_form_on_kaggle(tmp_path):
    trees(tmp_path / "here", folders=("train", "té".replace("é", "e\u0301")))
    settings = find_competition(tmp_path / "here").competition.settings
    trees(tmp_path / "there", folders=("train", "t\u00e9"))
    table = find_test_table(tmp_path / "there", "table", settings=settings)
    assert all(path.is_file() for one in table.observations for path in one.photos)


@pytest.mark.parametrize("has_test_table", [False, True])
@pytest.mark.parametrize("has_folders", [(False, True), (True, False), (True, True)], ids=str)
def test_a_folder_that_is_named_like_an_observation_has_its_photos(tmp_path, has_folders, has_test_table):
    """In the training set, in the test set, or in both; elsewhere a name is that of a photo without its suffix."""
    for split, count, folders in (("train", 6, has_folders[0]), ("test", 4, has_folders[1])):
        for number in range(count):
            for index in range(2 if folders else 1):
                name = f"o\u0308{number}/{index}.jpg" if folders else f"o\u0308{number}.jpg"
                photo(tmp_path / split / name, number % 3)
    write_csv(tmp_path / "train.csv", [("id", "label"), *((f"ö{i}", LABELS[i % 3]) for i in range(6))])
    write_csv(tmp_path / "sample_submission.csv", [("id", "label"), *((f"ö{i}", "oak") for i in range(4))])
    if has_test_table:
        write_csv(tmp_path / "test.csv", [("id", "when"), *((f"ö{i}", f"{i % 2}") for i in range(4))])
    found = find_competition(tmp_path)
    labelled, table = read_competition(tmp_path), read_test(found)
    assert (labelled.ids, len(labelled.photos)) == ([f"ö{i}" for i in range(6)], 12 if has_folders[0] else 6)
    assert [one.id for one in table.observations] == [f"ö{i}" for i in range(4)]
    assert all(len(one.photos) == (2 if has_folders[1] else 1) for one in table.observations)
    assert all(path.is_file() for one in table.observations for path in one.photos)
    stage_competition(tmp_path, tmp_path / "staged")
    originals = repeat_observations(tmp_path / "staged", 3, found.competition)
    larger = find_test_table(tmp_path / "staged", "table", settings=found.competition.settings)
    assert {one.id for one in larger.observations} == set(originals)
    assert all(path.is_file() for one in larger.observations for path in one.photos)
    assert sum(len(one.photos) for one in larger.observations) == 3 * (8 if has_folders[1] else 4)


def test_folders_of_observations_that_only_kaggle_has_are_read_there(tmp_path):
    trees(tmp_path / "here", sample=[("image", "label"), *((f"o{i}", "oak") for i in range(3))])
    shutil.rmtree(tmp_path / "here" / "test")
    settings = find_competition(tmp_path / "here").competition.settings
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for number in range(6):
        photo(tmp_path / "there" / "test" / f"o{number % 3}" / f"{number}.jpg", number)
    table = find_test_table(tmp_path / "there", "table", settings=settings)
    assert [[path.name for path in one.photos] for one in table.observations] == [
        ["0.jpg", "3.jpg"],
        ["1.jpg", "4.jpg"],
        ["2.jpg", "5.jpg"],
    ]


def test_folders_of_classes_are_not_taken_for_observations(tmp_path):
    layouts.class_folders(tmp_path)
    write_csv(tmp_path / "sample_submission.csv", [("id", "label"), ("apple 0", "apple")])
    classes = [("carrot", "orange"), ("apple", "red"), ("bell pepper", "red")]
    write_csv(tmp_path / "train_classes.csv", [("label", "colour"), *classes])
    assert find_competition(tmp_path).competition.name == "class-folders"


def test_the_metric_log_loss_needs_probabilities(tmp_path):
    trees(tmp_path / "one", settings='metric = "log_loss"')
    assert "has the metric log_loss, but sample_submission.csv has no probabilities" in refusal(tmp_path / "one")
    sample = sample_rows(*LABELS, answer=("0.3", "0.3", "0.4"))
    trees(tmp_path / "each", sample=sample, settings='metric = "log_loss"')
    assert find_competition(tmp_path / "each").competition.metric == "log_loss"


@pytest.mark.parametrize(
    ("answer", "settings", "metric", "said"),
    [
        (("0.3", "0.3", "0.4"), "", "log_loss", "scored by log_loss, unless another metric is in competition.toml"),
        (("0.3", "0.3", "0.4"), 'metric = "recall_at_1"', "recall_at_1", "scored by recall_at_1, of competition.toml"),
        (None, "", "recall_at_1", "scored by recall_at_1, unless another metric is in competition.toml"),
    ],
)
def test_probabilities_are_scored_by_the_log_loss_unless_the_settings_say_otherwise(
    tmp_path, answer, settings, metric, said
):
    options = {"sample": sample_rows(*LABELS, answer=answer)} if answer else {}
    trees(tmp_path / "data", settings=settings, **options)
    competition = find_competition(tmp_path / "data").competition
    assert competition.metric == metric
    assert f"; {said}" in competition.notes[0]

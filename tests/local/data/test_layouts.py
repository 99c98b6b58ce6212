"""What every layout must do, so that a competition of it goes all the way: the tests that a new one must pass.

A new layout brings the smallest competition of its kind here, in SMALLEST.

python -m pytest tests/local/data/test_layouts.py
"""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.competitions import COMPETITIONS
from kernel.competitions.competition import Competition
from kernel.observations import find_test_table, recognise
from kernel.submission import check_submission, fallback_guesses, write_submission
from local.data.competition import labelled, read_competition
from local.rehearsal.staging import stage_competition
from tests import layouts
from tests.conftest import photo


def table(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def fungiclef(folder: Path) -> None:
    """Classes 3 and 17; observation 31 has two photos and comes first in the table."""
    tables, photos = (folder / name / "FungiTastic-FewShot" for name in ("metadata", "images"))
    for split, rows in (("Train", ("3,11,a.jpg", "17,12,b.jpg")), ("Val", ("3,21,c.jpg",))):
        table(tables / f"FungiTastic-FewShot-{split}.csv", "category_id,observationID,filename", *rows)
    rows = ("31,d.jpg,3", "30,e.jpg,17", "31,f.jpg,3")
    table(tables / "FungiTastic-FewShot-Test.csv", "observationID,filename,category_id", *rows)
    for split, names in (("train", "ab"), ("val", "c"), ("test", "def")):
        for name in names:
            photo(photos / split / "300p" / f"{name}.jpg", seed=ord(name))
    table(folder / "FungiCLEF25-SAMPLE_SUBMISSION.csv", "observationId,predictions", "31,3 17", "30,3 17")


def herbarium(folder: Path) -> None:
    """Species 0 and 9; the test's images are not in order of their names."""
    images = {"train": {5: "images/0.jpg", 6: "images/1.jpg"}, "test": {41: "images/9.jpg", 40: "images/8.jpg"}}
    for split, names in images.items():
        listed = {"images": [{"id": number, "file_name": name} for number, name in names.items()]}
        if split == "train":
            listed["annotations"] = [{"image_id": 5, "category_id": 0}, {"image_id": 6, "category_id": 9}]
        for number, name in names.items():
            photo(folder / "nybg2020" / split / name, seed=number)
        (folder / "nybg2020" / split / "metadata.json").write_text(json.dumps(listed), encoding="ISO-8859-1")
    table(folder / "sample_submission.csv", "Id,Predicted", "41,0", "40,0")


def class_folders(folder: Path) -> None:
    for seed, name in enumerate(("train/bell pepper/1.png", "train/apple/1.png", "test/b.png", "test/a.png")):
        photo(folder / name, seed)


SMALLEST: dict[str, Callable[[Path], object]] = {
    "fungiclef": fungiclef,
    "herbarium": herbarium,
    "class-folders": class_folders,
    "fungitastic": lambda folder: layouts.fungitastic(folder, "FungiTastic"),
    "fungitastic-mini": lambda folder: layouts.fungitastic(folder, "FungiTastic-Mini"),
    "fungitastic-fewshot": lambda folder: layouts.fungitastic(folder, "FungiTastic-FewShot"),
    "herbarium-2021": lambda folder: layouts.herbarium(folder, 2021),
    "herbarium-2022": lambda folder: layouts.herbarium(folder, 2022),
}


@pytest.fixture(params=COMPETITIONS, ids=lambda layout: layout.name)
def layout(request) -> Competition:
    return request.param


@pytest.fixture
def folder(layout, tmp_path) -> Path:
    assert layout.name in SMALLEST, f"add the smallest competition of layout {layout.name} to SMALLEST"
    SMALLEST[layout.name](tmp_path / "competition")
    return tmp_path / "competition"


def test_a_layout_has_a_time_limit(layout):
    assert 0 < layout.time_limit <= 12 * 3600


def test_a_folder_is_recognised_as_its_own_layout_and_no_other(layout, folder):
    assert recognise(folder).competition is layout


def test_every_training_photo_is_there_with_its_class_as_text(layout, folder):
    competition = read_competition(folder)
    assert all(path.is_file() for path in competition.photos["photo"])
    classes = set(labelled(competition, "train").class_ids)
    assert len(classes) > 1
    assert all(isinstance(name, str) and name for name in classes)


def test_every_test_observation_is_there_once_with_its_photos_and_none_was_trained_on(layout, folder):
    observations = find_test_table(folder).observations
    ids = [observation.id for observation in observations]
    assert len(set(ids)) == len(ids) > 1
    asked = {path for observation in observations for path in observation.photos}
    assert all(observation.photos for observation in observations)
    assert all(path.is_file() for path in asked)
    assert not asked & set(read_competition(folder).photos["photo"])


def test_what_is_written_is_in_form_and_order_of_the_sample_submission(layout, folder, tmp_path):
    asked, classes = find_test_table(folder), sorted(set(read_competition(folder).photos["class_id"]))
    guesses = fallback_guesses(asked, classes)
    write_submission(tmp_path / "submission.csv", asked, [guesses] * len(asked.observations))
    check_submission(tmp_path / "submission.csv", asked, classes)
    with (tmp_path / "submission.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    for sample in folder.glob(layout.sample):
        with sample.open(newline="", encoding="utf-8") as file:
            wanted = list(csv.reader(file))
        assert written[0] == wanted[0]
        assert [row[0] for row in written] == [row[0] for row in wanted]
        assert fallback_guesses(asked) == wanted[1][1].split()


def test_the_rehearsal_sees_the_same_test_and_nothing_of_the_training_photos(layout, folder, tmp_path):
    trained_on = {path.relative_to(folder) for path in read_competition(folder).photos["photo"]}
    stage_competition(folder, tmp_path / "staged")
    before, after = (find_test_table(place).observations for place in (folder, tmp_path / "staged"))
    assert [(one.id, len(one.photos)) for one in after] == [(one.id, len(one.photos)) for one in before]
    assert all(path.is_file() for observation in after for path in observation.photos)
    assert not {path.relative_to(tmp_path / "staged") for path in (tmp_path / "staged").rglob("*")} & trained_on


@pytest.mark.parametrize("of", ["photo", "folder"])
def test_links_are_learnt_from_and_rehearsed_as_what_they_lead_to(layout, folder, tmp_path, of):
    """Relative ones, as `ln -sr` makes them: from where the rehearsal stages them they lead nowhere."""
    asked = [path for one in find_test_table(folder).observations for path in one.photos]
    content = sorted(path.read_bytes() for path in asked)
    photos = [*asked, *read_competition(folder).photos["photo"]]
    for number, path in enumerate(photos if of == "photo" else sorted({path.parent for path in photos})):
        store = tmp_path / "store" / f"{number}{path.suffix}"
        store.parent.mkdir(exist_ok=True)
        if path.name != "test" or layout.name == "class-folders":  # a folder that holds the table as well stays
            path.rename(store)
            path.symlink_to(os.path.relpath(store, path.parent))
    stage_competition(folder, tmp_path / "staged")
    staged = [path for one in find_test_table(tmp_path / "staged").observations for path in one.photos]
    assert sorted(path.read_bytes() for path in staged) == content
    assert all(path.is_file() for path in read_competition(folder).photos["photo"])


def test_no_label_of_the_test_is_shown_to_the_rehearsal(layout, folder, tmp_path):
    stage_competition(folder, tmp_path / "staged")
    for path in (tmp_path / "staged").rglob("*-Test.csv"):
        assert "category_id" not in path.read_text(encoding="utf-8")

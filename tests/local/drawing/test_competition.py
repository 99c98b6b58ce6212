"""A drawn competition has FungiCLEF's layout, can be reproduced, and does not show its test labels.

python -m pytest tests/local/drawing/test_competition.py
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from kernel.inputs import InputError
from local.drawing.competition import Generated, generate, generate_from_metadata

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = "FungiCLEF25-SAMPLE_SUBMISSION.csv"
TRAIN_COLUMNS = str.split(
    "eventDate year month day habitat countryCode scientificName kingdom phylum class order family genus "
    "specificEpithet hasCoordinate species iucnRedListCategory substrate latitude longitude coorUncert observationID "
    "region district filename category_id metaSubstrate poisonous elevation landcover biogeographicalRegion"
)
TEST_COLUMNS = str.split(
    "eventDate year month day habitat countryCode hasCoordinate substrate latitude longitude coorUncert observationID "
    "region district filename metaSubstrate elevation landcover biogeographicalRegion"
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    return generate(tmp_path_factory.mktemp("generated") / "out", species=4, seed=3)


def tables(competition: Path) -> list[pd.DataFrame]:
    folder = competition / "metadata" / "FungiTastic-FewShot"
    return [pd.read_csv(folder / f"FungiTastic-FewShot-{split}.csv") for split in ("Train", "Val", "Test")]


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def test_the_columns_are_the_competitions(generated: Generated) -> None:
    train, val, test = tables(generated.competition)
    assert list(train.columns) == list(val.columns) == TRAIN_COLUMNS
    assert list(test.columns) == TEST_COLUMNS
    assert [table.year.dtype.kind for table in (train, val, test)] == ["i", "f", "f"]


def test_every_row_has_a_photo_named_after_its_observation(generated: Generated) -> None:
    for split, rows in zip(("train", "val", "test"), tables(generated.competition), strict=True):
        photos = generated.competition / "images" / "FungiTastic-FewShot" / split / "300p"
        assert sorted(path.name for path in photos.iterdir()) == sorted(rows.filename)
        assert all(rows.filename.str.split("-").str[1] == rows.observationID.astype(str) + ".JPG")
        with Image.open(next(photos.iterdir())) as photo:
            assert (photo.format, photo.mode, min(photo.size)) == ("JPEG", "RGB", 300)


def test_observations_belong_to_one_split_and_every_class_is_in_train(generated: Generated) -> None:
    train, val, test = tables(generated.competition)
    numbers = [set(table.observationID) for table in (train, val, test)]
    assert len(set.union(*numbers)) == sum(map(len, numbers))
    assert train.category_id.nunique() == 4
    assert set(val.category_id) | set(pd.read_csv(generated.solution).category_id) <= set(train.category_id)


def test_sample_submission_and_solution_list_the_test_observations_in_order(generated: Generated) -> None:
    sample, solution = pd.read_csv(generated.competition / SAMPLE), pd.read_csv(generated.solution)
    expected = list(tables(generated.competition)[2].observationID.unique())
    assert list(sample.observationId) == list(solution.observationId) == expected
    assert all(len(set(ids.split())) == 4 for ids in sample.predictions)


def test_the_test_labels_are_outside_of_the_competition(generated: Generated) -> None:
    assert generated.competition not in generated.solution.parents
    train, _, test = tables(generated.competition)
    assert not set(train.species) & set(test.astype(str).to_numpy().ravel())


def test_the_habitat_depends_on_the_species(generated: Generated) -> None:
    train, _, _ = tables(generated.competition)
    assert train.groupby("category_id").habitat.nunique().max() <= 2


def test_the_same_seed_gives_the_same_bytes_in_several_processes_too(
    generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.drawing.competition.FEW_PHOTOS", 0)
    again = generate(tmp_path / "again", species=4, seed=3)
    monkeypatch.undo()
    assert contents(again.competition.parent) == contents(generated.competition.parent)
    other = generate(tmp_path / "other", species=4, seed=4)
    assert contents(other.competition) != contents(generated.competition)


def test_given_metadata_are_copied_and_every_row_gets_a_photo(generated: Generated, tmp_path: Path) -> None:
    drawn = generate_from_metadata(generated.competition, tmp_path / "out")
    assert contents(drawn.competition, "*.csv") == contents(generated.competition, "*.csv")
    assert contents(drawn.competition).keys() == contents(generated.competition).keys()
    assert len(pd.read_csv(drawn.solution)) == tables(drawn.competition)[2].observationID.nunique()


def test_missing_metadata_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"FungiTastic-FewShot-Train\.csv"):
        generate_from_metadata(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "local" / "generate.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(tmp_path) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("local.drawing.competition.draw", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "out", species=2)
    assert list(tmp_path.iterdir()) == []

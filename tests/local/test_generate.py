"""What a generated competition holds, that it is reproducible, and that it keeps its secret.

python -m pytest tests/local/test_generate.py
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kernel.mounts import InputError
from local.fungi import draw, traits
from local.generate import Generated, generate, generate_from_metadata

ROOT = Path(__file__).resolve().parents[2]
TEST_COLUMNS = [
    "eventDate", "year", "month", "day", "habitat", "countryCode", "hasCoordinate", "substrate", "latitude",
    "longitude", "coorUncert", "observationID", "region", "district", "filename", "metaSubstrate", "elevation",
    "landcover", "biogeographicalRegion",
]  # fmt: skip
TRAIN_COLUMNS = [
    "eventDate", "year", "month", "day", "habitat", "countryCode", "scientificName", "kingdom", "phylum", "class",
    "order", "family", "genus", "specificEpithet", "hasCoordinate", "species", "iucnRedListCategory", "substrate",
    "latitude", "longitude", "coorUncert", "observationID", "region", "district", "filename", "category_id",
    "metaSubstrate", "poisonous", "elevation", "landcover", "biogeographicalRegion",
]  # fmt: skip


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    return generate(tmp_path_factory.mktemp("generated") / "out", species=6, seed=3, processes=1)


def table(competition: Path, split: str) -> pd.DataFrame:
    return pd.read_csv(competition / "metadata" / "FungiTastic-FewShot" / f"FungiTastic-FewShot-{split}.csv")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_columns_are_the_competitions(generated: Generated) -> None:
    train, val, test = (table(generated.competition, split) for split in ("Train", "Val", "Test"))
    assert list(train.columns) == TRAIN_COLUMNS
    assert list(val.columns) == TRAIN_COLUMNS
    assert list(test.columns) == TEST_COLUMNS
    assert train.year.dtype.kind == "i"
    assert val.year.dtype.kind == test.year.dtype.kind == "f"


def test_every_row_has_a_photo_and_a_caption_and_nothing_else_lies_there(generated: Generated) -> None:
    for split in ("Train", "Val", "Test"):
        rows = table(generated.competition, split)
        photos = generated.competition / "images" / "FungiTastic-FewShot" / split.lower() / "300p"
        captions = generated.competition / "captions" / split.lower()
        assert sorted(path.name for path in photos.iterdir()) == sorted(rows.filename)
        assert sorted(path.name for path in captions.iterdir()) == sorted(rows.filename + ".json")
        assert all(
            name.split("-")[1] == f"{number}.JPG"
            for name, number in zip(rows.filename, rows.observationID, strict=True)
        )
        assert isinstance(json.loads(next(captions.iterdir()).read_text(encoding="utf-8")), str)
        with Image.open(next(photos.iterdir())) as photo:
            assert (photo.format, photo.mode, min(photo.size)) == ("JPEG", "RGB", 300)


def test_observations_belong_to_one_split_and_classes_of_val_and_test_are_in_train(generated: Generated) -> None:
    train, val, test = (table(generated.competition, split) for split in ("Train", "Val", "Test"))
    solution = pd.read_csv(generated.solution)
    assert not set(train.observationID) & set(val.observationID)
    assert not set(train.observationID) & set(test.observationID)
    assert set(val.category_id) <= set(train.category_id)
    assert set(solution.category_id) <= set(train.category_id)
    assert train.category_id.nunique() == 6
    assert val.category_id.nunique() < 6


def test_the_sample_submission_and_the_solution_list_the_test_observations_in_order(generated: Generated) -> None:
    sample = pd.read_csv(generated.competition / "FungiCLEF25-SAMPLE_SUBMISSION.csv")
    expected = list(table(generated.competition, "Test").observationID.drop_duplicates())
    assert list(sample.columns) == ["observationId", "predictions"]
    assert list(sample.observationId) == expected
    solution = pd.read_csv(generated.solution)
    assert list(solution.columns) == ["observationId", "category_id"]
    assert list(solution.observationId) == expected


def test_a_sample_submission_of_many_classes_names_ten(tmp_path: Path) -> None:
    out = generate(tmp_path / "out", species=11, processes=1)
    sample = pd.read_csv(out.competition / "FungiCLEF25-SAMPLE_SUBMISSION.csv")
    assert all(len(set(ids.split())) == 10 for ids in sample.predictions)


def test_test_labels_appear_nowhere_in_the_competition(generated: Generated) -> None:
    names = set(table(generated.competition, "Train").species)
    assert generated.competition not in generated.solution.parents
    texts = [path for path in generated.competition.rglob("*") if path.suffix in (".csv", ".json")]
    for path in texts:
        if "test" in path.as_posix().rsplit("competition/")[-1].lower() or "SAMPLE" in path.name:
            text = path.read_text(encoding="utf-8")
            assert "category_id" not in text
            assert not any(name in text for name in names)


def test_the_same_seed_gives_the_same_bytes_however_many_processes_draw(generated: Generated, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", species=6, seed=3, processes=2)
    assert digests(again.competition.parent) == digests(generated.competition.parent)


def test_another_seed_gives_other_species_and_photos(generated: Generated, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", species=6, seed=4, processes=1)
    assert (
        digests(other.competition)["FungiCLEF25-SAMPLE_SUBMISSION.csv"]
        != digests(generated.competition)["FungiCLEF25-SAMPLE_SUBMISSION.csv"]
    )


def test_photos_are_laid_under_given_metadata_which_stays_as_it_is(generated: Generated, tmp_path: Path) -> None:
    out = generate_from_metadata(generated.competition, tmp_path / "out", processes=1)
    for name, digest in digests(generated.competition).items():
        if name.endswith(".csv"):
            assert digests(out.competition)[name] == digest
    photos = [sorted(path.name for path in g.competition.rglob("*.JPG")) for g in (generated, out)]
    assert photos[0] == photos[1]
    assert len(pd.read_csv(out.solution)) == table(out.competition, "Test").observationID.nunique()


def test_metadata_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"FungiTastic-FewShot-Train\.csv"):
        generate_from_metadata(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "local" / "generate.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("local.generate.draw", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "out", species=2, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_species_of_a_genus_share_their_form_and_differ_in_their_marks() -> None:
    one, other = traits("Russulaceae", "Russula", "Russula rosea"), traits("Russulaceae", "Russula", "Russula nobilis")
    assert (one.form, one.ground, one.underside, one.gill_count) == (
        other.form,
        other.ground,
        other.underside,
        other.gill_count,
    )
    assert sum(a != b for a, b in zip(one.marks, other.marks, strict=True)) >= 2


def test_a_class_can_be_told_by_the_colours_of_its_photos_more_often_than_by_chance() -> None:
    def colours(family: str, specimen: int) -> np.ndarray:
        photo = draw(traits(family, "G", "s"), specimen, 0, (160, 120)).convert("HSV").crop((30, 20, 130, 100))
        cells = np.asarray(photo).reshape(-1, 3) // (16, 64, 64) @ (16, 4, 1)
        return np.sqrt(np.bincount(cells, minlength=256) / cells.size)

    families = [f"F{n}" for n in range(10)]
    prototypes = np.array([np.mean([colours(family, n) for n in range(6)], axis=0) for family in families])
    queries = np.array([[colours(family, n) for n in range(6, 9)] for family in families])
    right = (queries @ prototypes.T).argmax(-1) == np.arange(10)[:, None]
    assert right.mean() > 0.3  # chance is 0.1


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (225, 300), (1600, 1200)])
def test_a_photo_has_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    for n in range(6):
        assert draw(traits(f"F{n}", "G", "s"), 1, n, size).size == size

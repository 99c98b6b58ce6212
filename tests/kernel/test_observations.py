"""The competition is found among what is mounted, and its test set is read as it is meant."""

from pathlib import Path

import pytest

from kernel.inputs import InputError
from kernel.observations import find_test_table, recognise
from tests.conftest import photo
from tests.layouts import SPECIES, TEST_OBSERVATIONS, fungitastic

FUNGI = "fungiclef"
FOLDERS = "class-folders"


@pytest.fixture
def fungi(tmp_path):
    """A FungiCLEF test table of three observations in no order, one row repeated, with a byte-order mark."""
    folder = tmp_path / "competitions" / "fungi"
    table = folder / "metadata" / "FungiTastic-FewShot" / "FungiTastic-FewShot-Test.csv"
    table.parent.mkdir(parents=True)
    rows = ["0-7.JPG,7,DK", "1-3.JPG,3,DK", "2-7.JPG,7,DK", "0-7.JPG,7,DK", "3-5.JPG,5,SE"]
    table.write_text("\ufefffilename,observationID,countryCode\n" + "\n".join(rows), encoding="utf-8")
    (folder / "images" / "FungiTastic-FewShot" / "test" / "500p").mkdir(parents=True)
    return folder


def test_observations_come_in_order_of_first_appearance_with_each_photo_once(tmp_path, fungi):
    table = find_test_table(tmp_path, FUNGI)
    assert [observation.id for observation in table.observations] == ["7", "3", "5"]
    assert [photo.name for photo in table.observations[0].photos] == ["0-7.JPG", "2-7.JPG"]


def test_the_next_larger_resolution_serves_when_the_wanted_one_is_absent(tmp_path, fungi):
    photo = find_test_table(tmp_path, FUNGI).observations[0].photos[0]
    assert photo.parent.name == "500p"


def test_the_largest_resolution_serves_when_none_is_large_enough(fungi):
    found = recognise(fungi)
    assert found.photo_folder("test", "720p").name == "500p"
    assert found.photo_folder("val", "720p").name == "720p"


def test_a_missing_column_is_named_with_the_file(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("observationID,file\n1,a.JPG\n")
    with pytest.raises(InputError, match="filename") as error:
        find_test_table(tmp_path, FUNGI)
    assert str(table) in str(error.value)


@pytest.mark.parametrize("text", ['{"images": [', '{"images": [{"id": 1}]}', '[{"file_name": "1.jpg"}]', "3"])
def test_damaged_coco_metadata_is_refused_in_one_line_with_its_path(tmp_path, text):
    (tmp_path / "test_metadata.json").write_text(text)
    with pytest.raises(InputError, match=r"test_metadata\.json cannot be read") as error:
        find_test_table(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subset", ["FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot"])
def test_the_closed_test_of_the_fungitastic_subset_whose_photos_are_there_is_read(tmp_path, subset):
    table = fungitastic(tmp_path, subset)
    found = recognise(tmp_path)
    assert (found.competition.name, found.table) == (subset.lower(), table)
    test = find_test_table(tmp_path, found.competition.name)
    assert len(test.observations) == TEST_OBSERVATIONS * len(SPECIES)
    assert all(photo.is_file() for observation in test.observations for photo in observation.photos)


def test_a_kernel_takes_the_subset_that_its_weights_were_trained_for_where_all_are_mounted(tmp_path):
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        fungitastic(tmp_path / "datasets" / "fungitastic", subset)
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        table = find_test_table(tmp_path, subset.lower())
        assert {photo.parents[2].name for one in table.observations for photo in one.photos} == {subset}


def test_an_input_without_a_competition_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"Test\.csv"):
        find_test_table(tmp_path, FUNGI)


def ids_of(root: Path, name: str | None = None) -> list[str]:
    return [observation.id for observation in find_test_table(root, name).observations]


def test_observations_are_spelt_as_in_the_sample_submission(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("observationID,filename\n7.0,0.JPG\n3.0,1.JPG\n")
    (fungi / "FungiCLEF25-SAMPLE_SUBMISSION.csv").write_text("observationId,predictions\n007,1 2\n003,1 2\n")
    assert ids_of(tmp_path, FUNGI) == ["007", "003"]


def test_blank_rows_are_left_out_and_a_row_without_a_photo_still_asks_for_a_prediction(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("filename,habitat,observationID\n0.JPG,wood,7\n,,\n,,\n,bog,8\n1.JPG,wood\n")
    found = find_test_table(tmp_path, FUNGI)
    assert [(one.id, len(one.photos)) for one in found.observations] == [("7", 1), ("8", 0)]
    assert found.left_out == {f"rows of {table.name} without observationID": 3}


def test_a_table_written_on_windows_names_photos_in_folders(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("observationID,filename\n7,more\\0.JPG\n")
    (photo_,) = find_test_table(tmp_path, FUNGI).observations[0].photos
    assert photo_.parts[-3:] == ("500p", "more", "0.JPG")


def test_a_hidden_table_beside_the_real_one_is_not_read(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    (table.parent / f"._{table.name}").write_bytes(b"\0\5\x16\7")
    assert ids_of(tmp_path, FUNGI) == ["7", "3", "5"]


def test_a_test_set_without_observations_is_refused(tmp_path, fungi):
    next(fungi.rglob("*-Test.csv")).write_text("observationID,filename\n,a.jpg\n")
    plants, folders = tmp_path / "plants", tmp_path / "folders"
    for file, text in ((plants / "test_metadata.json", "[]"), (folders / "test" / "a.heic", "")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    for root, left_out in ((fungi, "without observationID: 1"), (plants, ""), (folders, ".heic files: 1")):
        with pytest.raises(InputError, match=f"has no test (observation|photo).*{left_out}"):
            find_test_table(root)


def test_weights_of_one_competition_do_not_predict_another(tmp_path, fungi):
    photo(fungi / "images" / "FungiTastic-FewShot" / "test" / "500p" / "0-7.JPG")
    with pytest.raises(InputError, match=r"for the competition class-folders .* \(fungiclef\) is attached"):
        find_test_table(tmp_path, FOLDERS)
    photo(tmp_path / "competitions" / "folders" / "train" / "elm" / "b.jpg")
    with pytest.raises(InputError, match=r"no competition under .* looked for test"):
        find_test_table(tmp_path / "competitions" / "folders", FOLDERS)
    photo(tmp_path / "competitions" / "folders" / "test" / "a.jpg")
    assert ids_of(tmp_path, FOLDERS) == ["a"]
    assert ids_of(tmp_path, FUNGI) == ["7", "3", "5"]


def test_the_folders_of_resolutions_are_not_class_folders(tmp_path, fungi):
    photos = fungi / "images" / "FungiTastic-FewShot"
    for split in ("train", "val", "test"):
        photo(photos / split / "300p" / "0.JPG")
    assert recognise(photos) is None
    assert recognise(photos / "test") is None
    assert recognise(fungi).competition.name == "fungiclef"


def test_folders_of_pictures_beside_the_competition_are_not_taken_for_it(tmp_path, fungi):
    for name in ("weights", "more"):
        photo(tmp_path / name / "curve.png")
    assert ids_of(tmp_path, FUNGI) == ["7", "3", "5"]

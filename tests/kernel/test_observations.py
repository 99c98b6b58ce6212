"""The test table of each layout: observations in order, with their photos."""

import pytest

from kernel.mounts import InputError
from kernel.observations import find_test_table, read_table, recognise, resolution_folder
from tests.layouts import SPECIES, TEST_OBSERVATIONS, fungitastic, herbarium

FUNGI = {"competition": {"layout": "fungiclef", "resolution": "300p"}}


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


def test_the_largest_resolution_serves_when_none_is_large_enough(tmp_path):
    (tmp_path / "300p").mkdir()
    assert resolution_folder(tmp_path, "720p").name == "300p"
    assert resolution_folder(tmp_path / "empty", "720p").name == "720p"


def test_a_missing_column_is_named_with_the_file(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("observationID,file\n1,a.JPG\n")
    with pytest.raises(InputError, match="filename") as error:
        find_test_table(tmp_path, FUNGI)
    assert str(table) in str(error.value)


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"table\.csv"):
        read_table(tmp_path / "table.csv", ("a",))


@pytest.mark.parametrize("year", [2020, 2021, 2022])
def test_a_herbarium_is_read_from_its_coco_metadata_of_any_year(tmp_path, year):
    solution = herbarium(tmp_path / "competitions" / "plants", year)
    table = find_test_table(tmp_path, None)
    assert table.layout.name.startswith("herbarium")
    assert table.layout.header == ("Id", "Predicted")
    assert table.folder == solution.parent
    answered = [line.split(",")[0] for line in solution.read_text().splitlines()[1:]]
    assert [observation.id for observation in table.observations] == answered
    photos = [photo for observation in table.observations for photo in observation.photos]
    assert len(photos) == len(answered)
    assert all(photo.is_file() for photo in photos)


@pytest.mark.parametrize("text", ['{"images": [', '{"images": [{"id": 1}]}', '[{"file_name": "1.jpg"}]', "3"])
def test_damaged_coco_metadata_is_refused_in_one_line_with_its_path(tmp_path, text):
    (tmp_path / "test_metadata.json").write_text(text)
    with pytest.raises(InputError, match=r"test_metadata\.json cannot be read") as error:
        find_test_table(tmp_path, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subset", ["FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot"])
def test_of_fungitastics_tables_the_closed_test_of_the_subset_with_photos_is_asked(tmp_path, subset):
    table = fungitastic(tmp_path, subset)
    layout, found = recognise(tmp_path)
    assert (layout.name, found) == (subset.lower(), table)
    asked = find_test_table(tmp_path, {"competition": {"layout": layout.name}})
    assert len(asked.observations) == TEST_OBSERVATIONS * len(SPECIES)
    assert all(photo.is_file() for observation in asked.observations for photo in observation.photos)


def test_a_kernel_takes_the_subset_that_its_weights_were_trained_for_where_all_are_mounted(tmp_path):
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        fungitastic(tmp_path / "datasets" / "fungitastic", subset)
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        table = find_test_table(tmp_path, {"competition": {"layout": subset.lower()}})
        assert {photo.parents[2].name for one in table.observations for photo in one.photos} == {subset}


def test_in_class_folders_every_test_photo_is_an_observation(tmp_path):
    (tmp_path / "photos" / "test").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / "photos" / "test" / name).touch()
    table = find_test_table(tmp_path, {"competition": {"layout": "class-folders"}})
    assert [observation.id for observation in table.observations] == ["a", "b"]


def test_an_input_without_a_competition_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"Test\.csv"):
        find_test_table(tmp_path, FUNGI)

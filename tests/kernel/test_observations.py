"""The test table of each layout: observations in order, with their photos."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from kernel.competitions import COMPETITIONS
from kernel.inputs import InputError
from kernel.observations import find_test_table, recognise
from kernel.tables import PHOTO_SUFFIXES, clean_id, read_table, respell
from tests.conftest import photo
from tests.layouts import SPECIES, TEST_OBSERVATIONS, fungitastic, herbarium

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


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"table\.csv"):
        read_table(tmp_path / "table.csv", ("a",))


@pytest.mark.parametrize("year", [2020, 2021, 2022])
def test_a_herbarium_is_read_from_its_coco_metadata_of_any_year(tmp_path, year):
    solution = herbarium(tmp_path / "competitions" / "plants", year)
    table = find_test_table(tmp_path)
    assert table.competition.name.startswith("herbarium")
    assert table.competition.header == ("Id", "Predicted")
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
        find_test_table(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subset", ["FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot"])
def test_of_fungitastics_tables_the_closed_test_of_the_subset_with_photos_is_asked(tmp_path, subset):
    table = fungitastic(tmp_path, subset)
    found = recognise(tmp_path)
    assert (found.competition.name, found.table) == (subset.lower(), table)
    asked = find_test_table(tmp_path, found.competition.name)
    assert len(asked.observations) == TEST_OBSERVATIONS * len(SPECIES)
    assert all(photo.is_file() for observation in asked.observations for photo in observation.photos)


def test_a_kernel_takes_the_subset_that_its_weights_were_trained_for_where_all_are_mounted(tmp_path):
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        fungitastic(tmp_path / "datasets" / "fungitastic", subset)
    for subset in ("FungiTastic", "FungiTastic-Mini"):
        table = find_test_table(tmp_path, subset.lower())
        assert {photo.parents[2].name for one in table.observations for photo in one.photos} == {subset}


def test_in_class_folders_every_test_photo_is_an_observation(tmp_path):
    (tmp_path / "photos" / "test").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / "photos" / "test" / name).touch()
    table = find_test_table(tmp_path, "class-folders")
    assert [observation.id for observation in table.observations] == ["a", "b"]


def test_an_input_without_a_competition_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"Test\.csv"):
        find_test_table(tmp_path, FUNGI)


def test_folder(root: Path, *names: str) -> Path:
    """A folder of test photos under a competition's; files that are no photos are empty."""
    for name in names:
        (root / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "test" / name).touch()
    return root


test_folder.__test__ = False


def ids_of(root: Path, layout: str | None = None) -> list[str]:
    return [observation.id for observation in find_test_table(root, layout).observations]


def test_every_format_that_pillow_decodes_by_itself_is_a_photo():
    Image.init()
    needs_help = {"EPS", "MPEG"}  # Ghostscript; and nothing decodes the other
    stubs = {
        name
        for name, (reader, _) in Image.OPEN.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }
    formats = Image.OPEN.keys() - stubs - needs_help
    assert {suffix for suffix, name in Image.EXTENSION.items() if name in formats} <= PHOTO_SUFFIXES
    assert not PHOTO_SUFFIXES & {suffix for suffix, name in Image.EXTENSION.items() if name in stubs | needs_help}


def test_what_is_no_photo_is_counted_by_its_suffix_and_what_is_hidden_is_not_there(tmp_path):
    hidden = ("._a.jpg", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._b.bmp", "__MACOSX/b.bmp")
    test_folder(tmp_path, "a.jpg", "b.BMP", "c.tif", "d.HEIC", "e.heic", "notes.txt", "README", *hidden)
    table = find_test_table(tmp_path, FOLDERS)
    assert [observation.id for observation in table.observations] == ["a", "b", "c"]
    assert table.left_out == {".heic files": 2, ".txt files": 1, "files without a suffix": 1}


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("oak/1.jpg", "elm/2.jpg"), ["2", "1"]),
        (("oak/1.jpg", "elm/1.jpg"), ["elm/1", "oak/1"]),
        (("a.jpg", "a.png", "b.jpg"), ["a.jpg", "a.png", "b.jpg"]),
        (("01.jpg", "1.jpg", "2.0.jpg"), ["01", "1", "2.0"]),
        (("oak/1.jpg", "oak/1.png", "elm/1.jpg"), ["elm/1.jpg", "oak/1.jpg", "oak/1.png"]),
    ],
)
def test_photos_in_folders_or_of_one_stem_are_observations_of_their_own(tmp_path, names, ids):
    test_folder(tmp_path, *names)
    assert ids_of(tmp_path) == ids


def test_photos_are_named_as_the_sample_submission_names_them(tmp_path):
    test_folder(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "sample_submission.csv").write_text("image_name,pred_label\nb.jpg,oak\na.jpg,oak\n")
    assert ids_of(tmp_path) == ["a.jpg", "b.jpg"]


def test_a_linked_folder_of_photos_is_read_once_even_where_it_leads_back(tmp_path):
    test_folder(tmp_path / "elsewhere", "a.jpg")
    test_folder(tmp_path / "data")
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "test" / "more").symlink_to(Path("..", "..", "elsewhere", "test"))
    (tmp_path / "elsewhere" / "test" / "back").symlink_to(tmp_path / "data" / "test")
    assert ids_of(tmp_path / "data") == ["a"]


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("7", "7"), ("7.0", "7"), (" 7 ", "7"), ("7.", "7."), ("1e+05", "100000"), ("2.38e+03", "2380"), ("0", "0"),
        ("0.0", "0"), ("-1.0", "-1"), ("0100", "0100"), ("7.5", "7.5"), ("12e4", "12e4"), ("oak 2.0", "oak 2.0"),
    ],
)  # fmt: skip
def test_an_id_that_a_program_took_for_a_float_is_a_whole_number_again(text, id):
    assert clean_id(text) == id


def test_ids_are_spelt_as_in_the_sample_submission_and_else_as_they_are():
    assert respell(["7", "12", "oak"], ["007"]) == {"7": "007", "12": "12", "oak": "oak"}
    assert respell(["7", "007"], ["007"]) == {"7": "007", "007": "007"}
    assert respell(["7", "007"], ["007", "7"]) == {"7": "7", "007": "007"}
    with pytest.raises(InputError, match="'7' and '007' differ in leading zeros alone"):
        respell(["7", "007"], [])


def test_observations_are_spelt_as_in_the_sample_submission(tmp_path, fungi):
    table = next(fungi.rglob("*-Test.csv"))
    table.write_text("observationID,filename\n7.0,0.JPG\n3.0,1.JPG\n")
    (fungi / "FungiCLEF25-SAMPLE_SUBMISSION.csv").write_text("observationId,predictions\n007,1 2\n003,1 2\n")
    assert ids_of(tmp_path, FUNGI) == ["007", "003"]


def test_rows_that_say_nothing_are_left_out_and_a_row_without_a_photo_is_still_asked(tmp_path, fungi):
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


@pytest.mark.parametrize("layout", ["fungiclef", "herbarium", "class-folders"])
def test_a_test_set_without_observations_is_refused(tmp_path, layout, fungi):
    root = tmp_path / layout
    if layout == "fungiclef":
        next(fungi.rglob("*-Test.csv")).write_text("observationID,filename\n")
        root = fungi
    elif layout == "herbarium":
        (root / "nybg2020" / "test").mkdir(parents=True)
        (root / "nybg2020" / "test" / "metadata.json").write_text(json.dumps({"images": []}))
    else:
        test_folder(root, "a.heic")
    with pytest.raises(InputError, match="no test observation") as error:
        find_test_table(root, layout)
    assert ("(left out: .heic files: 1)" in str(error.value)) == (layout == "class-folders")


def test_weights_for_one_kind_of_competition_do_not_answer_another(tmp_path, fungi):
    photo(fungi / "images" / "FungiTastic-FewShot" / "test" / "500p" / "0-7.JPG")
    with pytest.raises(InputError, match=r"for the competition class-folders .* \(fungiclef\) is attached"):
        find_test_table(tmp_path, FOLDERS)
    photo(tmp_path / "competitions" / "folders" / "train" / "elm" / "b.jpg")
    with pytest.raises(InputError, match=r"no competition under .* looked for test"):
        find_test_table(tmp_path / "competitions" / "folders", FOLDERS)
    test_folder(tmp_path / "competitions" / "folders", "a.jpg")
    assert ids_of(tmp_path, FOLDERS) == ["a"]
    assert ids_of(tmp_path, FUNGI) == ["7", "3", "5"]


def test_the_folders_of_resolutions_are_no_class_folders(tmp_path, fungi):
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


@pytest.mark.parametrize("layout", COMPETITIONS, ids=lambda layout: layout.name)
def test_the_parts_of_a_leaderboard_are_known_for_the_competitions_own_test_set_alone(layout):
    assert layout.boards(0) == {"whole test": 0}
    assert layout.boards(17) == {"whole test": 17}
    if layout.leaderboard:
        assert layout.boards(sum(layout.leaderboard)) == dict(
            zip(("public", "private"), layout.leaderboard, strict=True)
        )

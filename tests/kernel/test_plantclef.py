"""PlantCLEF: a table with semicolons lists the plants, a folder has the quadrats, and an answer is a set of species."""

import pytest

from kernel.competitions import competition_named
from kernel.inputs import InputError
from kernel.observations import Observation, TestTable, find_test_table, read_test, recognise
from kernel.submission import check_submission, write_submission
from kernel.views import TILES, tile_names
from local.data.competition import read_competition
from local.data.folder import find_competition
from local.data.solution import read_solution
from tests.layouts import plantclef, write_csv

PLANTCLEF = competition_named("plantclef")
TRAINING = "PlantCLEF2024singleplanttrainingdata.csv"
PACKAGE = "data/PlantCLEF/PlantCLEF2025/DataOut/test/package"  # in the archive of the test set
QUADRATS = [f"CBN-{number:02}-2024" for number in range(12)]


@pytest.mark.parametrize("has_splits", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("has_test_table", [False, True])
def test_plants_and_quadrats_are_found_in_whichever_folders(tmp_path, has_test_table, is_nested, has_splits):
    plantclef(tmp_path, has_test_table, is_nested, has_splits)
    training = read_competition(tmp_path)
    assert all(path.is_file() for path in training.photos)
    assert [len(training.in_splits(split)) for split in ("train", "val")] == [6, 6]
    assert len(training.photos) == 18
    assert training.species["7"] == '"Amanita muscaria" L.'
    assert training.taxa["12"] == ("", "", "", "Boletaceae", "Boletus")
    found = find_competition(tmp_path).competition
    assert found.has_table == has_test_table
    (tmp_path / TRAINING).unlink()  # which a kernel does not get
    for table in (find_test_table(tmp_path), find_test_table(tmp_path, "plantclef")):
        assert [one.id for one in table.observations] == QUADRATS
        assert [one.photos[0].stem for one in table.observations] == QUADRATS
        assert all(path.is_file() for one in table.observations for path in one.photos)


def test_a_folder_of_quadrats_with_another_name_is_known_by_the_sample_submission(tmp_path):
    plantclef(tmp_path, has_test_table=False)
    (tmp_path / "PlantCLEF2025_test_images").rename(tmp_path / "test_photos")
    (tmp_path / TRAINING).unlink()
    assert len(find_test_table(tmp_path, "plantclef").observations) == 12
    (tmp_path / "sample_submission.csv").unlink()
    (tmp_path / "solution.csv").unlink()
    assert recognise(tmp_path, [PLANTCLEF]) is None


@pytest.mark.parametrize("top", ["", "PlantCLEF2025test", "test_2025"])
@pytest.mark.parametrize("table_folder", ["package", "top", "none"])
def test_quadrats_are_found_where_the_archive_has_them(tmp_path, top, table_folder):
    plantclef(tmp_path, has_test_table=False)
    (tmp_path / "sample_submission.csv").unlink()  # which Kaggle does not offer
    (tmp_path / "solution.csv").unlink()
    package = tmp_path / top / PACKAGE
    package.mkdir(parents=True)
    (tmp_path / "PlantCLEF2025_test_images" / "PlantCLEF2025_test_images").rename(package / "images")
    (tmp_path / "PlantCLEF2025_test_images").rmdir()
    if table_folder != "none":
        table = (package if table_folder == "package" else tmp_path) / "PlantCLEF2025_test.csv"
        rows = [f'"{name}";"A; B"' for name in reversed(QUADRATS)]
        table.write_text("\n".join(['"quadrat_id";"author"', *rows]))
    if table_folder != "top" and top == "test_2025":  # where a kernel would not find them
        with pytest.raises(InputError, match="PlantCLEF2025_test_images does not exist: put the test set there"):
            read_test(find_competition(tmp_path))
        return
    observations = read_test(find_competition(tmp_path)).observations
    assert [one.id for one in observations] == (QUADRATS if table_folder == "none" else QUADRATS[::-1])
    assert all(one.photos[0].is_file() for one in observations)
    (tmp_path / TRAINING).unlink()
    assert find_test_table(tmp_path, "plantclef").observations == observations


def test_photos_of_the_training_data_are_no_quadrats(tmp_path):
    plantclef(tmp_path, has_splits=True)
    for path in list((tmp_path / "plants" / "images_max_side_800").iterdir()):
        path.rename(tmp_path / path.name)
    for path in list((tmp_path / "test").iterdir())[1:]:
        path.rename(tmp_path / "val" / path.name / "more")  # so test has one species
    (tmp_path / "PlantCLEF2025_test.csv").unlink()
    assert [one.id for one in read_test(find_competition(tmp_path)).observations] == QUADRATS
    for path in (tmp_path / "PlantCLEF2025_test_images").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(InputError, match="PlantCLEF2025_test_images has no test photo: put the test set there"):
        read_test(find_competition(tmp_path))


def test_photos_of_all_splits_may_be_gathered_in_the_folder_of_one(tmp_path):
    plantclef(tmp_path)
    (tmp_path / "plants" / "images_max_side_800").rename(tmp_path / "train")
    training = read_competition(tmp_path)
    assert all(path.is_file() for path in training.photos)
    assert [len(training.in_splits(split)) for split in ("train", "val")] == [6, 6]


def test_an_id_that_several_species_have_is_that_of_several_observations(tmp_path):
    plantclef(tmp_path)
    path = tmp_path / TRAINING
    path.write_text(path.read_text().replace(";12;012;", ";12;07;"))
    training = read_competition(tmp_path)
    assert len(training.photos) == 18
    assert {"07": "7", "07-12": "12"}.items() <= dict(zip(training.ids, training.class_ids, strict=True)).items()


@pytest.mark.parametrize("has_test_table", [False, True])
def test_ids_have_the_suffix_of_the_photos_if_the_sample_submission_has_it(tmp_path, has_test_table):
    plantclef(tmp_path, has_test_table, suffix=".jpg")
    assert [one.id for one in find_test_table(tmp_path).observations] == [f"{name}.jpg" for name in QUADRATS]


def test_a_test_table_decides_which_photos_are_quadrats_and_in_which_order(tmp_path):
    plantclef(tmp_path)
    (tmp_path / "sample_submission.csv").unlink()
    table = tmp_path / "PlantCLEF2025_test.csv"
    for content in ("quadrat_id\nCBN-05-2024\nCBN-02-2024\n", "site;image\n1;a/CBN-05-2024.jpg\n2;a/CBN-02-2024.jpg\n"):
        table.write_text(content)
        assert [one.id for one in find_test_table(tmp_path).observations] == [QUADRATS[5], QUADRATS[2]]
    table.write_text("quadrat_id\nCBN-05-2024.jpg\n")
    assert [one.id for one in find_test_table(tmp_path).observations] == ["CBN-05-2024.jpg"]


def test_an_observation_is_in_the_split_of_its_first_photo_and_without_an_id_a_photo_is_one(tmp_path):
    plantclef(tmp_path)
    path = tmp_path / TRAINING
    lines = path.read_text().splitlines()
    assert lines[2].startswith("701.jpg;leaf;7;07;")
    lines[2] = lines[2].replace("train", "val")
    lines[3] = lines[3].replace(";012;", ";;")
    path.write_text("\n".join(lines) + "\n")
    training = read_competition(tmp_path)
    assert len(training.in_splits("train").observations) == 7
    assert "1200.jpg" in training.ids


def test_what_is_missing_is_said_in_one_line(tmp_path):
    plantclef(tmp_path)
    (tmp_path / "plants").rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    with pytest.raises(InputError, match=r"lacks the photos of .*, such as 7/700\.jpg: unpack them there"):
        read_competition(tmp_path)
    (tmp_path / TRAINING).unlink()
    with pytest.raises(InputError, match="lacks a training table with the columns image_name, species_id, obs_id"):
        find_competition(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    assert recognise(tmp_path, [PLANTCLEF]) is None
    with pytest.raises(InputError, match="or photos in PlantCLEF2025_test_images; attach the competition"):
        find_test_table(tmp_path, "plantclef")


@pytest.fixture
def table(tmp_path) -> TestTable:
    return TestTable(tmp_path, PLANTCLEF, [Observation("a", ()), Observation("b", ())])


def test_an_answer_is_written_as_a_list_in_brackets_best_first(tmp_path, table):
    answers = [{"1356257": 0.9, "1355868": 0.8}, {"1355868": 0.7}]
    write_submission(tmp_path / "s.csv", table, answers, ["1355868", "1356257"])
    assert (tmp_path / "s.csv").read_text() == 'quadrat_id,species_ids\na,"[1356257, 1355868]"\nb,[1355868]\n'
    assert [[*answer] for _, answer in PLANTCLEF.read_submission(tmp_path / "s.csv")] == [[*one] for one in answers]


@pytest.mark.parametrize("cell", ["[]", "", "1", "[1,2]", "[1, 1]", "[3]", "['1']", str(list(range(1, 22)))])
def test_a_cell_that_is_no_list_of_known_species_each_once_is_refused(tmp_path, table, cell):
    write_csv(tmp_path / "s.csv", [PLANTCLEF.header, ("a", cell), ("b", "[1]")])
    known = ["1", "2"] if cell.count(",") < 3 else list(map(str, range(1, 22)))
    with pytest.raises(InputError, match=r"observation a: .* is not 1 to 20 distinct class ids in brackets"):
        check_submission(tmp_path / "s.csv", table, known)


@pytest.mark.parametrize(
    "lines",
    [
        ['a,"[7, 12]"', "b,[12]"],
        ["a,7 12", "b,12.0"],
        ["a,7", "b,12", "a,12"],
        ["a,\"['7', '12']\"", "b,12"],
    ],
)
def test_a_solution_has_several_species_in_a_cell_or_several_rows(tmp_path, lines):
    path = tmp_path / "solution.csv"
    path.write_text("\n".join(["quadrat_id,species_ids", *lines]))
    assert read_solution(path, ["a", "b"], ["7", "12"], PLANTCLEF.form) == {"a": "7 12", "b": "12"}
    usage = [f"Public;{line.replace(',', ';', 1)}" for line in lines]
    path.write_text("\n".join(["Usage;quadrat_id;species_ids", *usage]))
    assert read_solution(path, ["a", "b"], ["7", "12"], PLANTCLEF.form) == {"a": "7 12", "b": "12"}


def test_there_is_a_view_for_each_of_its_tiles():
    assert len(tile_names(PLANTCLEF.grids)) == 1 + 9 + 16 + 25
    assert set(tile_names(PLANTCLEF.grids)) <= TILES.keys()

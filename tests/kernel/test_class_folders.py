"""In class folders the photos are the test set, and their ids are names of files."""

import shutil
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from kernel.competitions import competition_of
from kernel.competitions.class_folders import PHOTO_SUFFIXES
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, to_json
from kernel.observations import find_test_table, read_test
from local.data.competition import read_competition
from local.data.folder import find_competition
from local.rehearsal.staging import stage_competition
from local.rehearsal.variations import keep_observations, repeat_observations
from tests import layouts
from tests.conftest import photo


def write_test(root: Path, *names: str) -> Path:
    """A test folder of empty files."""
    for name in names:
        (root / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "test" / name).touch()
    return root


def ids_of(root: Path) -> list[str]:
    return [observation.id for observation in find_test_table(root).observations]


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


def test_other_files_are_counted_by_their_suffix_and_hidden_ones_are_ignored(tmp_path):
    hidden = ("._a.jpg", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._b.bmp", "__MACOSX/b.bmp")
    write_test(tmp_path, "a.jpg", "b.BMP", "c.tif", "d.HEIC", "e.heic", "notes.txt", "README", *hidden)
    table = find_test_table(tmp_path)
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
    write_test(tmp_path, *names)
    assert ids_of(tmp_path) == ids


def test_photos_are_named_as_the_sample_submission_names_them(tmp_path):
    write_test(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "sample_submission.csv").write_text("image_name,pred_label\nb.jpg,oak\na.jpg,oak\n")
    assert ids_of(tmp_path) == ["a.jpg", "b.jpg"]


def test_a_linked_folder_of_photos_is_read_once_even_where_it_leads_back(tmp_path):
    write_test(tmp_path / "elsewhere", "a.jpg")
    write_test(tmp_path / "data")
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "test" / "more").symlink_to(Path("..", "..", "elsewhere", "test"))
    (tmp_path / "elsewhere" / "test" / "back").symlink_to(tmp_path / "data" / "test")
    assert ids_of(tmp_path / "data") == ["a"]


def test_the_photos_in_a_folder_with_the_name_of_a_photo_are_found(tmp_path):
    write_test(tmp_path, "more.jpg/a.jpg", "b.jpg")
    (tmp_path / "test" / "c.jpg").symlink_to("c.jpg")
    assert ids_of(tmp_path) == ["b", "c", "a"]


def test_names_with_spaces_or_backslashes_are_found(tmp_path):
    write_test(tmp_path, " a .jpg", "b\\c.jpg")
    (first, second) = find_test_table(tmp_path).observations
    assert (first.id, second.id) == (" a ", "b\\c")
    assert first.photos[0].is_file()
    assert second.photos[0].is_file()


def test_a_larger_test_set_keeps_photos_of_one_name_in_different_folders_apart(tmp_path):
    write_test(tmp_path, *(f"{folder}/{number}.jpg" for folder in ("oak", "elm") for number in range(2)))
    originals = repeat_observations(tmp_path, 3)
    assert set(originals) == set(ids_of(tmp_path))
    assert len(originals) == 12
    assert sorted(set(originals.values())) == ["elm/0", "elm/1", "oak/0", "oak/1"]
    keep_observations(tmp_path, {"oak/1"})
    assert ids_of(tmp_path) == ["1"]


def test_an_answer_is_written_as_the_sample_submission_does(tmp_path):
    layouts.class_folders(tmp_path)
    sample = tmp_path / "sample_submission.csv"
    assert find_competition(tmp_path).competition.header == ("image_name", "pred_label")
    sample.write_text("id,label\n")
    assert find_competition(tmp_path).competition.header == ("id", "label")
    sample.write_text("id,carrot,apple,bell pepper\n")
    competition = find_competition(tmp_path).competition
    assert competition.form.write({"apple": 0.75, "bell pepper": 0.25}) == ["0", "0.75", "0.25"]
    trained = CompetitionSpec(
        name="class-folders", resolution="300p", time_limit=1, settings=to_json(competition.settings)
    )
    assert competition_of(trained).form == competition.form


def test_columns_that_are_no_folders_of_classes_are_refused(tmp_path):
    layouts.class_folders(tmp_path)
    (tmp_path / "sample_submission.csv").write_text("id,apple,pear,carrot\n")
    with pytest.raises(InputError, match=r"no folders of classes, such as 'pear': rename"):
        find_competition(tmp_path)


def test_columns_of_probabilities_are_scored_by_the_log_loss(tmp_path):
    layouts.class_folders(tmp_path)
    assert find_competition(tmp_path).competition.metric == "recall_at_1"
    (tmp_path / "sample_submission.csv").write_text("id,apple,bell pepper,carrot\napple 0,0.3,0.3,0.4\n")
    competition = find_competition(tmp_path).competition
    assert competition.metric == "log_loss"
    assert competition.notes[0].endswith("a row has the probabilities of 3 classes; scored by log_loss")


SPELLINGS = [("NFC", "NFD"), ("NFD", "NFC")]


@pytest.mark.parametrize(("on_disk", "in_sample"), SPELLINGS)
@pytest.mark.parametrize("header", ["id,label\n", "id,{},{},{}\n"], ids=["class", "probabilities"])
def test_names_in_another_unicode_form_are_spelt_as_the_sample_submission_does(tmp_path, header, on_disk, in_sample):
    classes = ("Möhre", "Apfel", "Kürbis")
    for seed, name in enumerate(unicodedata.normalize(on_disk, own) for own in classes):
        for index, folder in enumerate(("train", "train", "val", "test")):
            photo(tmp_path / folder / ("" if folder == "test" else name) / f"ä{name}{index}.png", seed)
    spelt = [unicodedata.normalize(in_sample, name) for name in classes]
    ids = [unicodedata.normalize(in_sample, f"ä{name}3") for name in classes]
    cells = [",0.3,0.3,0.4" if "{}" in header else f",{name}" for name in spelt]
    (tmp_path / "sample_submission.csv").write_text(
        header.format(*spelt) + "".join(f"{name}{own}\n" for name, own in zip(ids, cells, strict=True)),
        encoding="utf-8",
    )
    assert sorted(ids_of(tmp_path)) == sorted(ids)
    labelled = read_competition(tmp_path)
    assert labelled.classes == sorted(spelt)
    assert all(path.is_file() for path in labelled.photos)


@pytest.mark.parametrize("answer", ["apple 0,31\napple 1,7\n", "", "apple 0,0\n", "apple 0,1\n"])
def test_ids_of_classes_are_found_in_a_table_beside_the_folders_or_refused(tmp_path, answer):
    layouts.class_folders(tmp_path)
    (tmp_path / "sample_submission.csv").write_text(f"id,label\n{answer}" if answer else "id,31,7,12\n")
    with pytest.raises(InputError, match=r"classes that are no folders of classes, such as .* or add a classes\.csv"):
        find_competition(tmp_path)
    table = "name,index,color\ncarrot,12,red\napple,7,red\nbell pepper,31,green\nleek,0,green\n"
    (tmp_path / "categories.csv").write_text(table)
    labelled = read_competition(tmp_path)
    assert labelled.species == {"7": "apple", "12": "carrot", "31": "bell pepper"}
    assert [path.parent.name for path in labelled.photos] == [labelled.species[own] for own in labelled.class_ids]


@pytest.mark.parametrize(
    "rows",
    [
        "name,id\ncarrot,31\napple,7\n",
        "name,id\ncarrot,12\napple,7\nbell pepper,30\n",
        "name,id\ncarrot,31\napple,31\nbell pepper,31\n",
        "name,photo\ncarrot,31\napple,7\nbell pepper,9\ncarrot,12\n",
        "name,id,rank\ncarrot,31,7\napple,7,9\nbell pepper,9,31\n",
    ],
    ids=["a class less", "without the sample's id", "one id", "several ids of a class", "two columns of ids"],
)
def test_a_table_that_does_not_say_which_class_an_id_is_is_not_used(tmp_path, rows):
    layouts.class_folders(tmp_path)
    (tmp_path / "sample_submission.csv").write_text("id,label\nx,31\ny,9\n")
    (tmp_path / "classes.csv").write_text(rows)
    with pytest.raises(InputError, match="such as '31'"):
        find_competition(tmp_path)


def test_the_same_number_in_each_row_of_the_sample_submission_says_nothing_of_folders_with_numbers(tmp_path):
    for name in ("3", "11", "40"):
        photo(tmp_path / "train" / name / "a.png", int(name))
    (tmp_path / "sample_submission.csv").write_text("id,label\nx,0\ny,0\n")
    assert read_competition(tmp_path).classes == ["3", "11", "40"]
    (tmp_path / "sample_submission.csv").write_text("id,label\nx,0\ny,1\n")
    with pytest.raises(InputError, match="such as '0', '1'"):
        find_competition(tmp_path)


def test_a_sample_submission_that_names_some_of_the_folders_is_answered_by_their_names(tmp_path):
    layouts.class_folders(tmp_path)
    for answers in ("apple 0,apple\napple 1,leek\n", "apple 0,\napple 1,\n"):
        (tmp_path / "sample_submission.csv").write_text(f"id,label\n{answers}")
        assert read_competition(tmp_path).classes == ["apple", "bell pepper", "carrot"]


def test_folders_within_those_of_train_are_no_classes_where_the_sample_submission_names_no_folder(tmp_path):
    for kind in ("images", "masks"):
        for name in ("apple", "leek"):
            photo(tmp_path / "train" / kind / name / "0.png", 1)
            photo(tmp_path / "test" / kind / f"{name}.png", 1)
    (tmp_path / "sample_submission.csv").write_text("id,label\napple,apple\nleek,apple\n")
    with pytest.raises(InputError, match="has no training table"):
        read_competition(tmp_path)


def test_the_folders_that_the_sample_submission_names_are_observations(tmp_path):
    for seed, name in enumerate(("apple", "leek", "carrot")):
        for number in range(2):
            for index in range(2):
                photo(tmp_path / "train" / name / f"t{number}" / f"{index}.png", seed)
                photo(tmp_path / "test" / f"{seed}{number}" / f"{index}.png", seed)
    (tmp_path / "sample_submission.csv").write_text(
        "id,label\n00,apple\n01,apple\n10,apple\n11,leek\n20,leek\n21,leek\n"
    )
    assert ids_of(tmp_path) == ["00", "01", "10", "11", "20", "21"]
    assert all(len(one.photos) == 2 for one in find_test_table(tmp_path).observations)
    labelled = read_competition(tmp_path)
    assert labelled.ids[:2] == ["train/apple/t0", "train/apple/t1"]
    assert (len(labelled), len(labelled.photos)) == (6, 12)
    originals = repeat_observations(tmp_path, 2)
    assert (set(originals), len(originals)) == (set(ids_of(tmp_path)), 12)


@pytest.mark.parametrize("sample", ["sampleSubmission.csv", "sample_submission_stg1.csv", "submission_format.csv"])
@pytest.mark.parametrize(
    "folders",
    [("Train", "Test"), ("train_images", "test_stg1"), ("train/train", "test/test"), ("train", "Test Images/0")],
)
def test_folders_of_splits_and_the_sample_submission_may_have_other_usual_names(tmp_path, folders, sample):
    for seed, name in enumerate(("ALB", "BET")):
        photo(tmp_path / folders[0] / name / f"a{seed}.jpg", seed)
        photo(tmp_path / folders[1] / f"b{seed}.jpg", seed)
    (tmp_path / sample).write_text("image,ALB,BET\nb0.jpg,0.5,0.5\nb1.jpg,0.5,0.5\n")
    labelled, found = read_competition(tmp_path), find_competition(tmp_path)
    assert (labelled.classes, found.competition.form.classes) == (["ALB", "BET"], ("ALB", "BET"))
    trained = competition_of(
        CompetitionSpec(
            name="class-folders", resolution="300p", time_limit=1, settings=to_json(found.competition.settings)
        )
    )
    stage_competition(tmp_path, tmp_path / "staged")
    table = find_test_table(tmp_path / "staged", "class-folders", settings=trained.settings)
    assert [one.id for one in table.observations] == ["b0.jpg", "b1.jpg"]
    assert all(path.is_file() for one in table.observations for path in one.photos)


def test_one_probability_in_a_row_needs_a_table(tmp_path):
    layouts.class_folders(tmp_path)
    (tmp_path / "sample_submission.csv").write_text("id,label\napple 0,0.5\napple 1,0.5\n")
    with pytest.raises(InputError, match=r"one number in a row, such as '0\.5': list the photos .* in a train\.csv"):
        find_competition(tmp_path)


def test_a_class_that_is_named_like_a_split_and_more_is_a_class(tmp_path):
    for seed, name in enumerate(("steam train", "test tube", "tram")):
        photo(tmp_path / name / "0.jpg", seed)
    assert read_competition(tmp_path).classes == ["steam train", "test tube", "tram"]


@pytest.mark.parametrize("name", ["train", "test1"])
def test_a_class_in_train_may_be_named_like_a_split_and_elsewhere_the_name_is_reserved(tmp_path, name):
    for seed, own in enumerate((name, "tram")):
        photo(tmp_path / "inside" / "train" / own / "0.jpg", seed)
        photo(tmp_path / "beside" / own / "0.jpg", seed)
    assert read_competition(tmp_path / "inside").classes == [name, "tram"]
    (tmp_path / "beside" / "test").mkdir()
    with pytest.raises(InputError, match="names of splits, such as train or test1, are reserved"):
        read_competition(tmp_path / "beside")


def test_a_sample_submission_with_other_than_ids_in_its_first_column_is_refused(tmp_path):
    layouts.class_folders(tmp_path)
    (tmp_path / "sample_submission.csv").write_text("label,id\napple,apple 0\napple,apple 1\n")
    with pytest.raises(InputError, match="lists 'apple' more than once: expected the ids of test photos in its first"):
        find_competition(tmp_path)


@pytest.mark.parametrize(("name", "lost"), [("img_{}.png", 20), ("{}.png", 8)])
def test_ids_of_the_sample_submission_without_a_photo_are_named_where_one_trains_and_not_in_a_kernel(
    tmp_path, name, lost, capsys
):
    layouts.class_folders(tmp_path)
    shutil.rmtree(tmp_path / "test")
    rows = [f"{name.format(number)},apple\n" for number in range(20)]
    (tmp_path / "sample_submission.csv").write_text("file,species\n" + "".join(rows))
    read_competition(tmp_path)  # the test photos may be on Kaggle alone
    write_test(tmp_path, *(f"{number}.png" for number in range(12)))
    problem = f"sample_submission.csv: {lost} of 20 ids have no photo in "
    with pytest.raises(InputError, match=problem) if lost == 20 else nullcontext():
        read_competition(tmp_path)
    assert (problem in capsys.readouterr().out) == (lost < 20)
    assert len(ids_of(tmp_path)) == 12


@pytest.mark.parametrize("names", [("a/manifest.json", "a/bank-of-1.safetensors", "0.png"), (".embeddings/a", "0.png")])
def test_runs_beside_the_folders_of_classes_are_no_class(tmp_path, names):
    for seed, name in enumerate(("elm", "oak")):
        photo(tmp_path / name / "0.png", seed)
    for name in names:
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(path, 2) if path.suffix == ".png" else path.touch()
    assert read_competition(tmp_path).classes == ["elm", "oak"]
    for name in ("manifest.json", "bank.safetensors"):
        (tmp_path / "runs" / name).touch()
    assert read_competition(tmp_path).classes == ["elm", "oak"]


def test_a_class_with_a_manifest_of_its_own_is_a_class(tmp_path):
    for name in ("elm", "oak"):
        photo(tmp_path / name / "0.png")
        (tmp_path / name / "manifest.json").touch()
    assert read_competition(tmp_path).classes == ["elm", "oak"]


def test_an_answer_may_be_a_class_that_is_named_none(tmp_path):
    for number, name in enumerate(("elm", "none")):
        photo(tmp_path / "train" / name / "0.png", number)
    write_test(tmp_path, "0.png", "1.png")
    (tmp_path / "sample_submission.csv").write_text("file,species\n0.png,nan\n1.png,elm\n")
    competition = find_competition(tmp_path).competition
    assert competition.read_sample(tmp_path) == [("1.png", {"elm": 1.0})]
    (tmp_path / "submission.csv").write_text("file,species\n0.png,none\n1.png,\n")
    assert [[*answer] for _, answer in competition.read_submission(tmp_path / "submission.csv")] == [["none"]]


def test_a_test_folder_without_photos_and_one_that_is_missing_are_refused_by_name(tmp_path):
    for number, name in enumerate(("elm", "oak")):
        photo(tmp_path / "train" / name / "0.png", number)
        (tmp_path / "test" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"test has no test photo: put the test set there"):
        read_test(find_competition(tmp_path))
    (tmp_path / "test" / "elm" / "0.txt").touch()
    with pytest.raises(
        InputError, match=r"test has no test photo \(left out: \.txt files: 1\): put the test set there"
    ):
        read_test(find_competition(tmp_path))
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(InputError, match=r"test does not exist: put the test set there"):
        read_test(find_competition(tmp_path))


def test_folders_of_photos_beside_one_named_train_are_said_not_to_be_read(tmp_path):
    """Where a class is named "train", its subfolders would be all classes."""
    layouts.class_folders(tmp_path)
    assert not find_competition(tmp_path).competition.notes
    for name in ("tram", "bus"):
        photo(tmp_path / name / "0.png")
    [said] = find_competition(tmp_path).competition.notes
    assert said == (
        f"{tmp_path}: 'bus', 'tram' beside train/ are not read, since the folders in train/ are the classes; "
        "if train/ is a class itself, rename it"
    )


@pytest.mark.parametrize("name", ["train", "val", "Test"])
def test_a_class_named_like_a_split_among_others_is_refused_with_the_reason(tmp_path, name):
    for own in ("tram", "bus", name):
        photo(tmp_path / own / "0.png")
    with pytest.raises(InputError, match="CLASS/photo, where no class is named like a split"):
        find_competition(tmp_path)

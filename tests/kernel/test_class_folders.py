"""In class folders the photos are the test set, and their ids are names of files."""

from pathlib import Path

import pytest
from PIL import Image, ImageFile

from kernel.competitions import competition_of
from kernel.competitions.class_folders import PHOTO_SUFFIXES
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec, to_json
from kernel.observations import find_test_table
from local.data.folder import find_competition
from local.rehearsal.variations import keep_observations, repeat_observations
from tests import layouts


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

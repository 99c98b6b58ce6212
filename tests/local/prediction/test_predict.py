"""Photos of one's own are predicted as the kernel predicts them.

python -m pytest tests/local/prediction/test_predict.py
"""

import csv
import os
from pathlib import Path

import pytest

from bundle import bundle
from kernel.inputs import InputError
from kernel.observations import find_test_table
from local.data.competition import read_competition
from local.predict import describe, group_photos, predict, split_paths
from local.prediction.model import Model
from local.recipes.recipe import make_recipe
from local.training.run import train_run
from tests.conftest import TINY, command, photo


@pytest.fixture(scope="module")
def photos(drawn, tmp_path_factory) -> Path:
    """The photos of the test set, a folder for each observation."""
    folder = tmp_path_factory.mktemp("own")
    for observation in find_test_table(drawn.competition, "fungiclef", "300p").observations:
        (folder / observation.id).mkdir()
        for number, path in enumerate(observation.photos):
            (folder / observation.id / f"{number}{path.suffix}").symlink_to(path.absolute())
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def classes(rows: list[dict[str, str]], count: int) -> dict[str, list[str]]:
    return {Path(row["observation"]).name: [row[f"class_{rank}"] for rank in range(1, count + 1)] for row in rows}


def kernel_predictions(drawn, folder) -> dict[str, list[str]]:
    """What the script of the bundle in `folder` predicts for the drawn competition."""
    (folder / "input").mkdir()
    (folder / "input" / "fungi").symlink_to(drawn.competition)
    (folder / "input" / "weights").symlink_to(folder / "build" / "weights")
    done = command(folder / "build" / "kernel.py", "--input", folder / "input", "--working", folder / "working")
    assert done.returncode == 0, done.stderr
    return {row["observationId"]: row["predictions"].split() for row in table(folder / "working/submission.csv")}


def test_a_run_a_bundle_and_the_kernel_give_the_same_classes_in_the_same_order(trained, drawn, photos, tmp_path):
    predict([trained, photos], 10, tmp_path / "run.csv", None, together=False)
    bundle([trained], tmp_path / "build")
    predict([tmp_path / "build", photos], 10, tmp_path / "build.csv", None, together=False)
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "build.csv").read_bytes()
    kernel = kernel_predictions(drawn, tmp_path)
    assert classes(table(tmp_path / "run.csv"), 10) == kernel


@pytest.mark.parametrize("transduction", [0.0, 1.0])
def test_the_test_set_of_a_competition_is_predicted_by_its_ids_with_its_metadata(
    drawn, photos, tmp_path, monkeypatch, transduction
):
    settings = {**TINY, "epochs": 0, "transduction": transduction, "metadata_weight": 0.5}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "run")
    monkeypatch.setattr("local.prediction.model.CHUNK", 7)
    predict([tmp_path / "run"], 10, tmp_path / "test.csv", None, together=False, data=drawn.competition)
    bundle([tmp_path / "run"], tmp_path / "build")
    kernel = kernel_predictions(drawn, tmp_path)
    rows = table(tmp_path / "test.csv")
    assert [row["observation"] for row in rows] == list(kernel)
    assert classes(rows, 10) == kernel
    predict([tmp_path / "run", photos], 10, tmp_path / "photos.csv", None, together=False)
    assert classes(table(tmp_path / "photos.csv"), 10) != kernel  # metadata matter
    for row in rows:
        probabilities = [float(row[f"probability_{rank}"]) for rank in range(1, 11)]
        assert probabilities == sorted(probabilities, reverse=True)


def test_classes_have_names_and_probabilities_and_the_first_a_reference_photo(trained, drawn, photos, tmp_path):
    predict([trained, photos], 12, tmp_path / "run.csv", None, together=False)
    labelled = read_competition(drawn.competition)
    class_of = {
        str(path.absolute()): class_id
        for observation, class_id in zip(labelled.observations, labelled.class_ids, strict=True)
        for path in observation.photos
    }
    for row in table(tmp_path / "run.csv"):
        probabilities = [float(row[f"probability_{rank}"]) for rank in range(1, 13)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)  # of all twelve classes
        assert row["name_1"] == labelled.species[row["class_1"]]
        assert class_of[row["reference"]] == row["class_1"]


def test_with_transduction_the_observations_are_predicted_at_once(drawn, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("local.prediction.model.CHUNK", 3)
    settings = {**TINY, "epochs": 0, "transduction": 1.0}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "run")
    model, observations = Model(split_paths([tmp_path / "run", photos])[0]), group_photos([photos], False)
    *nothing, last = model.predict(observations, 3)
    assert (nothing, [one.observation for one in last]) == ([[]] * len(nothing), observations)


def test_a_long_list_is_predicted_in_parts_that_change_nothing(trained, photos, tmp_path, monkeypatch):
    predict([trained, photos], 5, tmp_path / "whole.csv", None, together=False)
    monkeypatch.setattr("local.prediction.model.CHUNK", 3)
    predict([trained, photos], 5, tmp_path / "parts.csv", None, together=False)
    whole, parts = table(tmp_path / "whole.csv"), table(tmp_path / "parts.csv")
    assert classes(whole, 5) == classes(parts, 5)


def test_an_unreadable_photo_is_named_and_costs_only_itself(trained, tmp_path):
    good, bad = photo(tmp_path / "photos" / "good.png"), tmp_path / "photos" / "bad.jpg"
    bad.write_bytes(b"no photo")
    model = Model(split_paths([trained, good])[0])
    [failed, alone] = next(model.predict(group_photos([good.parent], False), 2))
    [together] = next(model.predict(group_photos([good.parent], True), 2))
    assert (len(alone.guesses), failed.guesses, failed.reference) == (2, [], None)
    assert describe(failed).startswith(f"{bad}: no photo can be read; unreadable: bad.jpg (")
    assert [one.class_id for one in together.guesses] == [one.class_id for one in alone.guesses]
    assert "(2 photos)" in describe(together)


def test_photos_of_a_sub_folder_are_one_observation(tmp_path):
    one, two, three = (photo(tmp_path / name) for name in ("a.png", "sub/b.png", "sub/c.png"))
    (tmp_path / "sub" / "notes.txt").touch()
    groups = {observation.id: observation.photos for observation in group_photos([tmp_path], False)}
    assert groups == {str(one): (one,), str(tmp_path / "sub"): (two, three)}
    assert [len(group.photos) for group in group_photos([tmp_path], True)] == [3]
    assert [group.photos for group in group_photos([two, three], False)] == [(two,), (three,)]


def test_the_page_shows_every_observation_and_needs_no_network(trained, tmp_path):
    photo(tmp_path / "photos" / "a&b.png")
    predict([trained, tmp_path / "photos"], 3, None, tmp_path / "page.html", together=False)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a&amp;b.png" in html
    assert html.count('src="data:image/webp') == html.count("src=") == 2


def test_a_photo_whose_name_is_not_utf_8_is_predicted_into_the_table_and_the_page(trained, tmp_path):
    odd = tmp_path / "photos" / os.fsdecode(b"\xe9t.png")
    photo(tmp_path / "photos" / "a.png").rename(odd)
    predict([trained, odd.parent], 3, tmp_path / "all.csv", tmp_path / "page.html", together=False)
    [row] = table(tmp_path / "all.csv")
    assert row["observation"].endswith(r"photos/\udce9t.png")
    assert row["class_1"]
    assert r"\udce9t.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["absent"], "absent does not exist"),
        (["photos"], "is a run or a bundle"),
        (["run"], "no photo is given"),
        (["run", "empty"], "no photo in"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, paths, says):
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "empty").mkdir()
    photo(tmp_path / "photos" / "a.png")
    with pytest.raises(InputError, match=says):
        predict([tmp_path / path for path in paths], 5, None, None, together=False)


def test_photos_and_a_test_set_are_not_predicted_together(trained, drawn, tmp_path):
    paths = [trained, photo(tmp_path / "a.png")]
    with pytest.raises(InputError, match=r"a.png is not a run or a bundle: .* not both"):
        predict(paths, 5, None, None, together=False, data=drawn.competition)

"""What every competition must support. A new one adds its smallest folder to SMALLEST, and passes these.

python -m pytest tests/kernel/test_competitions.py
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel import observations
from kernel.competitions import COMPETITIONS, MODULES, competition_named, module_of
from kernel.competitions.competition import Competition
from kernel.inputs import InputError
from kernel.manifest import MANIFEST, CompetitionSpec, write_manifest
from kernel.observations import TestTable, recognise
from kernel.submission import check_submission, fallback_answer, write_submission
from local.bundling.flatten import flatten
from local.bundling.record import BundleDigests, RehearsalRecord
from local.data.competition import read_competition
from local.data.folder import find_competition
from local.publishing.ledger import make_submission
from local.publishing.preflight import Bundle
from local.rehearsal.staging import stage_competition
from local.rehearsal.variations import keep_observations, keep_one_row, remove_photos, repeat_observations, spoil_photos
from tests import layouts, manifests
from tests.conftest import ROOT
from tests.layouts import SMALLEST

# As the competitions' pages have them: Kaggle's name, header, guesses, metric, hours, sizes of the leaderboard's parts.
FUNGI = ("observationId", "predictions"), 10
PLANTS = ("Id", "Predicted"), 1
RULES = {
    "fungiclef": ("fungi-clef-2025", *FUNGI, "recall_at_5", 12, {"public": 226, "private": 773}),
    "fungitastic": ("", *FUNGI, "recall_at_1", 9, {}),
    "fungitastic-mini": ("", *FUNGI, "recall_at_1", 9, {}),
    "fungitastic-fewshot": ("", *FUNGI, "recall_at_1", 9, {}),
    "herbarium": ("herbarium-2020-fgvc7", *PLANTS, "macro_f1", 9, {}),
    "herbarium-2021": ("herbarium-2021-fgvc8", *PLANTS, "macro_f1", 9, {}),
    "herbarium-2022": ("herbarium-2022-fgvc9", *PLANTS, "macro_f1", 9, {}),
    "plantclef": ("plantclef-2025", ("quadrat_id", "species_ids"), 20, "sample_f1", 9, {}),
    "table": ("", ("specimen", "label"), 1, "recall_at_1", 9, {}),
    "class-folders": ("", ("image_name", "pred_label"), 1, "recall_at_1", 9, {}),
}


@pytest.fixture(params=COMPETITIONS, ids=lambda competition: competition.name)
def competition(request) -> Competition:
    return request.param


@pytest.fixture
def folder(competition, tmp_path) -> Path:
    """The competition as downloaded."""
    assert competition.name in SMALLEST, f"add a small folder of {competition.name} to SMALLEST of tests/layouts.py"
    SMALLEST[competition.name](tmp_path / "competition")
    return tmp_path / "competition"


@pytest.fixture
def staged(folder, tmp_path) -> Path:
    """The competition as the rehearsal lays it out."""
    stage_competition(folder, tmp_path / "staged")
    return tmp_path / "staged"


@pytest.fixture
def own(folder) -> Competition:
    """The competition with the settings that were found in its folder."""
    return find_competition(folder).competition


def find_test_table(folder: Path, own: Competition | None = None) -> TestTable:
    """The test set in a folder, by the settings of a competition, or those that are found in the folder."""
    own = own or find_competition(folder).competition
    return observations.find_test_table(folder, own.name, settings=own.settings)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_rules_are_those_of_the_competitions_page(competition, folder):
    slug, header, guesses, metric, hours, boards = RULES[competition.name]
    competition = recognise(folder).competition
    assert (competition.slug, competition.header, competition.guesses) == (slug, header, guesses)
    assert (competition.metric, competition.time_limit) == (metric, hours * 3600)
    assert competition.boards(17) == {"whole test": 17}
    if boards:
        assert competition.boards(sum(boards.values())) == boards


def test_a_competition_is_found_by_its_name(competition):
    assert competition_named(competition.name) is competition
    assert [module.__name__ for module in MODULES if competition in module.COMPETITIONS] == [
        f"kernel.competitions.{module_of(competition)}"
    ]


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match="unknown competition 'mushrooms': expected fungiclef, "):
        competition_named("mushrooms")


def test_a_folder_is_recognised_as_its_own_competition(competition, folder):
    assert recognise(folder).competition.name == competition.name
    for module in MODULES:
        if competition not in module.COMPETITIONS:
            assert recognise(folder, module.COMPETITIONS) is None


def test_every_training_photo_has_a_class_and_no_test_observation_was_trained_on(folder):
    training = read_competition(folder)
    assert all(path.is_file() for path in training.photos)
    classes = training.in_splits("train").class_ids
    assert len(set(classes)) == 3
    assert all(isinstance(class_id, str) and class_id for class_id in classes)
    tested = {path for observation in find_test_table(folder).observations for path in observation.photos}
    assert not tested & set(training.photos)


def test_every_test_observation_is_there_once_with_its_photos(folder):
    observations = find_test_table(folder).observations
    assert len({observation.id for observation in observations}) == len(observations) == 12
    assert all(observation.photos for observation in observations)
    assert all(path.is_file() for observation in observations for path in observation.photos)


def test_a_submission_has_the_form_and_the_order_of_the_sample(competition, folder, tmp_path):
    table, classes = find_test_table(folder), sorted(set(read_competition(folder).class_ids))
    answer = fallback_answer(table, manifests.manifest(class_ids=classes, fallback_classes=classes))
    write_submission(tmp_path / "submission.csv", table, [answer] * len(table.observations))
    check_submission(tmp_path / "submission.csv", table, classes)
    written = rows_of(tmp_path / "submission.csv")
    competition = table.competition
    assert tuple(written[0]) == competition.header
    form = competition.form
    expected = "[12]" if form.is_set else " ".join(classes[: competition.guesses])
    assert {cell for _, cell in written[1:]} == {expected}
    assert competition.read_submission(tmp_path / "submission.csv") == [
        (observation.id, answer) for observation in table.observations
    ]
    for sample in folder.glob(competition.sample):
        expected = rows_of(sample)
        assert written[0] == expected[0]
        assert [row[0] for row in written] == [row[0] for row in expected]
        assert form.write(fallback_answer(table)) == [expected[1][1]]


def test_the_rehearsal_sees_the_same_test_set_and_no_training_photo(folder, staged, own):
    before, after = (find_test_table(root, own).observations for root in (folder, staged))
    assert [(one.id, len(one.photos)) for one in after] == [(one.id, len(one.photos)) for one in before]
    assert all(path.is_file() for observation in after for path in observation.photos)
    trained_on = {path.relative_to(folder) for path in read_competition(folder).photos}
    assert not {path.relative_to(staged) for path in staged.rglob("*")} & trained_on


def test_the_rehearsal_sees_no_label_of_the_test(staged):
    for path in staged.rglob("*-Test.csv"):
        assert path.read_text(encoding="utf-8").splitlines()[0] == "observationID,filename,habitat"
    assert not list(staged.rglob("solution.csv"))


@pytest.mark.parametrize("of", ["photo", "folder"])
def test_links_are_learnt_from_and_rehearsed_as_what_they_lead_to(competition, folder, own, tmp_path, of):
    """Relative ones, as `ln -sr` makes them: from where the rehearsal puts them they would lead nowhere."""
    tested = [path for one in find_test_table(folder).observations for path in one.photos]
    content = sorted(path.read_bytes() for path in tested)
    photos = [*tested, *read_competition(folder).photos]
    for number, path in enumerate(photos if of == "photo" else sorted({path.parent for path in photos})):
        store = tmp_path / "store" / f"{number}{path.suffix}"
        store.parent.mkdir(exist_ok=True)
        if path.name != "test" or not competition.has_table:  # a folder that holds the table as well stays
            path.rename(store)
            path.symlink_to(os.path.relpath(store, path.parent))
    stage_competition(folder, tmp_path / "staged")
    staged = [path for one in find_test_table(tmp_path / "staged", own).observations for path in one.photos]
    assert sorted(path.read_bytes() for path in staged) == content
    assert all(path.is_file() for path in read_competition(folder).photos)


def test_a_test_set_is_made_smaller_and_larger_without_writing_into_the_users_files(folder, staged, own):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = find_test_table(staged, own).observations
    kept = {observation.id for observation in whole[1:7]}
    keep_observations(staged, kept, own)
    fewer = find_test_table(staged, own).observations
    assert [observation.id for observation in fewer] == [observation.id for observation in whole[1:7]]
    assert not any(path.exists() for observation in whole[:1] + whole[7:] for path in observation.photos)

    originals = repeat_observations(staged, 3, own)
    repeated = {observation.id: observation for observation in find_test_table(staged, own).observations}
    assert set(repeated) == set(originals)
    assert (len(repeated), set(originals.values())) == (18, kept)
    photos = [path for observation in repeated.values() for path in observation.photos]
    assert len(set(photos)) == len(photos) == 3 * sum(len(observation.photos) for observation in fewer)
    for observation in repeated.values():
        for path, original in zip(observation.photos, repeated[originals[observation.id]].photos, strict=True):
            assert path.read_bytes() == original.read_bytes() != b""

    counts = spoil_photos(find_test_table(staged, own), seed=0)
    assert sum(counts.values()) >= 3
    assert ("missing" in counts) == find_test_table(staged, own).competition.has_table
    if find_test_table(staged, own).competition.has_table:
        gone = remove_photos(find_test_table(staged, own), seed=1)
        missing = {o.id for o in find_test_table(staged, own).observations if not any(p.exists() for p in o.photos)}
        assert gone <= missing
    keep_one_row(staged, own)
    (row,) = find_test_table(staged, own).observations
    assert len(row.photos) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_submission_is_recorded_by_the_metric_of_its_competition(competition, folder, monkeypatch):
    monkeypatch.setattr(Bundle, "commit", "c")
    values = {"recall_at_1": 0.1, "recall_at_5": 0.5, "recall_at_10": 0.7, "macro_f1": 0.3, "sample_f1": 0.4}
    manifest = manifests.manifest(members=(manifests.member(name="run", validation=values),))
    metadata, record = {"competition_sources": ["a-competition"]}, RehearsalRecord(BundleDigests("k", "m"))
    row = make_submission(Bundle(Path(), metadata, manifest, find_test_table(folder), record), 1)
    assert (row.metric, row.local) == (competition.metric, f"{values[competition.metric]:.4f}")
    assert row.observations == "12"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """The kernel as one script, by the module of competitions that it holds."""
    paths = {}
    for module in MODULES:
        name = module.__name__.rpartition(".")[2]
        paths[name] = tmp_path_factory.mktemp("build") / f"{name}.py"
        paths[name].write_text(flatten(ROOT / "kernel", chosen={"competitions": name}), encoding="utf-8")
    return paths


def run_without_torch(script: Path, inputs: Path, working: Path, trained_on: str) -> subprocess.CompletedProcess:
    """Run a script with the standard library alone (-S), which is enough for the fallback submission."""
    spec = CompetitionSpec(name=trained_on, resolution="300p", time_limit=60)
    (inputs / "weights").mkdir(exist_ok=True)
    manifest = manifests.manifest(competition=spec, class_ids=("7", "12"), fallback_classes=("12", "7"))
    write_manifest(manifest, inputs / "weights" / MANIFEST)
    command = [sys.executable, "-I", "-S", str(script), "--input", str(inputs), "--working", str(working)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_of_a_competition_reads_it_and_no_script_of_another_does(competition, folder, scripts, tmp_path):
    own = module_of(competition)
    ended = run_without_torch(scripts[own], tmp_path, tmp_path / "working", competition.name)
    assert "ModuleNotFoundError" in ended.stderr  # torch, once the fallback is on disk
    written = rows_of(tmp_path / "working" / "submission.csv")
    expected = "[12]" if competition.form.is_set else "12 7" if competition.guesses > 1 else "12"
    assert written[1:] == [[observation.id, expected] for observation in find_test_table(folder).observations]
    for module in MODULES:
        other = module.__name__.rpartition(".")[2]
        if other != own:
            ended = run_without_torch(scripts[other], tmp_path, tmp_path / other, module.COMPETITIONS[0].name)
            assert ended.returncode == 2
            assert ended.stderr.startswith("error: no competition under")


def test_a_test_set_is_made_smaller_by_ids_as_the_sample_submission_spells_them(tmp_path):
    SMALLEST["fungiclef"](tmp_path)
    sample = next(tmp_path.glob("*SAMPLE_SUBMISSION.csv"))
    header, *rows = rows_of(sample)
    sample.write_text("".join(f"{row}\n" for row in [",".join(header), *(f"0{id},{cell}" for id, cell in rows)]))
    ids = [observation.id for observation in find_test_table(tmp_path).observations]
    assert ids == [f"0{row[0]}" for row in rows]
    keep_observations(tmp_path, ids[2:5])
    assert [observation.id for observation in find_test_table(tmp_path).observations] == ids[2:5]


@pytest.mark.parametrize("year", [2020, 2022])
def test_a_larger_herbarium_has_ids_of_the_type_that_it_had(tmp_path, year):
    layouts.herbarium(tmp_path, year)
    repeat_observations(tmp_path, 2)
    (table,) = (path for path in tmp_path.rglob("*metadata.json") if "test" in path.relative_to(tmp_path).as_posix())
    content = json.loads(table.read_text())
    assert isinstance(content, list) == (year == 2022)
    images = content if year == 2022 else content["images"]
    assert len(images) == 24
    assert {type(image["image_id" if year == 2022 else "id"]) for image in images} == {int}


def test_the_smallest_resolution_is_the_first_that_is_not_enlarged() -> None:
    fungi = competition_named("fungiclef")
    sides = {224: "300p", 300: "300p", 301: "500p", 720: "720p", 721: "fullsize"}
    assert {side: fungi.smallest_resolution(side) for side in sides} == sides
    assert competition_named("class-folders").smallest_resolution(9999) == "300p"  # it ships the photos in one size

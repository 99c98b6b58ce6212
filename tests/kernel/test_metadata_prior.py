"""The metadata prior: each value adds its log-likelihood, and a value that cannot be read is ignored."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kernel.competitions.fungi import METADATA
from kernel.inputs import sha256
from kernel.manifest import Weights
from kernel.metadata_prior import FEATURES, MetadataPrior, WeightedPrior, feature_value, weighted_prior
from kernel.observations import Observation, find_test_table
from tests.manifests import manifest

SUBSTRATES = json.dumps({"substrate": ["oak", "sand"]})
OAK, SAND = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 0.0])
JUNE = {"month": "6.0", "day": "21.0"}
GOOD = JUNE | {
    "year": "2023.0", "latitude": "55.95", "longitude": "11.72", "elevation": "12.0", "landcover": "17.0",
    "countryCode": "DK", "district": "Gribskov", "biogeographicalRegion": "continental",
    "habitat": "Deciduous woodland", "substrate": "soil", "metaSubstrate": "jord",
}  # fmt: skip


def queries(*metadata: dict) -> list[Observation]:
    return [Observation(str(number), (), values) for number, values in enumerate(metadata)]


@pytest.fixture
def prior() -> MetadataPrior:
    """Three classes, which differ in substrate and habitat."""
    tables = {"substrate": torch.stack([OAK, SAND]), "habitat": torch.tensor([[0.0, 0.0, 5.0]])}
    classes = torch.tensor([0.5, 0.3, 0.2]).log()
    return MetadataPrior(classes, {"substrate": ["oak", "sand"], "habitat": ["bog"]}, tables)


def test_log_likelihoods_of_the_features_add_up(prior):
    found = prior.log_probabilities(queries({"substrate": "sand", "habitat": "bog"}, {"substrate": "oak"}))
    expected = torch.stack([prior.classes + SAND + prior.tables["habitat"][0], prior.classes + OAK]).log_softmax(1)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)
    assert torch.allclose(found.exp().sum(1), torch.ones(2))


def test_spelling_and_floats_do_not_hide_a_value(prior):
    assert torch.equal(prior.log_likelihoods(queries({"substrate": " Oak "}))[0], OAK)
    assert feature_value("landcover", {"landcover": "17.0"}) == feature_value("landcover", {"landcover": "17"}) == "17"
    assert feature_value("season", JUNE) == feature_value("season", {"month": " 6", "day": "21"}) == "17"


@pytest.mark.parametrize("cell", ["", " ", "None", "NaN", "N/A", "Unknown", " unidentified ", "?", "-", "<NA>"])
def test_a_cell_that_says_unknown_has_no_value(cell):
    assert feature_value("habitat", {"habitat": cell}) is None


def test_a_table_without_the_columns_switches_the_prior_off(prior):
    nothing = queries({}, {}, {"district": "Gribskov"})
    assert prior.log_probabilities(nothing) is None
    assert not prior.log_likelihoods(nothing).any()
    assert prior.log_probabilities([]) is None


def test_an_observation_without_a_known_value_gets_the_prior_of_the_classes(prior):
    found = prior.log_probabilities(queries({"substrate": "oak"}, {}, {"substrate": "glass", "habitat": ""}))
    assert torch.allclose(found[1:], prior.classes.expand(2, -1))


def test_an_ensemble_adds_the_weighted_priors_of_its_members(prior, tmp_path):
    save_file({"classes": prior.classes, **prior.tables}, tmp_path / "p", {"values": json.dumps(prior.values)})
    files = {"p": sha256(tmp_path / "p")}
    one = manifest().members[0]
    members = [replace(one, weight=0.75, metadata_prior="p", metadata_prior_weight=0.5), replace(one, weight=0.25)]
    weights = Weights(tmp_path, replace(manifest(), members=tuple(members), files=files))
    found = queries({"substrate": "sand"}, {})
    expected = 0.75 * 0.5 * prior.log_probabilities(found)
    assert torch.allclose(weighted_prior(weights, members, found)[:], expected)
    assert weighted_prior(weights, members[1:], found) is None
    assert weighted_prior(weights, members, queries({})) is None


def test_a_slice_of_the_weighted_prior_holds_the_rows_of_its_observations(prior):
    found = queries(*[{"substrate": "sand"}, {}, {"habitat": "bog"}, {"substrate": "oak", "habitat": "bog"}] * 5)
    weighted = WeightedPrior(((0.3, prior, prior.rows(found)), (0.5, prior, prior.rows(found[::-1]))))
    expected = 0.3 * prior.log_probabilities(found) + 0.5 * prior.log_probabilities(found[::-1])
    assert torch.allclose(torch.cat([weighted[first : first + 3] for first in range(0, 20, 3)]), expected)


def test_tables_for_other_classes_leave_the_predictions_to_the_photos(prior, tmp_path, capsys):
    save_file({"classes": prior.classes, "substrate": torch.zeros(2, 7)}, tmp_path / "p", {"values": SUBSTRATES})
    member = replace(manifest().members[0], metadata_prior="p", metadata_prior_weight=0.5)
    weights = Weights(tmp_path, replace(manifest(), files={"p": sha256(tmp_path / "p")}))
    assert weighted_prior(weights, [member], queries({}, {"substrate": "sand"})) is None
    assert "predicting without metadata: " in capsys.readouterr().out


def test_a_prior_that_cannot_be_read_leaves_the_predictions_to_the_photos(prior, tmp_path, capsys):
    values = {"weather": ["rain"]}
    tables = {"classes": prior.classes, "weather": torch.zeros(1, 3)}
    save_file(tables, tmp_path / "p", {"values": json.dumps(values)})
    member = replace(manifest().members[0], metadata_prior="p", metadata_prior_weight=0.5)
    weights = Weights(tmp_path, replace(manifest(), files={"p": sha256(tmp_path / "p")}))
    assert weighted_prior(weights, [member], queries({"weather": "rain"})) is None
    assert "predicting without metadata: " in capsys.readouterr().out


def test_every_feature_reads_a_good_row():
    assert all(feature_value(feature, GOOD) is not None for feature in FEATURES)


HOSTILE = ["", " ", "nan", "NaN", "inf", "-1e400", "13", "0", "6.5", "-3", "1e9", "x", "\x00", "6" * 5000, "٣", None, 7]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_a_hostile_value_costs_no_more_than_its_own_feature(value):
    for column in METADATA:
        hostile = GOOD | {column: value}
        silent = {feature for feature in FEATURES if feature_value(feature, hostile) is None}
        assert len(silent) <= 1
        assert all(isinstance(feature_value(feature, hostile), str) for feature in FEATURES if feature not in silent)


@pytest.mark.parametrize("month", ["0", "13.0", "6.5", "-1", "inf", "June"])
def test_an_invalid_month_has_no_season(month):
    assert feature_value("season", JUNE | {"month": month}) is None


@pytest.mark.parametrize("day", ["0", "32", "nan", "", "x"])
def test_an_invalid_day_counts_as_the_middle_of_the_month(day):
    assert feature_value("season", JUNE | {"day": day}) == feature_value("season", {"month": "6", "day": "15"})


def test_coordinates_off_the_globe_have_no_location():
    for wrong in ({"latitude": "91"}, {"longitude": "-181"}, {"latitude": ""}, {"longitude": "1e400"}):
        assert feature_value("location", GOOD | wrong) is None
    assert feature_value("location", GOOD) == feature_value("location", GOOD | {"latitude": "55.951"})


def test_the_metadata_of_an_observation_are_the_first_that_are_not_blank(tmp_path):
    folder = tmp_path / "fungi" / "metadata" / "FungiTastic-FewShot"
    folder.mkdir(parents=True)
    with (folder / "FungiTastic-FewShot-Test.csv").open("w", newline="") as file:
        rows = [["0.JPG", "7", "", "6.0"], ["1.JPG", "7", "soil", "7.0"], ["2.JPG", "8"], ["3.JPG", "7", "wood", ""]]
        csv.writer(file).writerows([["filename", "observationID", "substrate", "month"], *rows])
    observations = find_test_table(tmp_path).observations
    assert [observation.metadata for observation in observations] == [{"substrate": "soil", "month": "6.0"}, {}]


def test_class_folders_have_no_metadata(tmp_path, prior):
    (tmp_path / "photos" / "test").mkdir(parents=True)
    (tmp_path / "photos" / "test" / "a.png").touch()
    observations = find_test_table(tmp_path, "class-folders").observations
    assert [observation.metadata for observation in observations] == [{}]
    assert prior.log_probabilities(observations) is None

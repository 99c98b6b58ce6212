"""The metadata prior at work: each value adds its log-likelihood, and what cannot be read says nothing."""

import csv

import pytest
import torch

from kernel.competitions.fungi import METADATA
from kernel.metadata_prior import FEATURES, Prior, feature_value, fused
from kernel.observations import Observation, find_test_table

OAK, SAND = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 0.0])
JUNE = {"month": "6.0", "day": "21.0"}
GOOD = JUNE | {
    "year": "2023.0", "latitude": "55.95", "longitude": "11.72", "elevation": "12.0", "landcover": "17.0",
    "countryCode": "DK", "district": "Gribskov", "biogeographicalRegion": "continental",
    "habitat": "Deciduous woodland", "substrate": "soil", "metaSubstrate": "jord",
}  # fmt: skip


def asked(*metadata: dict) -> list[Observation]:
    return [Observation(str(number), (), said) for number, said in enumerate(metadata)]


@pytest.fixture
def prior() -> Prior:
    """Three classes, told apart by what they grow on and by a habitat."""
    tables = {"substrate": torch.stack([OAK, SAND]), "habitat": torch.tensor([[0.0, 0.0, 5.0]])}
    classes = torch.tensor([0.5, 0.3, 0.2]).log()
    return Prior(classes, {"substrate": ["oak", "sand"], "habitat": ["bog"]}, tables)


def test_what_the_features_say_adds_up_in_log_space(prior):
    found = prior.log_probabilities(asked({"substrate": "sand", "habitat": "bog"}, {"substrate": "oak"}))
    expected = torch.stack([prior.classes + SAND + prior.tables["habitat"][0], prior.classes + OAK]).log_softmax(1)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)
    assert torch.allclose(found.exp().sum(1), torch.ones(2))


def test_spelling_and_floats_do_not_hide_a_value(prior):
    assert torch.equal(prior.log_likelihoods(asked({"substrate": " Oak "}))[0], OAK)
    assert feature_value("landcover", {"landcover": "17.0"}) == feature_value("landcover", {"landcover": "17"}) == "17"
    assert feature_value("season", JUNE) == feature_value("season", {"month": " 6", "day": "21"}) == "17"


@pytest.mark.parametrize("cell", ["", " ", "None", "NaN", "N/A", "Unknown", " unidentified ", "?", "-", "<NA>"])
def test_a_cell_that_says_that_its_value_is_not_known_is_no_value(cell):
    assert feature_value("habitat", {"habitat": cell}) is None


def test_a_table_without_the_columns_switches_the_prior_off(prior):
    nothing = asked({}, {}, {"district": "Gribskov"})
    assert prior.log_probabilities(nothing) is None
    assert not prior.log_likelihoods(nothing).any()
    assert prior.log_probabilities([]) is None
    photos = torch.randn(3, 3)
    assert torch.equal(fused(photos, prior.log_probabilities(nothing), 0.5), photos)


def test_an_observation_without_a_known_value_gets_the_classes_alone(prior):
    found = prior.log_probabilities(asked({"substrate": "oak"}, {}, {"substrate": "glass", "habitat": ""}))
    assert torch.allclose(found[1:], prior.classes.expand(2, -1))


def test_fusing_adds_the_weighted_prior_to_the_photos(prior):
    photos = torch.tensor([[0.6, 0.3, 0.1]]).log()
    found = prior.log_probabilities(asked({"substrate": "sand"}))
    assert fused(photos, found, 0.0).argmax() == 0
    assert fused(photos, found, 1.0).argmax() == 1
    assert torch.allclose(fused(photos, found, 0.5), photos + found / 2)


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
def test_a_month_that_is_none_has_no_season(month):
    assert feature_value("season", JUNE | {"month": month}) is None


@pytest.mark.parametrize("day", ["0", "32", "nan", "", "x"])
def test_a_day_that_is_none_leaves_the_middle_of_its_month(day):
    assert feature_value("season", JUNE | {"day": day}) == feature_value("season", {"month": "6", "day": "15"})


def test_coordinates_off_the_globe_are_no_place():
    for wrong in ({"latitude": "91"}, {"longitude": "-181"}, {"latitude": ""}, {"longitude": "1e400"}):
        assert feature_value("place", GOOD | wrong) is None
    assert feature_value("place", GOOD) == feature_value("place", GOOD | {"latitude": "55.951"})


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

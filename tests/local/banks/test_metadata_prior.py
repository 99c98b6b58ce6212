"""The metadata prior: smoothing by the taxonomy, weights by cross-validation over years, applied by the kernel.

python -m pytest tests/local/banks/test_metadata_prior.py
"""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from kernel.metadata_prior import MetadataPrior, read_prior
from kernel.observations import Observation
from local.banks import metadata_prior
from local.banks.metadata_prior import (
    FEATURES,
    KM_PER_DEGREE,
    RECENCY,
    RIDGE,
    SHOTS,
    choose_weights,
    conditional_logit,
    elevation_kernel,
    features_of,
    fit_prior,
    location_kernel,
    log_ratios,
    rolling_origin_folds,
    season_kernel,
    smooth,
    taxon_rings,
    unweighted_terms,
    write_prior,
)
from local.base.metrics import score
from local.data.competition import read_competition
from local.data.observations import LabelledObservations
from tests.conftest import ROOT
from tests.labelled import make_labelled

REAL = ROOT / "data" / "fungi-clef-2025"  # as downloaded; the photos are not needed
HABITATS = ("meadow", "bog", "dune", "oak wood")


def grown(shots: int = 4, informative: bool = True, seed: int = 0) -> tuple[LabelledObservations, list[str]]:
    """Twenty classes in ten genera; a genus has a habitat, and substrates are random."""
    rng = np.random.default_rng(seed)
    classes = [str(number) for number in range(20)]
    observations, class_ids = [], []
    for class_id in classes:
        for _ in range(shots):
            home = HABITATS[int(class_id) // 2 % 4] if informative else rng.choice(HABITATS)
            said = {
                "year": f"{rng.integers(2016, 2022)}.0",
                "habitat": str(home if rng.random() < 0.9 else rng.choice(HABITATS)),
                "substrate": str(rng.choice(("soil", "wood"))),
            }
            observations.append(Observation(str(len(observations)), (), said))
            class_ids.append(class_id)
    taxa = {class_id: ("order", "family", f"genus {int(class_id) // 2}") for class_id in classes}
    return make_labelled(observations, class_ids, taxa=taxa), classes


@pytest.fixture(scope="module")
def fitted() -> tuple[MetadataPrior, LabelledObservations]:
    reference, classes = grown()
    return fit_prior(reference, classes), reference


def test_the_kernel_reads_the_prior_that_was_written(fitted, tmp_path):
    prior, reference = fitted
    write_prior(prior, tmp_path / "prior.safetensors")
    read = read_prior(tmp_path / "prior.safetensors")
    expected = prior.log_probabilities(reference.observations)
    assert expected.shape == (80, 20)
    assert torch.equal(read.log_probabilities(reference.observations), expected)
    assert torch.equal(read.classes, prior.classes)
    write_prior(read, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "prior.safetensors").read_bytes()


def test_an_informative_feature_gets_a_weight_and_a_random_one_almost_none():
    reference, classes = grown(shots=12)
    weights = choose_weights(reference)
    assert set(weights) == {*FEATURES, RECENCY, SHOTS}
    assert weights["habitat"] > 0.7
    assert weights["substrate"] < 0.2
    assert set(fit_prior(reference, classes).tables) <= {"habitat", "substrate"}


def test_of_many_observations_some_choose_about_the_same_weights(monkeypatch):
    reference, _ = grown(shots=12)
    whole = choose_weights(reference)
    monkeypatch.setattr(metadata_prior, "MAX_SCORES", 20 * 25)
    some = choose_weights(reference)
    assert some != whole
    assert some["habitat"] == pytest.approx(whole["habitat"], abs=0.3)


def test_a_habitat_raises_the_classes_that_live_there(fitted):
    query = Observation("new", (), {"habitat": "BOG"})
    likeliest = fitted[0].log_likelihoods([query])[0].topk(4).indices.tolist()
    assert {HABITATS[index // 2 % 4] for index in likeliest} == {"bog"}


def test_without_metadata_the_prior_is_off_and_classes_are_as_probable_as_their_shots():
    reference, classes = grown()
    bare = [Observation(name, ()) for name in reference.ids]
    bare = make_labelled(bare, reference.class_ids, taxa=reference.taxa)
    bare = bare.subset(np.arange(80) > 1)  # class 0 has 2 observations, the others 4
    prior = fit_prior(bare, classes)
    assert not prior.tables
    assert prior.log_probabilities(reference.observations) is None
    assert torch.allclose(prior.classes.exp(), torch.tensor([2.0] + [4.0] * 19) / 78)


def test_a_class_observed_recently_is_more_probable():
    reference, classes = grown(informative=False)
    late = [
        Observation(one.id, (), one.metadata | {"year": "2021" if int(class_id) % 2 else "2010"})
        for one, class_id in zip(reference.observations, reference.class_ids, strict=True)
    ]
    tables = unweighted_terms(make_labelled(late, reference.class_ids, taxa=reference.taxa), classes)[1]
    assert tables[RECENCY][0, 1::2].min() > 0 > tables[RECENCY][0, ::2].max()


def test_a_class_without_an_observation_borrows_the_habitat_of_its_genus():
    reference, classes = grown()
    seen = reference.subset(reference.class_ids != "3")
    found = fit_prior(seen, classes).log_probabilities(reference.observations)
    assert found.isfinite().all()
    in_genus, elsewhere = found[reference.class_ids == "2"][:, 3].mean(), found[reference.class_ids == "4"][:, 3].mean()
    assert in_genus > elsewhere


def test_every_observation_is_in_exactly_one_ring():
    ancestry = [("o", "f", "g"), ("o", "f", "g"), ("o", "f", "h"), ("p", "q", "r")]
    rings = taxon_rings(np.array([[2.0], [1.0], [1.0], [1.0]]), ancestry)
    assert np.stack(rings)[:, :, 0].T.tolist() == [[0, 1, 1, 2], [0, 1, 2, 1], [0, 3, 0, 1], [0, 0, 0, 1]]


def relatives_of(ancestry) -> list[list[set[int]]]:
    """Of each ring, the class itself left out, the relatives of every class."""
    rings = taxon_rings(np.eye(len(ancestry)), ancestry)
    return [[set(np.flatnonzero(row > 0.5).tolist()) for row in ring] for ring in rings[:-1]]


def test_classes_without_a_named_taxon_are_not_relatives():
    assert relatives_of([("", "", ""), ("", "", ""), ("o", "", ""), ("o", "", "g")]) == [
        [set(), set(), {3}, {2}],
        [set(), set(), set(), set()],
        [set(), set(), set(), set()],
    ]


def test_classes_of_a_genus_are_relatives_if_their_family_is_blank_and_a_blank_family_has_no_relatives():
    ancestry = [("o", "f", "g"), ("o", "", "g"), ("o", "f", "h"), ("", "", "k"), ("", "", "k"), ("", "", "l")]
    assert relatives_of(ancestry) == [
        [set(), {2}, {1}, set(), set(), set()],
        [{2}, set(), {0}, set(), set(), set()],
        [{1}, {0}, set(), {4}, {3}, set()],
    ]


def test_blanks_in_an_order_or_family_hide_no_relative_of_a_genus():
    assert relatives_of([("o", "f", "g"), ("", "f", "g"), ("o", "f", "")]) == [
        [set(), set(), set()],
        [{2}, {2}, {0, 1}],
        [{1}, {0}, set()],
    ]


def test_rings_are_those_of_counting_pair_by_pair():
    rng = np.random.default_rng(0)
    ancestry = [tuple(rng.choice(["", "a", "b", "c"], 3)) for _ in range(40)]

    def closest(one, other):
        return max((rank for rank in range(3) if one[rank] == other[rank] != ""), default=None)

    for rank, ring in enumerate(relatives_of(ancestry)):
        for index, line in enumerate(ancestry):
            others = [other for other in range(40) if other != index and closest(line, ancestry[other]) == rank]
            assert ring[index] == set(others)


def test_ratios_back_off_to_the_nearest_relatives_as_worked_by_hand():
    # Class 0 has no observation; class 1 is of its genus, class 2 of its family, class 3 of another order.
    ancestry = [("o", "f", "g"), ("o", "f", "g"), ("o", "f", "h"), ("p", "q", "r")]
    own = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    ratios = log_ratios(own, ancestry, (4.0, 3.0, 2.0, 1.0))
    overall = (1 + 1 / 2) / (3 + 1)
    # Of the first value; each ring adds its count to so many observations of the wider estimate.
    order = overall  # nobody is in the order alone
    family = (0 + 3 * order) / (1 + 3)  # class 2
    genus = (1 + 2 * family) / (1 + 2)  # class 1
    assert ratios[0, 0] == pytest.approx(np.log(genus / overall))  # a class without observations is its genus
    own = (1 + 1 * ((0 + 2 * family) / (0 + 2))) / (1 + 1)  # the genus of class 1 is class 0, without observations
    assert ratios[1, 0] == pytest.approx(np.log(own / overall))
    assert ratios[3, 0] == pytest.approx(np.log((0 + 1 * overall) / (1 + 1) / overall))
    probabilities = np.exp(ratios) * [overall, 1 - overall]
    assert np.allclose(probabilities.sum(axis=1), 1)


def test_season_elevation_and_location_fade_by_their_formulas():
    season = season_kernel([str(number) for number in range(36)])
    assert season[0, 35] == season[0, 1] == pytest.approx(np.exp(-0.5 * (365.25 / 36 / 30) ** 2))
    assert season[0, 18] == pytest.approx(np.exp(-0.5 * (365.25 / 2 / 30) ** 2))
    assert elevation_kernel(["0", "1", "8"])[0].tolist() == pytest.approx([1, np.exp(-0.5), np.exp(-32)])
    # A cell is .05 degrees high and .0875 wide; the three centres are near 55.975 and 38.025 degrees north.
    location = location_kernel(["1119,133", "1119,134", "1120,133", "760,133"])
    assert np.allclose(np.diag(location), 1)
    north, east = 0.05 * KM_PER_DEGREE, 0.0875 * KM_PER_DEGREE * np.cos(np.radians(55.975))
    assert location[0, 1] == pytest.approx(1 / (1 + (east / 4) ** 2))
    assert location[0, 2] == pytest.approx(1 / (1 + (north / 4) ** 2))
    assert location[0, 3] == pytest.approx(1 / (1 + (359 * north / 4) ** 2))


def test_an_observation_is_a_distribution_over_similar_values_and_nothing_without_a_value():
    found = smooth(["0", None, "2"], ["0", "1", "2"], "elevation", np.arange(3), 3)
    row = np.exp([0, -0.5, -2])
    first, last = row / row.sum(), row[::-1] / row.sum()
    assert np.allclose(found, [first, np.zeros(3), last])
    assert np.allclose(smooth(["0", None, "2"], ["0", "1", "2"], "elevation", np.array([1, 1, 1]), 2)[1], first + last)
    substrates = smooth(["oak", None, "birch"], ["birch", "oak"], "substrate", np.arange(3), 3)
    assert substrates.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_each_of_the_last_years_is_a_fold_after_all_earlier_years():
    years = np.array([2018, 2019, 2019, 2020, 2021, np.nan])
    assert [
        (past.nonzero()[0].tolist(), now.nonzero()[0].tolist()) for past, now in rolling_origin_folds(years, 2)
    ] == [
        ([0, 1, 2], [3]),
        ([0, 1, 2, 3], [4]),
    ]


def test_if_years_are_unknown_every_observation_is_a_query_of_one_fold():
    for years in (np.full(23, np.nan), np.full(23, 2021.0)):
        made = list(rolling_origin_folds(years, 5))
        assert np.sum([queries for _, queries in made], axis=0).tolist() == [1] * 23
        assert all((past ^ queries).all() for past, queries in made)


def test_the_conditional_logit_recovers_the_weights_of_its_model():
    rng = np.random.default_rng(0)
    design = rng.normal(size=(3, 4000, 10))
    scores = np.tensordot([1.0, 0.5, 0.0], design, 1) + rng.gumbel(size=(4000, 10))
    found = conditional_logit(
        [(design[:, :2000], scores[:2000].argmax(1)), (design[:, 2000:], scores[2000:].argmax(1))], 3
    )
    assert np.allclose(found, [1.0, 0.5, 0.0], atol=0.07)


@pytest.mark.parametrize("seed", range(3))
def test_the_conditional_logit_of_two_classes_is_the_logistic_regression_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    design, truth = rng.normal(size=(3, 300, 2)), rng.integers(0, 2, 300)
    difference = (design[:, :, 1] - design[:, :, 0]).T
    truth = (difference @ [1.0, 0.5, 0.8] + rng.logistic(size=300) > 0).astype(int)
    model = LogisticRegression(C=1 / (2 * RIDGE * 300), fit_intercept=False, tol=1e-8).fit(difference, truth)
    assert (model.coef_ > 0).all()
    parts = [(design[:, :100], truth[:100]), (design[:, 100:], truth[100:])]
    assert conditional_logit(parts, 3) == pytest.approx(model.coef_[0], abs=1e-3)


def test_a_term_that_would_get_a_negative_weight_gets_none():
    rng = np.random.default_rng(0)
    design = rng.normal(size=(2, 2000, 5))
    truth = (np.tensordot([1.0, -1.0], design, 1) + rng.gumbel(size=(2000, 5))).argmax(axis=1)
    found = conditional_logit([(design, truth)], 2)
    assert found[1] == 0
    assert found[0] > 0.5


def test_the_drawn_competition_carries_its_metadata_and_taxonomy(drawn):
    competition = read_competition(drawn.competition)
    train, ancestry = competition.in_splits("train"), competition.taxa
    assert all(observation.metadata["habitat"] for observation in train.observations)
    assert set(ancestry) >= set(train.class_ids)
    assert all(len(line) == 5 and all(line) for line in ancestry.values())
    classes = train.classes
    found = fit_prior(train, classes).log_probabilities(train.observations)
    assert torch.allclose(found.exp().sum(1), torch.ones(len(train)), atol=1e-5)


@pytest.mark.skipif(not (REAL / "metadata").is_dir(), reason=f"needs FungiCLEF's own tables in {REAL}")
def test_on_fungiclef_train_predicts_val_better_than_naive_bayes():
    competition = read_competition(REAL)
    train, val = competition.in_splits("train"), competition.in_splits("val")
    classes = train.classes
    prior = fit_prior(train, classes)
    order = prior.log_probabilities(val.observations).sort(dim=1, descending=True, stable=True).indices[:, :10]
    scores = score(val.class_ids, [[classes[index] for index in row] for row in order.tolist()])
    found = [scores[f"recall_at_{count}"] for count in (1, 5, 10)]
    assert all(new > old for new, old in zip(found, (0.071, 0.182, 0.257), strict=True)), found


def test_other_columns_are_features_by_their_text_or_number(tmp_path):
    """A shelf tells the class, and a price nearly so; a column without a value tells nothing."""
    reference, classes = grown()
    competition = dataclasses.replace(reference.competition, metadata=("shelf", "price", "empty"))
    observations = [
        Observation(
            str(number), (), {"shelf": f"S {int(class_id) // 2}", "price": f"{100 * int(class_id) + number % 3}"}
        )
        for number, class_id in enumerate(reference.class_ids)
    ]
    labelled = dataclasses.replace(reference, competition=competition, observations=observations)
    assert features_of(labelled)[-3:] == ["text shelf", "number price", "number empty"]
    write_prior(fit_prior(labelled, classes), tmp_path / "prior.safetensors")
    prior = read_prior(tmp_path / "prior.safetensors")
    assert {"text shelf", "number price"} == set(prior.values)
    assert "s 3" in prior.values["text shelf"]
    assert "7e+02" in prior.values["number price"]
    query = Observation("new", (), {"shelf": " s 3", "price": "699.5"})
    assert prior.log_probabilities([query]).argmax() == 7
    write_prior(dataclasses.replace(prior, values={"colour x": ["red"]}), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="unknown feature 'colour x'"):
        read_prior(tmp_path / "other.safetensors")

"""The choice is by observations that had no part in what judges them, and it is worth making."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from kernel.bank import classify
from local.banks.estimators import unit
from local.banks.folds import make_folds, shot_weights
from local.banks.search import (
    SCALES,
    Embedded,
    Search,
    compare,
    cross_validated,
    fit_banks,
    walk,
    worth,
)
from local.data.taxonomy import Taxonomy
from local.recipes.settings import CANDIDATES, BankSettings

VIEWS = ("plain", "hflip", "rotate90", "rotate270")
KEYS = ("whitening", "views", "genus_weight", "transduction")
OPEN = BankSettings(views=VIEWS, resize_mode="crop")


def specimens(shots=(1, 2, 3, 4), repeats=8, seed=0) -> Embedded:
    """Observations of one or two photos, whose classes differ where photos of one class hardly do.

    The turned views only add noise.
    """
    rng = np.random.default_rng(seed)
    sizes = np.tile(shots, repeats)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), 16)) * np.r_[np.zeros(6), np.ones(10)]
    observations = np.repeat(np.arange(len(classes)), rng.integers(1, 3, len(classes)))
    spread = np.r_[np.full(6, 2.0), np.full(10, 0.3)]
    photos = centres[classes[observations]] + rng.normal(size=(len(observations), 16)) * spread
    turned = photos[:, None] + rng.normal(size=(len(photos), 2, 16)) * 6
    upright = photos[:, None] + rng.normal(size=(len(photos), 2, 16)) * spread / 2
    values = unit(np.concatenate([upright, turned], axis=1) + 1).astype(np.float16)
    genus = np.arange(len(sizes)) // 3
    return Embedded(values, VIEWS, observations, classes, Taxonomy(genus, genus // 3))


def search_over(embedded, seed=0) -> Search:
    everyone = np.ones(len(embedded.classes), dtype=bool)
    return Search(lambda mode: embedded, "crop", make_folds(embedded.classes, seed), 10, everyone)


@pytest.fixture(scope="module")
def search():
    return search_over(specimens())


def test_no_observation_is_asked_of_a_reference_that_holds_it_and_none_of_a_class_without_another():
    classes = specimens().classes
    folds = make_folds(classes, 0)
    asked = np.zeros(len(classes), dtype=int)
    for reference, queries in folds:
        assert not (reference & queries).any()
        assert np.isin(classes[queries], classes[reference]).all()
        asked += queries
    sizes = np.bincount(classes)[classes]
    assert (asked == (sizes > 1)).all()
    assert all(reference[sizes == 1].all() for reference, _ in folds)


def test_for_a_macro_score_every_class_that_is_asked_counts_alike():
    embedded = specimens()
    everyone = np.ones(len(embedded.classes), dtype=bool)
    folds = make_folds(embedded.classes, 0)
    search = Search(lambda mode: embedded, "crop", folds, 10, everyone, is_macro=True)
    shares = np.bincount(search.truth, search.weights)
    assert search.weights.mean() == pytest.approx(1)
    assert np.unique(shares[shares > 0].round(9)).size == 1
    assert np.unique(np.bincount(search.truth)[shares > 0]).size > 1


def test_only_what_may_be_asked_is():
    classes = specimens().classes
    may = np.arange(len(classes)) % 3 == 0
    folds = make_folds(classes, 0, may)
    assert all(may[queries].all() for _, queries in folds)
    assert all(reference[~may].all() for reference, _ in folds)


def test_queries_of_few_shots_stand_for_the_classes_of_one_observation():
    classes = np.array([0, 1, 1, 2, 2, 3, 3, 3, 3])  # sizes 1, 2, 2, 4
    weights = shot_weights(np.array([1, 1, 1, 1, 3, 3, 3, 3]), classes)
    assert weights.mean() == pytest.approx(1)
    # One shot: one observation of the reference in nine; three: none. The rest have no query to stand for them.
    assert weights[0] > 0
    assert (weights[4:] == 0).all()
    assert shot_weights(np.array([1, 2, 4]), np.array([0, 1, 1, 2, 2, 2, 2])).tolist() == pytest.approx(
        [3 / 7, 6 / 7, 12 / 7]
    )


def test_queries_of_classes_that_are_all_of_one_size_weigh_the_same():
    assert shot_weights(np.array([2, 2, 2]), np.repeat([0, 1, 2], 3)).tolist() == [1, 1, 1]


def test_the_place_of_the_true_class_counts_ties_in_the_order_of_the_classes():
    log_probabilities = torch.tensor([[0.1, 0.3, 0.3], [0.3, 0.1, 0.2], [0.5, 0.2, 0.1]])
    outcome = compare(log_probabilities, np.array([2, 1, -1]))
    assert outcome.places.tolist() == [1, 2, 3]
    assert np.isnan(outcome.losses[2])
    assert outcome.losses[0] == pytest.approx(-0.3)
    assert outcome.top[0].tolist() == [1, 2, 0]


def test_what_an_answer_is_worth_depends_on_the_room_in_the_submission():
    places = np.array([0, 3, 7, 20])
    assert worth(places, 10).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert worth(places, 1).tolist() == [1, 0, 0, 0]


def test_it_whitens_where_photos_vary_most_in_what_classes_do_not(search):
    table = []
    chosen = walk(search, OPEN, KEYS, np.ones(len(search.truth), dtype=bool), table.append)
    assert chosen.whitening > 0
    assert chosen.views[0] == "plain"
    assert not {"rotate90", "rotate270"} & set(chosen.views)
    plain = BankSettings(views=("plain",), resize_mode="crop")
    assert search.worth(chosen).mean() > search.worth(plain).mean() + 0.1
    assert {row["key"] for row in table} == set(KEYS)
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in table)
    values = {(row["key"], row["value"]) for row in table}
    assert {("whitening", value) for value in CANDIDATES["whitening"]} <= values


def test_a_candidates_scores_are_weighted_as_its_gain_is():
    search, table = search_over(specimens()), []
    walk(search, OPEN, ("whitening",), np.ones(len(search.truth), dtype=bool), table.append)
    assert np.ptp(search.weights) > 0.1
    for row in table[: len(CANDIDATES["whitening"])]:
        outcome = search.judge(replace(OPEN, whitening=row["value"]))
        expected = (search.weights * (outcome.places < 5)).sum() / search.weights.sum()
        assert row["recall_at_5"] == pytest.approx(expected)
        assert row["log_loss"] == pytest.approx((search.weights * outcome.losses).sum() / search.weights.sum())


def test_the_same_seed_chooses_the_same(search):
    everyone = np.ones(len(search.truth), dtype=bool)
    again = search_over(specimens())
    assert walk(again, OPEN, KEYS, everyone) == walk(search, OPEN, KEYS, everyone)
    assert (cross_validated(again, OPEN, KEYS) == cross_validated(search, OPEN, KEYS)).all()


def test_a_choice_among_luck_alone_is_not_reported_as_a_gain():
    embedded = specimens(seed=3)
    rng = np.random.default_rng(0)
    noise = unit(rng.normal(size=embedded.values.shape)).astype(np.float16)
    search = search_over(Embedded(noise, VIEWS, embedded.observations, embedded.classes, embedded.taxonomy))
    chosen = walk(search, OPEN, KEYS, np.ones(len(search.truth), dtype=bool))
    lucky = (search.judge(chosen).places < 5).mean()
    honest = (cross_validated(search, OPEN, KEYS)[:, :5] == search.truth[:, None]).any(axis=1).mean()
    assert honest < lucky


@pytest.mark.parametrize("matcher", ["means", "several", "ridge", "random-ridge", "logistic"])
def test_every_matcher_makes_banks_that_the_kernel_applies(matcher):
    embedded = specimens()
    recipe = BankSettings(
        views=VIEWS[:2], whitening=1.0, matcher=matcher, nearest_neighbour_weight=0.25, transduction=0.25
    )
    banks = fit_banks(recipe, embedded, np.ones(len(embedded.classes), dtype=bool))
    assert sum(bank.mixture_weight.item() for bank in banks) == pytest.approx(1)
    queries = torch.tensor(embedded.pooled(recipe), dtype=torch.float32)
    probabilities = torch.cat(list(classify(banks, queries))).exp()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(queries)), atol=1e-4)
    assert (probabilities.argmax(dim=1).numpy() == embedded.classes).mean() > 0.9


def crowded(seed=1) -> Embedded:
    """Classes of 2 to 9 observations that overlap."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(8), np.arange(2, 10))
    photos = rng.normal(size=(8, 10))[classes] + 1.2 * rng.normal(size=(len(classes), 10))
    return Embedded(unit(photos[:, None] + 0.5), ("plain",), np.arange(len(classes)), classes, Taxonomy.unknown(8))


def test_logistic_regression_answers_as_scikit_learn_does_whatever_temperature_is_chosen():
    embedded, recipe = crowded(), BankSettings(views=("plain",), matcher="logistic")
    everyone = np.ones(len(embedded.classes), dtype=bool)
    values, logits, first = embedded.pooled(recipe), [], []
    search = search_over(embedded)
    for known, queries in search.folds:
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, tol=1e-3)
        centred = unit(values - values[known].mean(axis=0))
        model.fit(centred[known], embedded.classes[known])
        logits.append(model.decision_function(centred[queries]))
        first.append(model.predict(centred[queries]))
    outcome = search.judge(recipe)
    assert (outcome.top[:, 0] == np.concatenate(first)).all()
    assert 0.2 < (outcome.places == 0).mean() < 0.95
    # The temperature is the best of the grid, and the one that the model was fitted at is in it.
    grid = {scale: log_loss(search.truth, softmax(scale * np.concatenate(logits), axis=1)) for scale in SCALES}
    assert 1.0 in grid
    assert outcome.scales == (min(grid, key=grid.get),)
    assert np.mean(outcome.losses) == pytest.approx(min(grid.values()), abs=1e-4)
    # Without anything held out it is that of the model.
    (bank,) = fit_banks(recipe, embedded, everyone)
    centred = unit(values - values.mean(axis=0))
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, tol=1e-3).fit(centred, embedded.classes)
    found = torch.cat(list(classify([bank], torch.tensor(values, dtype=torch.float32)))).numpy()
    assert np.allclose(found, model.predict_log_proba(centred), atol=1e-4)


def test_the_temperature_of_cosines_is_the_best_of_a_grid_and_leaves_the_class_prior_as_it_is():
    embedded, recipe = crowded(), BankSettings(views=("plain",), class_prior_exponent=0.5)
    search, values = search_over(embedded), embedded.pooled(BankSettings(views=("plain",)))
    cosines, priors = [], []
    for known, queries in search.folds:
        own = [known & (embedded.classes == index) for index in range(8)]
        centred = unit(values - values[known].mean(axis=0))
        means = unit(np.stack([centred[one].mean(axis=0) for one in own]))
        cosines.append(centred[queries] @ means.T)
        priors.append(np.tile(0.5 * np.log([one.sum() for one in own]), (queries.sum(), 1)))
    cosines, priors = np.concatenate(cosines), np.concatenate(priors)
    grid = {16 * scale: log_loss(search.truth, softmax(16 * scale * cosines + priors, axis=1)) for scale in SCALES}
    assert search.judge(recipe).scales == (min(grid, key=grid.get),)
    assert np.mean(search.judge(recipe).losses) == pytest.approx(min(grid.values()), abs=1e-4)


def test_where_no_query_is_of_a_known_class_the_temperature_stays_as_it_was_fitted():
    embedded = crowded()
    known = embedded.classes > 3
    lacking = replace(embedded, classes=np.where(known, embedded.classes, -1))
    search = Search(lambda mode: lacking, "crop", [(known, ~known)], 10, known)
    assert search.judge(BankSettings(views=("plain",))).scales == (16.0,)
    assert search.judge(BankSettings(views=("plain",), matcher="logistic")).scales == (1.0,)


def test_an_observation_without_a_readable_photo_is_no_part_of_the_bank():
    embedded = specimens()
    blind = embedded.observations != 5
    partly = Embedded(embedded.values[blind], VIEWS, embedded.observations[blind], embedded.classes, embedded.taxonomy)
    bank = fit_banks(BankSettings(views=VIEWS[:2]), partly, np.ones(len(partly.classes), dtype=bool))[0]
    assert bank.prototypes.isfinite().all()
    counts = np.bincount(embedded.classes)
    counts[embedded.classes[5]] -= 1
    assert ((bank.bias > -50).numpy() == (counts > 0)).all()


@pytest.mark.parametrize(("is_good", "kept"), [(True, "head"), (False, "means")])
def test_a_trained_head_is_kept_where_it_beats_class_means_at_their_best(is_good, kept):
    embedded = specimens()
    everyone = np.ones(len(embedded.classes), dtype=bool)
    whitened = replace(OPEN, whitening=1.0)
    head = fit_banks(whitened, embedded, everyone)[0]  # it has seen the queries
    if not is_good:
        head = replace(head, prototypes=head.prototypes.flip(0))
    search = search_over(replace(embedded, head=head))
    chosen = walk(search, replace(OPEN, matcher="head"), ("matcher", "whitening"), np.ones(len(search.truth), bool))
    assert chosen.matcher == kept
    assert kept == "head" or chosen.whitening > 0

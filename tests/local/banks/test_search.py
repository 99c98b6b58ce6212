"""Candidates are evaluated by the formulas, and the best one is selected.

python -m pytest tests/local/banks/test_search.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from kernel import bank as bank_module
from kernel.metadata_prior import MetadataPrior, WeightedPrior
from kernel.ranking import classify
from local.banks import fitting
from local.banks import search as search_module
from local.banks.calibration import LOGIT_SCALE_FACTORS, fit_inverse_temperature
from local.banks.estimators import l2_normalize
from local.banks.evaluation import Evaluation, evaluate_predictions
from local.banks.fitting import Embedded, fit_banks
from local.banks.folds import FOLDS, macro_weights, make_folds, shot_weights
from local.banks.projection import ProjectionEnsemble
from local.banks.search import Search, coordinate_ascent, most_candidates, nested_predictions, with_weight
from local.base.metrics import mean_recall
from local.data.concatenated_encoders import FeatureBlock
from local.data.observations import Taxonomy
from local.recipes.settings import CANDIDATES, BankSettings

VIEWS = ("plain", "hflip", "rotate90", "rotate270")
KEYS = ("whitening", "views", "genus_weight", "transduction")
SETTINGS = BankSettings(views=VIEWS, resize_mode="crop")


def specimens(shots=(1, 2, 3, 4), repeats=8, seed=0) -> Embedded:
    """Observations of one or two photos; their classes differ where photos of one class hardly vary.

    The rotated views only add noise.
    """
    rng = np.random.default_rng(seed)
    sizes = np.tile(shots, repeats)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), 16)) * np.r_[np.zeros(6), np.ones(10)]
    observations = np.repeat(np.arange(len(labels)), rng.integers(1, 3, len(labels)))
    noise = np.r_[np.full(6, 2.0), np.full(10, 0.3)]
    photos = centres[labels[observations]] + rng.normal(size=(len(observations), 16)) * noise
    rotated = photos[:, None] + rng.normal(size=(len(photos), 2, 16)) * 6
    upright = photos[:, None] + rng.normal(size=(len(photos), 2, 16)) * noise / 2
    values = l2_normalize(np.concatenate([upright, rotated], axis=1) + 1).astype(np.float16)
    genus = np.arange(len(sizes)) // 3
    return Embedded(values, VIEWS, observations, labels, Taxonomy(genus, genus // 3))


def crowded(seed=1) -> Embedded:
    """Overlapping classes of 2 to 9 observations, of one photo in one view each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(8), np.arange(2, 10))
    photos = rng.normal(size=(8, 10))[labels] + 1.2 * rng.normal(size=(len(labels), 10))
    values = l2_normalize(photos[:, None] + 0.5)
    return Embedded(values, ("plain",), np.arange(len(labels)), labels, Taxonomy.unknown(8))


def of_two_encoders(seed=0) -> Embedded:
    """Observations of one photo: one encoder with two poolings, of which the second is noise, and one worse encoder."""
    rng = np.random.default_rng(seed)
    labels, sizes = np.repeat(np.arange(12), 6), (8, 8, 16)
    noise = (0.8, None, 4.0)  # no signal in the second
    parts = [
        (0 if level is None else rng.normal(size=(12, size))[labels]) + (level or 1) * rng.normal(size=(72, size))
        for size, level in zip(sizes, noise, strict=True)
    ]
    values = l2_normalize(np.concatenate([l2_normalize(part[:, None]) for part in parts], axis=2))
    names = ((0, "token"), (0, "avg"), (1, ""))
    blocks = tuple(FeatureBlock(*name, size) for name, size in zip(names, sizes, strict=True))
    return Embedded(values, ("plain",), np.arange(72), labels, Taxonomy.unknown(12), blocks=blocks)


def search_over(embedded, seed=0, **options) -> Search:
    everyone = np.ones(len(embedded.labels), dtype=bool)
    return Search(lambda mode: embedded, "crop", make_folds(embedded.labels, seed), 10, everyone, **options)


def every_query(search) -> np.ndarray:
    return np.ones(len(search.truth), dtype=bool)


def predicted(search, settings) -> torch.Tensor:
    """(queries, classes) log-probabilities."""
    return torch.cat(list(search.predict(settings, search.fit_folds(settings)[0])))


@pytest.fixture(scope="module")
def search():
    return search_over(specimens())


def test_queries_are_weighted_by_shots_or_by_classes():
    embedded = specimens()
    by_shots, by_classes = search_over(embedded), search_over(embedded, is_macro=True)
    shots = [
        np.bincount(embedded.labels[reference], minlength=32)[embedded.labels[queries]]
        for reference, queries in by_shots.folds
    ]
    assert (by_shots.weights == shot_weights(np.concatenate(shots), embedded.labels)).all()
    assert (by_classes.weights == macro_weights(by_classes.truth, by_classes.truth)).all()
    settings = replace(SETTINGS, whitening=1.0)
    expected = by_shots.weights * mean_recall(by_shots.evaluate(settings).smooth_hits, 10)
    assert (by_shots.weighted_objective(settings) == expected).all()


def test_the_search_evaluates_every_candidate_and_keeps_what_helps(search):
    table = []
    chosen = coordinate_ascent(search, SETTINGS, KEYS, every_query(search), table.append)
    assert 0 < len(table) <= most_candidates(SETTINGS, KEYS)
    assert chosen.whitening > 0
    assert chosen.views[0] == "plain"
    assert not {"rotate90", "rotate270"} & set(chosen.views)
    plain = BankSettings(views=("plain",), resize_mode="crop")
    assert search.weighted_objective(chosen).mean() > search.weighted_objective(plain).mean() + 0.1
    values = {(row["key"], row["value"]) for row in table}
    assert values >= {(key, value) for key in KEYS if key != "views" for value in CANDIDATES[key]}
    assert {value for key, value in values if key == "views"} >= {"plain hflip", "plain rotate90 rotate270"}


@pytest.mark.parametrize("metric", ["", "log_loss"])
@pytest.mark.parametrize("seed", range(3))
def test_the_selected_value_of_a_single_setting_is_the_best_of_all(seed, metric):
    search = search_over(crowded(seed), metric=metric)
    start = BankSettings(views=("plain",))
    chosen = coordinate_ascent(search, start, ("whitening",), every_query(search))
    found = [search.weighted_objective(replace(start, whitening=value)).mean() for value in CANDIDATES["whitening"]]
    assert search.weighted_objective(chosen).mean() == max(found)
    assert chosen.whitening == CANDIDATES["whitening"][int(np.argmax(found))]  # the simplest of equals


def test_with_the_metric_log_loss_the_setting_of_the_lowest_log_loss_is_selected():
    search = search_over(crowded(4), metric="log_loss")
    start, labels = BankSettings(views=("plain",)), np.arange(8)
    chosen = coordinate_ascent(search, start, ("whitening",), every_query(search))
    losses = {}
    for value in CANDIDATES["whitening"]:
        banks, _ = search.fit_folds(replace(start, whitening=value))
        probabilities = torch.cat(list(search.predict(start, banks))).exp().double()
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        losses[value] = log_loss(search.truth, probabilities, labels=labels, sample_weight=search.weights)
    assert losses[chosen.whitening] == pytest.approx(min(losses.values()))
    by_recall = coordinate_ascent(search_over(crowded(4)), start, ("whitening",), every_query(search))
    assert losses[by_recall.whitening] > losses[chosen.whitening]


@pytest.mark.parametrize("matcher", ["means", "projection"])
@pytest.mark.parametrize("whitening", [0.0, 0.75])
def test_weights_of_encoders_and_a_part_of_a_pooling_give_what_embeddings_made_so_give(matcher, whitening):
    embedded, reference = of_two_encoders(), np.arange(72) % 6 < 4
    settings = BankSettings(views=("plain",), whitening=whitening, matcher=matcher)
    made = l2_normalize(np.concatenate([embedded.values[:, :, :8], 0.5 * embedded.values[:, :, 16:]], axis=2))
    expected = fit_banks(settings, replace(embedded, values=made, blocks=()), reference)
    found = fit_banks(replace(settings, encoder_weights=(1.0, 0.5), pool_part="token"), embedded, reference)
    queries = np.flatnonzero(~reference)
    one, other = (
        torch.cat(list(classify(banks, torch.tensor(values[queries, 0], dtype=torch.float32))))
        for banks, values in ((expected, made), (found, embedded.values))
    )
    assert torch.allclose(one, other, atol=1e-3)


def test_a_projection_is_trained_the_same_whatever_the_length_of_the_weights(monkeypatch):
    embedded, everyone, found = of_two_encoders(), np.ones(72, dtype=bool), []
    fit = ProjectionEnsemble.fit

    def record(self, *arguments, **named):
        found.append(fit(self, *arguments, **named).mean_recalls_)
        return self

    monkeypatch.setattr(ProjectionEnsemble, "fit", record)
    for weights in ((), (0.35, 0.35)):
        fit_banks(BankSettings(views=("plain",), matcher="projection", encoder_weights=weights), embedded, everyone)
    assert len(set(found[0].values())) > 1
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_the_weight_of_an_encoder_and_the_part_of_a_pooling_that_help_are_selected():
    search = search_over(of_two_encoders())
    start, table = BankSettings(views=("plain",)), []
    chosen = coordinate_ascent(search, start, ("pool_part", "encoder_weights"), every_query(search), table.append)
    assert chosen.pool_part == "token"
    assert chosen.encoder_weights[0] == 1.0 > chosen.encoder_weights[1]
    assert {row["value"] for row in table if row["key"] == "pool_part"} == {"all", "token", "avg"}  # it has no others
    assert len(table) <= most_candidates(start, ("pool_part", "encoder_weights"), 2)
    first = next(row for row in table if row["key"] == "encoder_weights")
    assert first["value"] == "equal"


def test_whitenings_are_kept_as_far_as_their_memory_goes_and_the_newest_always(monkeypatch):
    embedded, reference = of_two_encoders(), np.ones(72, dtype=bool)
    scales = [embedded.scales(BankSettings(encoder_weights=(1.0, weight))) for weight in (0.7, 0.5, 0.35)]
    monkeypatch.setattr(fitting, "KEPT", 2 * 4 * 32**2)
    first, second, third = (embedded.whitening(reference, one) for one in scales)
    assert embedded.whitening(reference, scales[1]) is second
    assert embedded.whitening(reference, scales[2]) is third
    again = embedded.whitening(reference, scales[0])
    assert again is not first
    assert np.array_equal(again.directions_, first.directions_)
    monkeypatch.setattr(fitting, "KEPT", 0)
    assert embedded.whitening(reference, scales[0]) is again
    assert len(embedded.whitenings) == 1


def test_equal_weights_are_the_weights_of_the_start_and_the_largest_is_1():
    start = BankSettings()
    assert with_weight(start, 2, 1, 1.0) == start
    lighter = with_weight(start, 3, 0, 0.5)
    assert lighter.encoder_weights == (0.5, 1.0, 1.0)
    assert with_weight(with_weight(lighter, 3, 1, 0.5), 3, 2, 0.5) == start
    assert with_weight(replace(start, encoder_weights=(0.5, 1.0)), 2, 1, 0.35).encoder_weights == (1.0, 0.7)
    assert with_weight(replace(start, encoder_weights=(1.0, 1e-6)), 2, 0, 0.5).encoder_weights == (1.0, 2e-6)


@pytest.mark.parametrize("whitening", [0.0, 0.75])
def test_only_the_ratios_of_the_weights_count_also_where_single_precision_cannot_hold_them(whitening):
    embedded, reference = of_two_encoders(), np.arange(72) % 6 < 4
    settings = BankSettings(views=("plain",), whitening=whitening)
    queries = torch.tensor(embedded.values[~reference, 0], dtype=torch.float32)

    def predict(embedded, *weights):
        banks = fit_banks(replace(settings, encoder_weights=weights), embedded, reference)
        return torch.cat(list(classify(banks, queries[:, : embedded.values.shape[2]])))

    for factor in (1e-60, 1e60):
        assert torch.equal(predict(embedded, factor, factor / 2), predict(embedded, 1.0, 0.5))
    first = replace(embedded, values=embedded.values[:, :, :16], blocks=embedded.blocks[:2])
    assert torch.equal(predict(first, 1e-9, 1.0), predict(first, 1.0, 1.0))
    assert predict(embedded, 1e60, 1.0).isfinite().all()


def test_a_trained_head_keeps_the_whole_embedding():
    embedded = of_two_encoders()
    head = fit_banks(BankSettings(views=("plain",)), embedded, np.ones(72, dtype=bool))[0]
    head = replace(head, prototypes=torch.ones_like(head.prototypes))  # nearest neighbours alone decide
    start = BankSettings(views=("plain",), matcher="head", nearest_neighbour_weight=0.5)
    search = search_over(replace(embedded, head=head))
    assert coordinate_ascent(search, start, ("pool_part",), every_query(search)) == start


def test_settings_with_the_same_hits_are_chosen_by_how_clear_they_are(monkeypatch):
    search = search_over(specimens())
    losses = np.zeros(len(search.truth))

    def evaluate(settings):
        top = np.zeros((len(losses), 10), dtype=int)
        smooth_hits = np.full((len(losses), 3), 0.6 + settings.whitening / 10)
        return Evaluation(top, np.zeros(len(losses), dtype=int), losses, smooth_hits)

    monkeypatch.setattr(search, "evaluate", evaluate)
    assert coordinate_ascent(search, SETTINGS, ("whitening",), every_query(search)).whitening == 1
    search.metric = "log_loss"
    assert coordinate_ascent(search, SETTINGS, ("whitening",), every_query(search)).whitening == 0


def test_a_row_of_the_table_has_the_weighted_scores_and_the_paired_gain():
    search, table = search_over(specimens()), []
    coordinate_ascent(search, SETTINGS, ("whitening",), every_query(search), table.append)
    assert np.ptp(search.weights) > 0.1
    for row in table[: len(CANDIDATES["whitening"])]:
        candidate = replace(SETTINGS, whitening=row["value"])
        evaluation = search.evaluate(candidate)
        for count in (1, 5, 10):
            expected = np.average(evaluation.ranks < count, weights=search.weights)
            assert row[f"recall_at_{count}"] == pytest.approx(expected)
        assert row["log_loss"] == pytest.approx(np.average(evaluation.losses, weights=search.weights))
        difference = search.weighted_objective(candidate) - search.weighted_objective(SETTINGS)
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert row["gain"] == pytest.approx(difference.mean())
        assert row["gain_low"] == pytest.approx(difference.mean() - 1.96 * error)
        assert row["gain_high"] == pytest.approx(difference.mean() + 1.96 * error)


def test_the_same_seed_selects_the_same(search):
    again = search_over(specimens())
    first, second = (coordinate_ascent(one, SETTINGS, KEYS, every_query(one)) for one in (again, search))
    assert first == second
    first, second = (nested_predictions(one, SETTINGS, KEYS) for one in (again, search))
    assert torch.equal(first.log_probabilities, second.log_probabilities)


def test_a_selection_among_noise_is_not_reported_as_a_gain():
    embedded = specimens(seed=3)
    rng = np.random.default_rng(0)
    noise = l2_normalize(rng.normal(size=embedded.values.shape)).astype(np.float16)
    search = search_over(replace(embedded, values=noise))
    chosen = coordinate_ascent(search, SETTINGS, KEYS, every_query(search))
    optimistic = search.weighted_objective(chosen).mean()
    nested = evaluate_predictions(nested_predictions(search, SETTINGS, KEYS).log_probabilities, search.truth)
    assert (search.weights * mean_recall(nested.smooth_hits)).mean() < optimistic


def test_without_a_choice_the_nested_predictions_are_at_the_temperature_that_the_others_choose(search):
    found, plain = nested_predictions(search, SETTINGS, ()).log_probabilities, predicted(search, SETTINGS)
    part = np.random.default_rng(search.seed).permutation(len(plain)) % FOLDS
    for number in range(FOLDS):
        others, own = part != number, torch.tensor(part == number)
        factor = fit_inverse_temperature(plain[torch.tensor(others)], search.truth[others], search.weights[others])
        assert torch.allclose(found[own], (factor * plain[own]).log_softmax(dim=1), atol=1e-4)


def test_the_only_view_of_an_observation_votes_for_its_first_guess():
    embedded = crowded()
    search = search_over(embedded)
    settings = BankSettings(views=("plain",), resize_mode="crop", whitening=1.0)
    found = nested_predictions(search, settings, ())
    queries = np.arange(len(search.truth))
    expected = np.stack([queries, found.log_probabilities.argmax(dim=1), np.ones_like(queries)], axis=1)
    assert found.view_votes.tolist() == expected.tolist()


def test_every_view_of_every_photo_votes_once(search):
    photos = np.bincount(search.embed("crop").observations)
    votes = nested_predictions(search, SETTINGS, ()).view_votes
    counts = np.bincount(votes[:, 0], votes[:, 2])
    assert counts.tolist() == (photos[search.queries] * len(VIEWS)).tolist()


@pytest.mark.parametrize("matcher", ["means", "logistic"])
def test_the_kernel_applies_the_banks_of_every_matcher(matcher):
    embedded = specimens()
    settings = BankSettings(
        views=VIEWS[:2], whitening=1.0, matcher=matcher, nearest_neighbour_weight=0.25, transduction=0.25
    )
    banks = fit_banks(settings, embedded, np.ones(len(embedded.labels), dtype=bool))
    assert [bank.mixture_weight.item() for bank in banks] == [0.75, 0.25]
    # Prototypes that are no means of observations do not move.
    assert [bank.transduction.item() for bank in banks] == [0.25 if matcher == "means" else 0.0] * 2
    queries = torch.tensor(embedded.pooled(settings), dtype=torch.float32)
    probabilities = torch.cat(list(classify(banks, queries))).exp()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(queries)), atol=1e-4)
    assert (probabilities.argmax(dim=1).numpy() == embedded.labels).mean() > 0.9


def centred_logistic(values, labels, reference):
    """The reference implementation: centred embeddings, scikit-learn's model."""
    centred = l2_normalize(values - values[reference].mean(axis=0))
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, tol=1e-3)
    return model.fit(centred[reference].astype(np.float32), labels[reference]), centred


def test_logistic_regression_predicts_as_scikit_learn_at_the_best_temperature_of_a_grid():
    embedded, settings = crowded(), BankSettings(views=("plain",), matcher="logistic")
    everyone = np.ones(len(embedded.labels), dtype=bool)
    values, logits, first = embedded.pooled(settings), [], []
    search = search_over(embedded)
    for reference, queries in search.folds:
        model, centred = centred_logistic(values, embedded.labels, reference)
        logits.append(model.decision_function(centred[queries]))
        first.append(model.predict(centred[queries]))
    evaluation = search.evaluate(settings)
    assert (evaluation.top[:, 0] == np.concatenate(first)).all()
    assert 0.2 < (evaluation.ranks == 0).mean() < 0.95
    logits = np.concatenate(logits)
    grid = {scale: log_loss(search.truth, softmax(scale * logits, axis=1)) for scale in LOGIT_SCALE_FACTORS}
    assert 1.0 in grid  # that of the model
    assert evaluation.logit_scales == (min(grid, key=grid.get),)
    plain = predicted(search, settings)[np.arange(len(logits)), search.truth]
    assert -plain.mean().item() == pytest.approx(min(grid.values()), abs=1e-4)
    # Without held-out observations the model's own is used.
    (bank,) = fit_banks(settings, embedded, everyone)
    found = torch.cat(list(classify([bank], torch.tensor(values, dtype=torch.float32)))).numpy()
    model, centred = centred_logistic(values, embedded.labels, everyone)
    assert np.allclose(found, model.predict_log_proba(centred), atol=1e-4)


def test_the_temperature_of_cosines_is_the_best_of_a_grid_and_does_not_change_the_class_prior():
    embedded, settings = crowded(), BankSettings(views=("plain",), class_prior_exponent=0.5)
    search, values = search_over(embedded), embedded.pooled(settings)
    cosines, priors = [], []
    for reference, queries in search.folds:
        own = [reference & (embedded.labels == index) for index in range(8)]
        centred = l2_normalize(values - values[reference].mean(axis=0))
        means = l2_normalize(np.stack([centred[one].mean(axis=0) for one in own]))
        cosines.append(centred[queries] @ means.T)
        priors.append(np.tile(0.5 * np.log([one.sum() for one in own]), (queries.sum(), 1)))
    cosines, priors = np.concatenate(cosines), np.concatenate(priors)
    scales = 16 * LOGIT_SCALE_FACTORS
    grid = {scale: log_loss(search.truth, softmax(scale * cosines + priors, axis=1)) for scale in scales}
    assert search.evaluate(settings).logit_scales == (min(grid, key=grid.get),)
    plain = predicted(search, settings)[np.arange(len(cosines)), search.truth]
    assert -plain.mean().item() == pytest.approx(min(grid.values()), abs=1e-4)


def test_transduction_makes_the_probabilities_of_a_few_queries_no_higher():
    search = search_over(crowded())
    fixed = BankSettings(views=("plain",), resize_mode="crop", whitening=1.0)
    before, after = (search.evaluate(replace(fixed, transduction=one)) for one in (0.0, 1.0))
    assert after.inverse_temperature == pytest.approx(before.inverse_temperature, rel=0.1)


def test_metadata_are_added_with_their_weight_and_normalised_again():
    embedded = crowded()
    prior = torch.tensor(np.random.default_rng(0).normal(size=(len(embedded.labels), 8))).log_softmax(dim=1)
    search = search_over(embedded, predict_prior=lambda reference, queries: prior[torch.tensor(queries)])
    settings = BankSettings(views=("plain",))
    photos, found = (predicted(search, replace(settings, metadata_weight=weight)) for weight in (0.0, 0.5))
    assert torch.allclose(found, (photos + 0.5 * prior[torch.tensor(search.queries)]).log_softmax(dim=1), atol=1e-5)


def test_metadata_that_are_read_in_slices_predict_the_same(monkeypatch):
    embedded, rng = crowded(), np.random.default_rng(0)
    classes, tables = (
        torch.tensor(rng.normal(size=8)).log_softmax(dim=0),
        {"habitat": torch.tensor(rng.normal(size=(3, 8)))},
    )
    prior = MetadataPrior(classes, {"habitat": ["bog", "dune", "meadow"]}, tables)
    rows = torch.tensor(rng.integers(-1, 3, len(embedded.labels)))

    def by_metadata(reference, queries):
        return WeightedPrior(((1.0, prior, {"habitat": rows[torch.tensor(queries)]}),))

    settings, kept = (
        BankSettings(views=("plain",), metadata_weight=0.5),
        search_over(embedded, predict_prior=by_metadata),
    )
    expected = kept.evaluate(settings)
    assert isinstance(kept.metadata_prior(0), torch.Tensor)
    monkeypatch.setattr(search_module, "MAX_SCORES", 0)
    monkeypatch.setattr(bank_module, "MIN_OBSERVATIONS", 3)
    monkeypatch.setattr(bank_module, "CPU_CHUNK", 0)
    sliced = search_over(embedded, predict_prior=by_metadata)
    found = sliced.evaluate(settings)
    assert isinstance(sliced.metadata_prior(0), WeightedPrior)
    assert np.allclose(found.losses, expected.losses, atol=1e-5)
    assert (found.ranks == expected.ranks).all()


def test_if_no_query_is_of_a_known_class_the_logit_scale_is_that_of_the_fit():
    embedded = crowded()
    known = embedded.labels > 3
    lacking = replace(embedded, labels=np.where(known, embedded.labels, -1))
    search = Search(lambda mode: lacking, "crop", [(known, ~known)], 10, known)
    assert search.evaluate(BankSettings(views=("plain",))).logit_scales == (16.0,)
    assert search.evaluate(BankSettings(views=("plain",), matcher="logistic")).logit_scales == (1.0,)


def test_an_observation_without_a_readable_photo_is_not_part_of_the_bank():
    embedded, settings = specimens(), BankSettings(views=VIEWS[:2])
    readable = embedded.observations != 5
    partly = replace(embedded, values=embedded.values[readable], observations=embedded.observations[readable])
    others = np.arange(len(embedded.labels)) != 5
    found, expected = fit_banks(settings, partly, others | True)[0], fit_banks(settings, embedded, others)[0]
    assert torch.equal(found.prototypes, expected.prototypes)
    assert torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize(("is_good", "kept"), [(True, "head"), (False, "means")])
def test_a_trained_head_is_kept_if_it_beats_class_means_at_their_best(is_good, kept):
    embedded = specimens()
    everyone = np.ones(len(embedded.labels), dtype=bool)
    head = fit_banks(replace(SETTINGS, whitening=1.0), embedded, everyone)[0]  # it was fitted on the queries
    if not is_good:
        head = replace(head, prototypes=head.prototypes.flip(0))
    search = search_over(replace(embedded, head=head))
    start = replace(SETTINGS, matcher="head")
    table: list[dict] = []
    chosen = coordinate_ascent(search, start, ("matcher", "whitening"), every_query(search), table.append)
    assert 0 < len(table) <= most_candidates(start, ("matcher", "whitening"))
    assert chosen.matcher == kept
    assert kept == "head" or chosen.whitening > 0


def test_logistic_regression_is_selected_where_it_separates_classes_that_their_means_do_not():
    # Two classes have one direction of the mean, at different angles to it; scatter within classes hides it.
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    photos = rng.normal(size=(240, 12)) * np.r_[np.full(8, 2.0), np.full(4, 0.4)]
    photos[np.arange(240), 8 + labels] += 1.0
    values = l2_normalize(photos[:, None])
    embedded = Embedded(values, ("plain",), np.arange(240), labels, Taxonomy.unknown(4))
    search = search_over(embedded)
    start = BankSettings(views=("plain",))
    chosen = coordinate_ascent(search, start, ("matcher",), every_query(search))
    assert chosen == replace(start, matcher="logistic")
    assert search.evaluate(chosen).logit_scales != (16.0,)


def test_names_are_chosen_where_they_tell_the_classes_apart_and_not_where_they_do_not():
    embedded, rng = specimens(shots=(1, 2), repeats=12), np.random.default_rng(1)
    pooled = embedded.pooled(SETTINGS)
    centres = np.stack([pooled[embedded.labels == label].mean(axis=0) for label in range(24)])
    names = l2_normalize(centres - pooled.mean(axis=0)) + 5 * l2_normalize(rng.normal(size=16))
    chosen = []
    for texts in (names, rng.permutation(names)):
        search = search_over(replace(embedded, texts=l2_normalize(texts)))
        best = coordinate_ascent(search, replace(SETTINGS, whitening=0.5), ["text_weight"], every_query(search))
        chosen.append(best.text_weight)
    assert chosen[0] > 0
    assert chosen[1] == 0


def test_a_reference_set_has_its_own_texts_among_its_class_means():
    embedded = replace(specimens(), texts=l2_normalize(np.random.default_rng(1).normal(size=(32, 16)) + 2))
    settings, everyone = replace(SETTINGS, whitening=0.5, text_weight=2.0), np.ones(len(embedded.labels), dtype=bool)
    for reference in (everyone, np.arange(len(everyone)) % 5 > 0, everyone):
        [bank] = fit_banks(settings, embedded, reference)
        _, means, sizes = embedded.class_means(settings, reference)
        texts = embedded.aligned_texts(settings, reference)
        expected = l2_normalize(sizes[:, None] * means + 2 * texts)
        assert np.allclose(bank.prototypes, expected, atol=1e-5)
        assert np.linalg.norm(texts, axis=1) == pytest.approx(np.linalg.norm(means[sizes > 0], axis=1).mean(), rel=1e-5)

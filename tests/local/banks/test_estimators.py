"""Estimators give the numbers of scikit-learn, of their formula or of a case worked out by hand.

python -m pytest tests/local/banks/test_estimators.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf, ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from kernel.bank import read_banks
from kernel.ranking import classify
from local.banks import estimators
from local.banks.estimators import (
    ClassMeans,
    LinearProbe,
    NearestNeighbour,
    Whitening,
    WithinClassVariation,
    align_texts,
    centre,
    class_means_bank,
    commonest_classes,
    expand_to_classes,
    group_means,
    l2_normalize,
    make_bank,
    pool,
    reduce_hubness,
    rescale,
    save_banks,
    scale_features,
    transform,
)
from local.data.observations import Taxonomy


def overlapping(classes=5, features=8, seed=0):
    """Overlapping classes of different sizes: a reference set, its labels, as many queries, and the taxonomy.

    The reference set lacks class 1 of the taxonomy.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.delete(np.arange(classes + 1), 1), 3 * np.arange(1, classes + 1) ** 2)
    centres = rng.normal(size=(classes + 1, features))
    reference, queries = (
        l2_normalize(centres[labels] + 1.5 * rng.normal(size=(len(labels), features)) + 0.5) for _ in range(2)
    )
    return reference, labels, queries, Taxonomy.unknown(classes + 1)


def photos_in_views(shots=(1, 2, 3, 4), repeats=6, features=12, seed=0):
    """Photos in two views; their classes differ in the directions in which photos of a class hardly vary.

    Returns:
        embeddings (photos, 2, features) and the label of each photo, which is an observation of its own.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(shots) * repeats), np.tile(shots, repeats))
    centres = rng.normal(size=(len(shots) * repeats, features)) * np.r_[np.zeros(4), np.ones(features - 4)]
    noise = np.r_[np.full(4, 3.0), np.full(features - 4, 0.2)]
    photos = centres[labels][:, None] + rng.normal(size=(len(labels), 2, features)) * noise
    return l2_normalize(photos + 1.0), labels


def log_probabilities(bank, queries):
    return torch.cat(list(classify([bank], torch.tensor(queries, dtype=torch.float32)))).double().numpy()


def test_rows_are_normalized_as_by_scikit_learn_and_rows_of_zeros_stay():
    values = np.random.default_rng(0).normal(size=(5, 4))
    values[2] = 0
    assert np.allclose(l2_normalize(values), normalize(values))


def test_group_means_are_those_of_a_loop_and_zeros_for_an_empty_group():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(30, 3)), rng.choice([0, 1, 3], 30)
    means, sizes = group_means(values, groups, 5)
    assert sizes.tolist() == [int((groups == index).sum()) for index in range(5)]
    for index in range(5):
        expected = values[groups == index].mean(axis=0) if index in (0, 1, 3) else np.zeros(3)
        assert np.allclose(means[index], expected)


def test_an_observation_is_the_mean_of_its_photos_which_are_the_means_of_their_views():
    values = l2_normalize(np.random.default_rng(0).normal(size=(5, 3, 4)))
    observations = np.array([0, 0, 1, 1, 1])
    photos = values.mean(axis=1)
    expected = [l2_normalize(photos[:2].mean(axis=0)), l2_normalize(photos[2:].mean(axis=0)), np.zeros(4)]
    assert np.allclose(pool(values, observations, 3), expected)
    expected = [l2_normalize(photos[:2].max(axis=0)), l2_normalize(photos[2:].max(axis=0)), np.zeros(4)]
    assert np.allclose(pool(values, observations, 3, "max"), expected)


def test_centring_subtracts_the_mean_observation():
    embeddings, labels = photos_in_views()
    values = pool(embeddings, np.arange(len(labels)) // 2)
    assert np.allclose(
        transform(centre(values.mean(axis=0)), values), normalize(values - values.mean(axis=0)), atol=1e-6
    )


def test_whitening_uses_the_shrunk_covariance_of_linear_discriminant_analysis():
    reference, labels, queries, _ = overlapping(features=6)
    labels = np.unique(labels, return_inverse=True)[1]
    fitted = Whitening().fit(reference[:, None], labels)
    means = NearestCentroid().fit(reference, labels).centroids_
    shrinkage = ledoit_wolf_shrinkage(reference - means[labels], assume_centered=True)
    covariance = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage).fit(reference, labels).covariance_
    assert 0.001 < shrinkage < 0.9
    assert np.allclose(fitted.directions_ * fitted.variances_ @ fitted.directions_.T, covariance, atol=1e-9)
    # The exponent is that of the standard deviations: cosines after the layers are those of the formula.
    for exponent in (0.5, 1.0):
        variances, directions = np.linalg.eigh(covariance)
        expected = normalize((queries - reference.mean(axis=0)) @ directions * variances ** (-exponent / 2))
        found = transform(fitted.layers(exponent, reference.mean(axis=0)), queries)
        assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_the_within_class_covariance_includes_the_variation_between_views():
    embeddings, labels = photos_in_views(shots=(2, 3))
    fitted = Whitening().fit(embeddings, labels)
    photos = embeddings.mean(axis=1)
    means = NearestCentroid().fit(photos, labels).centroids_
    residuals = (embeddings - means[labels][:, None]).reshape(-1, embeddings.shape[2])
    covariance = residuals.T @ residuals / len(residuals)
    shrinkage = ledoit_wolf_shrinkage(photos - means[labels], assume_centered=True)
    expected = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(12)
    assert np.allclose(fitted.directions_ * fitted.variances_ @ fitted.directions_.T, expected, atol=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_layers_for_scaled_features_are_those_of_features_that_were_scaled_before(exponent):
    embeddings, labels = photos_in_views()
    scales = np.r_[np.full(5, 0.5), np.zeros(3), np.full(4, 2.0)]
    scaled = (embeddings * scales)[:, :, scales > 0]
    variation = WithinClassVariation.of(embeddings, labels).scaled(scales)
    means = [values.mean(axis=(0, 1)) for values in (scaled, embeddings)]
    expected = transform(Whitening().fit(scaled, labels).layers(exponent, means[0]), scaled[:, 0])
    fitted = Whitening().fit_variation(variation).layers(exponent, (means[1] * scales)[scales > 0])
    found = transform(scale_features(fitted, scales), embeddings[:, 0])
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("seconds", [0, 1])
def test_where_hardly_any_class_has_a_second_photo_the_shrinkage_is_estimated_from_views(seconds):
    embeddings, _ = photos_in_views()
    labels = np.maximum(np.arange(len(embeddings)) - seconds, 0)  # the first class has as many second photos
    fitted = Whitening().fit(embeddings, labels)
    means, _ = group_means(embeddings.mean(axis=1), labels, labels.max() + 1)
    residuals = (embeddings - means[labels][:, None]).reshape(-1, embeddings.shape[2])
    expected = ledoit_wolf(residuals, assume_centered=True)[0]
    assert np.allclose(fitted.directions_ * fitted.variances_ @ fitted.directions_.T, expected, atol=1e-9)
    assert fitted.variances_[0] * 1.1 < fitted.variances_[-1]  # they whiten


def test_single_photos_in_one_view_leave_the_directions_as_they_are():
    embeddings, _ = photos_in_views()
    fitted = Whitening().fit(embeddings[:, :1], np.arange(len(embeddings)))
    assert np.allclose(fitted.variances_, 0)
    values, mean = embeddings[:, 0], embeddings[:, 0].mean(axis=0)
    whitened, centred = (transform(layers, values) for layers in (fitted.layers(1.0, mean), centre(mean)))
    assert np.allclose(whitened @ whitened.T, centred @ centred.T, atol=1e-5)


def test_whitening_recognises_classes_that_centring_does_not():
    embeddings, labels = photos_in_views()
    observations, taxonomy = np.arange(len(labels)), Taxonomy.unknown(labels.max() + 1)
    noise = np.random.default_rng(9).normal(size=embeddings[:, 0].shape) * np.r_[np.full(4, 0.5), np.zeros(8)]
    queries, reference, recalls = l2_normalize(embeddings.mean(axis=1) + noise), pool(embeddings, observations), []
    mean = reference.mean(axis=0)
    for layers in (centre(mean), Whitening().fit(embeddings, labels).layers(1.0, mean)):
        bank = make_bank(layers, ClassMeans().fit(transform(layers, reference), labels, taxonomy))
        recalls.append((log_probabilities(bank, queries).argmax(axis=1) == labels).mean())
    assert recalls[1] > recalls[0] + 0.2


def test_class_means_give_the_cosines_to_the_centroids_of_scikit_learn():
    reference, labels, queries, taxonomy = overlapping()
    present = np.unique(labels)
    expected = log_softmax(16 * queries @ normalize(NearestCentroid().fit(reference, labels).centroids_).T, axis=1)
    found = log_probabilities(make_bank([], ClassMeans().fit(reference, labels, taxonomy)), queries)
    assert np.allclose(found[:, present], expected, atol=1e-4)
    assert (found[:, 1] < -50).all()  # the class that the reference set lacks


def test_the_weight_of_a_prototype_in_transduction_is_the_length_of_the_sum_of_its_observations():
    reference, labels, _, taxonomy = overlapping()
    fitted = ClassMeans().fit(reference, labels, taxonomy)
    sums = [np.linalg.norm(reference[labels == index].sum(axis=0)) for index in range(6)]
    assert np.allclose(fitted.counts_, sums)


def shrunk_means(reference, labels, taxonomy, genus, family):
    """The formula of `ClassMeans`, in loops: every mean of relatives counts as so many observations."""
    present = np.unique(labels)
    means = {index: reference[labels == index].mean(axis=0) for index in present}
    prototypes = np.zeros((len(taxonomy.genus), reference.shape[1]))
    for index, (own_genus, own_family) in enumerate(zip(taxonomy.genus, taxonomy.family, strict=True)):
        total = reference[labels == index].sum(axis=0)
        in_family = [other for other in present if taxonomy.family[other] == own_family and other != index]
        siblings = [other for other in present if taxonomy.genus[other] == own_genus and other != index]
        if siblings:
            total = total + genus * np.mean([means[other] for other in siblings], axis=0)
        genera = {taxonomy.genus[other] for other in in_family} - {own_genus}
        if genera:
            of_genera = [
                np.mean([means[other] for other in in_family if taxonomy.genus[other] == one], axis=0) for one in genera
            ]
            total = total + family * np.mean(of_genera, axis=0)
        prototypes[index] = total
    return l2_normalize(prototypes)


@pytest.mark.parametrize("seed", range(5))
def test_prototypes_are_shrunk_towards_genus_and_family_by_the_formula(seed):
    rng = np.random.default_rng(seed)
    genus = rng.integers(0, 9, 20)
    taxonomy = Taxonomy(genus, genus // 3)
    labels = rng.integers(0, 18, 30)  # some classes have no observation
    reference = l2_normalize(rng.normal(size=(30, 5)))
    weights = rng.random(2)
    fitted = ClassMeans(*weights).fit(reference, labels, taxonomy)
    assert np.allclose(fitted.prototypes_, shrunk_means(reference, labels, taxonomy, *weights))


def test_a_class_of_one_observation_learns_from_its_genus_and_a_class_of_many_hardly():
    means = l2_normalize(np.random.default_rng(0).normal(size=(3, 6)))
    labels, taxonomy = np.repeat([0, 1, 2], [1, 50, 1]), Taxonomy(np.array([0, 0, 1]), np.array([0, 0, 0]))
    shrunk = ClassMeans(genus=0.5).fit(means[labels], labels, taxonomy).prototypes_
    assert np.allclose(shrunk[0], l2_normalize((means[0] + 0.5 * means[1]) / 1.5))
    assert np.allclose(shrunk[1], l2_normalize((50 * means[1] + 0.5 * means[0]) / 50.5))
    assert np.allclose(shrunk[2], means[2])  # alone in its genus
    shrunk = ClassMeans(family=0.5).fit(means[labels], labels, taxonomy).prototypes_
    assert np.allclose(shrunk[2], l2_normalize((means[2] + 0.5 * (means[0] + means[1]) / 2) / 1.5))


@pytest.mark.parametrize("exponent", [0.0, 0.75])
def test_texts_are_centred_whitened_and_as_long_as_the_class_means_on_average(exponent):
    rng, (photos, labels) = np.random.default_rng(0), photos_in_views()
    texts = l2_normalize(rng.normal(size=(labels.max() + 1, photos.shape[2])) + 3)  # in a cone of their own
    texts[4] = 0  # a class without a name
    pooled = pool(photos, np.arange(len(labels)))
    whitening = Whitening().fit(photos, labels)
    layers = whitening.layers(exponent, pooled.mean(axis=0)) if exponent else centre(pooled.mean(axis=0))
    means, sizes = group_means(transform(layers, pooled), labels, len(texts))
    named = np.arange(len(texts)) != 4
    centred = texts - texts[named].mean(axis=0)
    weight = whitening.directions_ * whitening.variances_ ** (-exponent / 2) if exponent else np.eye(len(centred.T))
    expected = named[:, None] * l2_normalize(centred @ weight) * np.linalg.norm(means, axis=1).mean()
    assert np.allclose(align_texts(texts, layers, means, sizes), expected, atol=1e-5)


def test_the_name_of_a_class_counts_as_so_many_observations():
    rng, sizes = np.random.default_rng(0), np.array([1, 3, 0, 20])
    means, texts = rng.normal(size=(4, 5)) * (sizes > 0)[:, None], rng.normal(size=(4, 5))
    texts[1] = 0  # without a name
    taxonomy = Taxonomy(np.array([0, 0, 1, 1]), np.zeros(4, dtype=int))
    fitted = ClassMeans(genus=0.5, text=2.0).fit_means(means, sizes, taxonomy, texts)
    expected = [means[0] + 0.5 * means[1] + 2 * texts[0], 3 * means[1] + 0.5 * means[0]]
    expected += [0.5 * means[3] + 2 * texts[2], 20 * means[3] + 2 * texts[3]]
    assert np.allclose(fitted.prototypes_, l2_normalize(np.array(expected)))
    assert fitted.bias_.tolist() == [0, 0, estimators.ABSENT, 0]  # a name alone is no observation
    norms = [np.linalg.norm(total) / weight for total, weight in zip(expected, [3.5, 3.5, 2.5, 22], strict=True)]
    assert np.allclose(fitted.counts_, sizes * norms)


def family_terms(genus, family, present=None):
    """Of each class the weights of all classes in its family term; None if it has no term.

    The class means are orthogonal, so that a prototype shows its composition. A class that is `present` has one
    observation, which counts as much as its family.
    """
    classes = np.arange(len(genus)) if present is None else np.flatnonzero(present)
    taxonomy = Taxonomy(np.array(genus), np.array(family))
    fitted = ClassMeans(family=1.0).fit(np.eye(len(genus))[classes], classes, taxonomy)
    terms = []
    for index, prototype in enumerate(fitted.prototypes_):
        own = prototype[index] if index in classes else prototype.sum()
        term = np.where(np.arange(len(genus)) == index, 0.0, prototype)
        terms.append((term / own).tolist() if term.any() else None)
    return terms


def test_the_family_of_a_class_is_the_mean_of_the_other_genera_and_never_of_its_own():
    # Genus 0 has three classes, genus 1 one.
    terms = family_terms([0, 0, 0, 1], [0, 0, 0, 0])
    assert terms[:3] == [pytest.approx([0, 0, 0, 1])] * 3
    assert terms[3] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_every_other_genus_of_a_family_counts_the_same_whatever_its_classes():
    terms = family_terms([0, 1, 1, 2], [0, 0, 0, 0])
    assert terms[0] == pytest.approx([0, 1 / 4, 1 / 4, 1 / 2])
    assert terms[1:3] == [pytest.approx([1 / 2, 0, 0, 1 / 2])] * 2
    assert terms[3] == pytest.approx([1 / 2, 1 / 4, 1 / 4, 0])


def test_a_class_whose_genus_is_not_named_is_a_genus_of_its_own_in_its_family():
    # Genera 5 and 6 stand for two classes without a named genus.
    terms = family_terms([0, 0, 5, 6], [0, 0, 0, 0])
    assert terms[:2] == [pytest.approx([0, 0, 1 / 2, 1 / 2])] * 2
    assert terms[2] == pytest.approx([1 / 4, 1 / 4, 0, 1 / 2])


def test_a_family_of_one_genus_and_a_class_without_a_family_have_no_family_term():
    # The last class has the genus of the two before it, and no family.
    assert family_terms([0, 0, 1, 1, 1], [0, 0, 1, 1, 2]) == [None] * 5


def test_a_class_that_the_reference_set_lacks_adds_nothing_to_its_family():
    terms = family_terms([0, 0, 1, 2], [0, 0, 0, 0], present=[True, True, True, False])
    assert terms[:2] == [pytest.approx([0, 0, 1, 0])] * 2
    assert terms[2] == pytest.approx([1 / 2, 1 / 2, 0, 0])
    assert terms[3] == pytest.approx([1 / 4, 1 / 4, 1 / 2, 0])
    assert family_terms([0, 1], [0, 0], present=[True, False]) == [None, pytest.approx([1, 0])]


def test_the_nearest_neighbour_is_that_of_scikit_learn():
    reference, labels, queries, taxonomy = overlapping()
    order, present = np.random.default_rng(1).permutation(len(labels)), np.unique(labels)
    bank = make_bank([], NearestNeighbour().fit(reference[order], labels[order], taxonomy))
    found = log_probabilities(bank, queries)[:, present]
    nearest = np.stack([(queries @ reference[labels == index].T).max(axis=1) for index in present], axis=1)
    assert np.allclose(found, log_softmax(16 * nearest, axis=1), atol=1e-4)
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(reference, labels)
    assert (present[found.argmax(axis=1)] == neighbour.predict(queries)).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_gives_the_log_probabilities_of_scikit_learn(classes):
    reference, labels, queries, taxonomy = overlapping(classes)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, tol=1e-3)
    model.fit(reference.astype(np.float32), labels)
    assert 0.3 < model.score(queries, labels) < 0.95
    matcher = LinearProbe().fit(reference, labels, taxonomy)
    found = log_probabilities(make_bank([], matcher), queries)
    assert np.allclose(found[:, model.classes_], model.predict_log_proba(queries), atol=1e-4)
    assert (found[:, 1] < -50).all()
    # At another logit scale all logits are multiplied, so that the first guess stays.
    logits = model.predict_log_proba(queries)
    for logit_scale in (0.25, 4.0):
        rescaled = log_probabilities(make_bank([], matcher, logit_scale), queries)
        assert np.allclose(rescaled[:, model.classes_], log_softmax(logit_scale * logits, axis=1), atol=1e-4)
        assert (rescaled.argmax(axis=1) == found.argmax(axis=1)).all()
        assert (rescaled[:, 1] < -50).all()


def test_rescaling_multiplies_all_logits_and_leaves_absent_classes_absent():
    reference, labels, queries, taxonomy = overlapping()
    bank = make_bank([], ClassMeans().fit(reference, labels, taxonomy))
    bank = replace(bank, bias=bank.bias + torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0]))
    cosines = queries @ bank.prototypes.double().numpy().T
    logits = 3 * (cosines + bank.bias.double().numpy() / 16)
    present = np.unique(labels)
    found = log_probabilities(rescale(bank, 3.0), queries)
    assert np.allclose(found[:, present], log_softmax(logits[:, present], axis=1), atol=1e-4)
    assert (found[:, 1] < -50).all()


def test_the_simplest_bank_is_the_centred_class_means():
    reference, labels, queries, _ = overlapping()
    mean = reference.mean(axis=0)
    centroids = NearestCentroid().fit(l2_normalize(reference - mean), labels).centroids_
    expected = log_softmax(16 * normalize(queries - mean) @ normalize(centroids).T, axis=1)
    found = log_probabilities(class_means_bank(reference, labels, 6), queries)
    assert np.allclose(found[:, np.unique(labels)], expected, atol=1e-4)


def test_a_bank_over_more_classes_gives_the_same_probabilities_and_never_predicts_the_others():
    reference, labels, queries, _ = overlapping()
    bank = class_means_bank(reference, np.unique(labels, return_inverse=True)[1], 5)
    expanded = expand_to_classes(bank, ["b", "a", "e", "c", "g"], ["a", "b", "c", "d", "e", "f", "g"])
    before, after = log_probabilities(bank, queries), log_probabilities(expanded, queries)
    assert np.allclose(after[:, [1, 0, 4, 2, 6]], before, atol=1e-4)
    assert (after[:, [3, 5]] < -50).all()


@pytest.mark.parametrize("matcher", [LinearProbe(), ClassMeans(), NearestNeighbour()])
def test_the_kernel_reads_the_banks_that_were_saved(matcher, tmp_path):
    embeddings, labels = photos_in_views(shots=(4, 5))
    observations, taxonomy = np.arange(len(labels)), Taxonomy.unknown(labels.max() + 2)
    reference = pool(embeddings, observations)
    layers = Whitening().fit(embeddings, labels).layers(1.0, reference.mean(axis=0))
    matcher.fit(transform(layers, reference), labels, taxonomy)
    banks = [make_bank(layers, matcher, 16.0, mixture_weight=0.5)] * 2
    save_banks(banks, tmp_path / "bank.safetensors")
    read = read_banks(tmp_path / "bank.safetensors")
    assert len(read) == 2
    queries = torch.tensor(reference, dtype=torch.float32)
    for before, after in zip(classify(banks, queries), classify(read, queries), strict=True):
        assert torch.equal(before, after)


def test_the_commonest_classes_come_first_and_equal_ones_in_their_order():
    class_ids = np.array(["5", "2", "5", "9", "2", "5"])
    assert commonest_classes(class_ids, ["2", "5", "9"], 2) == ["5", "2"]
    assert commonest_classes(class_ids, ["1", "9", "0", "2", "5"], 5) == ["5", "2", "9", "1", "0"]


def test_the_hubness_of_a_class_is_the_smooth_maximum_of_its_cosines_to_other_classes():
    reference, labels, _, taxonomy = overlapping()
    bank = make_bank([], ClassMeans().fit(reference, labels, taxonomy))
    reduced = reduce_hubness(bank, reference, labels, weight=0.5)
    for label in np.unique(labels):
        cosines = reference[labels != label] @ bank.prototypes[label].double().numpy()
        hubness = np.log(np.exp(8 * cosines).mean()) / 8
        assert float(reduced.bias[label]) == pytest.approx(float(-0.5 * bank.logit_scale * hubness), abs=1e-5)
    assert reduced.bias[1] == estimators.ABSENT


def test_a_prototype_amid_the_other_classes_takes_their_queries_until_its_hubness_is_reduced():
    def direction(from_pole: float, around: float) -> list[float]:
        tilt, turn = np.radians([from_pole, around])
        return [np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), np.cos(tilt)]

    reference = np.array([direction(70, 0), direction(70, 120), direction(70, 240), direction(0, 0)])
    bank = make_bank([], ClassMeans().fit(reference, np.arange(4), Taxonomy.unknown(4)))
    reduced = reduce_hubness(bank, reference, np.arange(4), weight=0.5)
    query = torch.tensor([direction(33, 0)], dtype=torch.float32)
    first = [int(torch.cat(list(classify([one], query))).argmax()) for one in (bank, reduced)]
    assert first == [3, 0]

"""Banks are fitted by their definitions, and the kernel applies what was fitted."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as RidgeRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from kernel.bank import classify, read_banks
from local.banks.estimators import (
    Centring,
    ClassMeans,
    Logistic,
    Ridge,
    SeveralPrototypes,
    Whitening,
    apply,
    centroids,
    commonest_classes,
    make_bank,
    pool,
    save_banks,
    unit,
)
from local.data.taxonomy import Taxonomy

RNG = np.random.default_rng(0)


def nuisance(shots=(1, 2, 3, 4), repeats=6, features=12, seed=0):
    """Photos whose classes differ in a few directions, and which vary most where no class does.

    Returns:
        embeddings (photos, 2 views, features), observations, classes per photo.
    """
    rng = np.random.default_rng(seed)
    sizes = np.tile(shots, repeats)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), features)) * np.r_[np.zeros(4), np.ones(features - 4)]
    noise = np.r_[np.full(4, 3.0), np.full(features - 4, 0.2)]
    photos = centres[classes][:, None] + rng.normal(size=(len(classes), 2, features)) * noise
    return unit(photos + 1.0), np.arange(len(classes)), classes


def hits(transform, matcher, queries, truth):
    bank = make_bank(transform, matcher, 16.0)
    scores = torch.cat(list(classify([bank], torch.tensor(queries, dtype=torch.float32))))
    return (scores.argmax(dim=1).numpy() == truth).mean()


def test_a_prototype_is_the_direction_of_its_classs_mean():
    values, classes = unit(RNG.normal(size=(6, 4))), np.array([1, 0, 1, 0, 1, 2])
    bank, centred = centroids(values, classes, 3), unit(values - values.mean(axis=0))
    assert np.allclose(bank.prototypes[1], unit(centred[[0, 2, 4]].mean(axis=0)), atol=1e-6)
    assert np.allclose(bank.layers[0].bias, -values.mean(axis=0), atol=1e-6)


def test_a_class_that_the_reference_lacks_is_never_guessed_first():
    bank = centroids(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]), 3)
    answers = torch.cat(list(classify([bank], torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))))
    assert set(answers.argmax(dim=1).tolist()) == {0, 1}


def test_an_observation_pools_its_photos_after_their_views():
    values = unit(RNG.normal(size=(5, 3, 4)))
    owners = np.array([0, 0, 1, 1, 1])
    photos = values.mean(axis=1)
    assert np.allclose(pool(values, owners, 3)[0], unit(photos[:2].sum(axis=0)))
    assert (pool(values, owners, 3)[2] == 0).all()
    assert np.allclose(pool(values, owners, 3, "max")[1], unit(photos[2:].max(axis=0)))


def test_whitening_makes_the_variation_within_classes_alike_in_all_directions():
    rng = np.random.default_rng(1)
    classes = np.repeat(np.arange(40), 50)
    spread = np.array([2.0, 1.0, 0.5, 0.25])
    photos = rng.normal(size=(40, 4))[classes] * 5 + rng.normal(size=(2000, 4)) * spread
    fitted = Whitening().fit(photos[:, None], np.arange(2000), classes, Taxonomy.unknown(40))
    white = photos @ fitted.layers_[0].weight.double().numpy()
    means = np.stack([white[classes == index].mean(axis=0) for index in range(40)])
    residual = np.cov((white - means[classes]).T)
    assert np.allclose(residual / residual[0, 0], np.eye(4), atol=0.1)


def test_whitening_finds_classes_that_centring_cannot():
    embeddings, observations, classes = nuisance()
    rng = np.random.default_rng(9)
    taxonomy = Taxonomy.unknown(classes.max() + 1)
    fresh = unit(
        embeddings.mean(axis=1) + rng.normal(size=embeddings[:, 0].shape) * np.r_[np.full(4, 0.5), np.zeros(8)]
    )
    reference, rates = pool(embeddings, observations, len(classes)), []
    for transform in (Centring(), Whitening()):
        layers = transform.fit(embeddings, observations, classes, taxonomy).layers_
        matcher = ClassMeans().fit(apply(layers, reference), observations, classes, taxonomy)
        rates.append(hits(layers, matcher, fresh, classes))
    assert rates[1] > rates[0] + 0.2


def test_a_class_of_one_observation_learns_from_its_genus_and_a_class_of_many_hardly():
    means = unit(RNG.normal(size=(3, 6)))
    values, classes = (
        np.concatenate([means[:1], np.repeat(means[1:2], 50, axis=0), means[2:]]),
        np.repeat([0, 1, 2], [1, 50, 1]),
    )
    taxonomy = Taxonomy(np.array([0, 0, 1]), np.array([0, 0, 0]))
    given = (np.arange(52), classes, taxonomy)
    alone, drawn = ClassMeans().fit(values, *given), ClassMeans(genus=0.5).fit(values, *given)
    expected = unit((means[0] + 0.5 * means[1]) / 1.5)
    assert np.allclose(drawn.prototypes_[0], expected)
    assert drawn.prototypes_[1] @ alone.prototypes_[1] > 0.999
    assert np.allclose(drawn.prototypes_[2], alone.prototypes_[2])  # alone in its genus
    family = ClassMeans(family=0.5).fit(values, *given)
    others = np.stack([means[0], means[1]]).mean(axis=0)
    assert np.allclose(family.prototypes_[2], unit((means[2] + 0.5 * others) / 1.5))


def family_terms(genus, family, present=None):
    """Of each class the weights that all classes have in its family term; None where it has no term.

    The classes' means are orthogonal, so that a prototype shows what it is made of. A class that is `present` has one
    observation, which weighs as much as its family.
    """
    classes = np.arange(len(genus)) if present is None else np.flatnonzero(present)
    taxonomy = Taxonomy(np.array(genus), np.array(family))
    fitted = ClassMeans(family=1.0).fit(np.eye(len(genus))[classes], np.arange(len(classes)), classes, taxonomy)
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


def test_every_other_genus_of_a_family_counts_alike_whatever_its_classes():
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
    # The last class has a genus like the two before it, and no family.
    assert family_terms([0, 0, 1, 1, 1], [0, 0, 1, 1, 2]) == [None] * 5


def test_a_class_that_the_reference_lacks_adds_nothing_to_its_family():
    terms = family_terms([0, 0, 1, 2], [0, 0, 0, 0], present=[True, True, True, False])
    assert terms[:2] == [pytest.approx([0, 0, 1, 0])] * 2
    assert terms[2] == pytest.approx([1 / 2, 1 / 2, 0, 0])
    assert terms[3] == pytest.approx([1 / 4, 1 / 4, 1 / 2, 0])
    lacking = family_terms([0, 1], [0, 0], present=[True, False])
    assert lacking == [None, pytest.approx([1, 0])]


def test_several_prototypes_find_a_class_that_looks_like_two():
    rng = np.random.default_rng(2)
    corners = np.array([[1.0, 0.05, 0], [0, 0.05, 1.0], [0.5, 0.1, 0.5], [0, 1, 0]])
    values = unit(np.repeat(corners, 8, axis=0) + rng.normal(size=(32, 3)) * 0.02)
    classes = np.repeat([0, 0, 1, 2], 8)
    given, queries = (np.arange(32), classes, Taxonomy.unknown(3)), unit(corners)
    several = SeveralPrototypes(most=2).fit(values, *given)
    assert np.bincount(several.owners_).tolist() == [2, 2, 2]
    truth = np.array([0, 0, 1, 2])
    assert hits([], several, queries, truth) == 1
    every = SeveralPrototypes(most=32).fit(values, *given)
    assert len(every.prototypes_) == 32


@pytest.mark.parametrize("matcher", [Ridge(), Ridge(width=256), Logistic(), ClassMeans(), SeveralPrototypes()])
def test_every_matcher_learns_and_the_kernel_reads_what_was_saved(matcher, tmp_path):
    embeddings, observations, classes = nuisance(shots=(4, 5))
    taxonomy = Taxonomy.unknown(classes.max() + 2)  # one class has no observation
    layers = Whitening().fit(embeddings, observations, classes, taxonomy).layers_
    reference = pool(embeddings, observations, len(classes))
    matcher.fit(apply(layers, reference), observations, classes, taxonomy)
    assert hits(layers, matcher, reference, classes) > 0.8
    bank = make_bank(layers, matcher, 16.0, share=0.5, transduction=0.25)
    save_banks([bank, bank], tmp_path / "bank.safetensors")
    queries = torch.tensor(reference, dtype=torch.float32)
    read = read_banks(tmp_path / "bank.safetensors")
    assert len(read) == 2
    for before, after in zip(classify([bank, bank], queries), classify(read, queries), strict=True):
        assert torch.allclose(before, after, atol=1e-4)
        assert (before.argmax(dim=1) <= classes.max()).all()


def overlapping(classes=5, features=8, seed=0):
    """Unit vectors of classes that overlap and differ in size: a reference, its labels, and queries.

    The labels leave out class 1 of the taxonomy, which the reference lacks.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.delete(np.arange(classes + 1), 1), 3 * np.arange(1, classes + 1) ** 2)
    centres = rng.normal(size=(classes + 1, features))
    reference, queries = (
        unit(centres[labels] + 1.5 * rng.normal(size=(len(labels), features)) + 0.5) for _ in range(2)
    )
    return reference, labels, queries, Taxonomy.unknown(classes + 1)


def log_probabilities(bank, queries):
    return torch.cat(list(classify([bank], torch.tensor(queries, dtype=torch.float32)))).double().numpy()


@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_gives_the_log_probabilities_of_scikit_learn(classes):
    reference, labels, queries, taxonomy = overlapping(classes)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300, tol=1e-3).fit(reference, labels)
    assert 0.3 < model.score(queries, labels) < 0.95
    matcher = Logistic().fit(reference, np.arange(len(labels)), labels, taxonomy)
    found = log_probabilities(make_bank([], matcher), queries)
    assert np.allclose(found[:, model.classes_], model.predict_log_proba(queries), atol=1e-4)
    assert (found[:, 1] < -50).all()
    # At another temperature all of the logits are multiplied, so that the first guess stays.
    logits = model.decision_function(queries)
    logits = np.stack([-logits / 2, logits / 2], axis=1) if classes == 2 else logits
    for scale in (0.25, 4.0):
        warmer = log_probabilities(make_bank([], matcher, scale), queries)
        assert np.allclose(warmer[:, model.classes_], log_softmax(scale * logits, axis=1), atol=1e-4)
        assert (warmer.argmax(axis=1) == model.predict(queries)).all()
        assert (warmer[:, 1] < -50).all()


@pytest.mark.parametrize("width", [0, 64])
def test_ridge_gives_the_cosines_to_the_coefficients_of_scikit_learn(width):
    reference, labels, queries, taxonomy = overlapping()
    seen, asked = reference, queries
    if width:
        random = np.random.default_rng(0).standard_normal((reference.shape[1], width))
        seen, asked = (unit(np.maximum(values @ random, 0)) for values in (reference, queries))
    model = RidgeRegression(alpha=0.1 * (seen**2).sum() / len(seen), fit_intercept=False)
    model.fit(seen, np.eye(6)[labels])
    kept = np.unique(labels)
    expected = log_softmax(16 * asked @ unit(model.coef_[kept]).T, axis=1)
    matcher = Ridge(width=width).fit(reference, np.arange(len(labels)), labels, taxonomy)
    assert np.allclose(log_probabilities(make_bank([], matcher), queries)[:, kept], expected, atol=1e-4)


def test_class_means_give_the_cosines_to_the_centroids_of_scikit_learn():
    reference, labels, queries, taxonomy = overlapping()
    model, kept = NearestCentroid().fit(reference, labels), np.unique(labels)
    expected = log_softmax(16 * queries @ unit(model.centroids_).T, axis=1)
    matcher = ClassMeans().fit(reference, np.arange(len(labels)), labels, taxonomy)
    assert np.allclose(log_probabilities(make_bank([], matcher), queries)[:, kept], expected, atol=1e-4)


def test_every_observation_a_prototype_is_the_nearest_neighbour_of_scikit_learn():
    reference, labels, queries, taxonomy = overlapping()
    kept = np.unique(labels)
    matcher = SeveralPrototypes(most=len(labels)).fit(reference, np.arange(len(labels)), labels, taxonomy)
    found = log_probabilities(make_bank([], matcher), queries)[:, kept]
    nearest = np.stack([(queries @ reference[labels == index].T).max(axis=1) for index in kept], axis=1)
    assert np.allclose(found, log_softmax(16 * nearest, axis=1), atol=1e-4)
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(reference, labels)
    assert (kept[found.argmax(axis=1)] == neighbour.predict(queries)).all()


def test_several_prototypes_are_the_centres_of_scikit_learns_k_means():
    reference, labels, queries, taxonomy = overlapping()
    centres = {
        index: KMeans(3, n_init=1, random_state=0).fit(own).cluster_centers_ if len(own) > 3 else own
        for index in np.unique(labels)
        if len(own := reference[labels == index])
    }
    nearest = np.stack([(queries @ unit(own).T).max(axis=1) for own in centres.values()], axis=1)
    matcher = SeveralPrototypes().fit(reference, np.arange(len(labels)), labels, taxonomy)
    found = log_probabilities(make_bank([], matcher), queries)[:, list(centres)]
    assert np.allclose(found, log_softmax(16 * nearest, axis=1), atol=1e-4)


def test_whitening_is_by_the_shrunk_covariance_of_linear_discriminant_analysis():
    reference, labels, queries, taxonomy = overlapping(features=6)
    labels = np.unique(labels, return_inverse=True)[1]
    fitted = Whitening().fit(reference[:, None], np.arange(len(labels)), labels, taxonomy)
    means = np.stack([reference[labels == index].mean(axis=0) for index in range(5)])
    shrinkage = ledoit_wolf_shrinkage(reference - means[labels], assume_centered=True)
    covariance = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage).fit(reference, labels).covariance_
    assert 0.001 < shrinkage < 0.9
    assert np.allclose(fitted.directions_ * fitted.variances_ @ fitted.directions_.T, covariance, atol=1e-9)
    # Half an exponent takes a fourth root: cosines after the layers are those of the formula.
    for exponent in (0.5, 1.0):
        values, vectors = np.linalg.eigh(covariance)
        expected = unit((queries - reference.mean(axis=0)) @ vectors * values ** (-exponent / 2))
        found = apply(fitted.layers(exponent, reference.mean(axis=0)), queries)
        assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_views_count_as_variation_within_classes():
    embeddings, observations, classes = nuisance(shots=(2, 3))
    fitted = Whitening().fit(embeddings, observations, classes, Taxonomy.unknown(classes.max() + 1))
    photos = embeddings.mean(axis=1)
    means = np.stack([photos[classes == index].mean(axis=0) for index in range(classes.max() + 1)])
    residuals = (embeddings - means[classes][:, None]).reshape(-1, embeddings.shape[2])
    scatter = residuals.T @ residuals / len(residuals)
    shrinkage = ledoit_wolf_shrinkage(photos - means[classes], assume_centered=True)
    expected = (1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
    assert np.allclose(fitted.directions_ * fitted.variances_ @ fitted.directions_.T, expected, atol=1e-9)


def test_two_classes_are_enough_for_a_linear_classifier():
    values, classes = unit(RNG.normal(size=(8, 5)) + np.repeat([[3.0], [-3.0]], 4, axis=0)), np.repeat([0, 1], 4)
    matcher = Logistic().fit(values, np.arange(8), classes, Taxonomy.unknown(2))
    assert hits([], matcher, values, classes) == 1


def test_the_prior_is_the_commonest_classes_first():
    assert commonest_classes(np.array(["5", "2", "5", "9", "2", "5"]), ["2", "5", "9"], 2) == ["5", "2"]

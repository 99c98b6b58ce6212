"""A projection ensemble learns what class means cannot, the kernel computes the same, and useless training is undone.

python -m pytest tests/local/banks/test_projection.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestCentroid
from torch.nn.functional import normalize

from kernel.bank import read_banks
from kernel.ranking import classify
from local.banks.estimators import class_means_bank, l2_normalize, pool, save_banks
from local.banks.fitting import Embedded, fit_banks
from local.banks.folds import make_folds
from local.banks.projection import (
    ProjectionEnsemble,
    ProjectionMember,
    ReferenceSet,
    contrastive_loss,
)
from local.banks.search import Search
from local.data.observations import Taxonomy
from local.recipes.settings import BankSettings

CLASSES, FEATURES, VIEWS = 12, 24, 3
SMALL = {"members": 3, "hidden": 64, "width": 16, "steps": 60, "batch_size": 64}


def nuisance_problem(per_class: int, seed: int, classes: int = CLASSES, nuisance: float = 1.5):
    """Classes that differ in 8 directions of a rotated space, and photos that vary most in 8 others.

    Returns:
        embeddings (photos, views, features) of two photos per observation, and the observation and class of each photo.
    """
    rng = np.random.default_rng(7)  # the classes are the same for every seed
    rotation = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
    centres, common = rng.standard_normal((classes, 8)), 3 * rng.standard_normal(FEATURES)
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), per_class)
    observations = np.repeat(np.arange(len(truth)), 2)
    signal = centres[truth][observations][:, None] + 0.2 * rng.standard_normal((len(observations), VIEWS, 8))
    disturbing = np.repeat(rng.standard_normal((len(truth), 1, 8)), 2, axis=0).repeat(VIEWS, axis=1) * nuisance
    rest = 0.2 * rng.standard_normal((len(observations), VIEWS, FEATURES - 16))
    values = np.concatenate([signal, disturbing, rest], axis=2) @ rotation + common
    return l2_normalize(values), observations, truth[observations]


def recall(banks, embeddings, observations, classes) -> float:
    """Recall@1 of queries, by the kernel."""
    queries = torch.tensor(pool(embeddings, observations), dtype=torch.float32)
    best = torch.cat(list(classify(banks, queries))).argmax(dim=1).numpy()
    return float((best == classes[np.unique(observations, return_index=True)[1]]).mean())


@pytest.fixture(scope="module")
def problem():
    return *nuisance_problem(per_class=4, seed=1), Taxonomy.unknown(CLASSES)


@pytest.fixture(scope="module")
def ensemble(problem) -> ProjectionEnsemble:
    return ProjectionEnsemble(0.0, **SMALL).fit(*problem)


def test_networks_ignore_a_nuisance_that_misleads_centred_means(problem, ensemble) -> None:
    embeddings, observations, classes, _ = problem
    means = class_means_bank(pool(embeddings, observations), classes[::2], CLASSES)
    queries = nuisance_problem(per_class=20, seed=2)
    assert ensemble.steps_ > 0
    assert recall(ensemble.banks_, *queries) > recall([means], *queries) + 0.1


@pytest.mark.parametrize("features", [FEATURES, 6])
def test_before_training_a_member_is_the_class_means_in_principal_directions(problem, features) -> None:
    embeddings, observations, classes, _ = problem
    everyone = np.ones(4 * CLASSES, dtype=bool)
    member = a_member(problem, split=(everyone, ~everyone), width=features)
    pooled = pool(embeddings, observations)
    start = pooled - pooled.mean(axis=0)
    projected = PCA(features).fit(start / np.linalg.norm(start, axis=1).mean()).transform(start)
    means = NearestCentroid().fit(l2_normalize(projected), classes[::2]).centroids_
    expected = log_softmax(10 * l2_normalize(projected) @ l2_normalize(means).T, axis=1)
    bank = member.bank()
    found = torch.cat(list(classify([bank], torch.tensor(pooled, dtype=torch.float32)))).numpy()
    assert bank.layers[-1].weight.shape == (FEATURES, features)
    assert np.allclose(found, expected, atol=1e-3)


def test_the_same_seed_gives_the_same_banks_and_another_seed_others(problem, ensemble) -> None:
    state = torch.random.get_rng_state()
    again = ProjectionEnsemble(0.0, **SMALL).fit(*problem)
    assert torch.equal(torch.random.get_rng_state(), state)  # training does not change the global generator
    other = ProjectionEnsemble(0.0, **SMALL, seed=1).fit(*problem)
    for one, two, three in zip(ensemble.banks_, again.banks_, other.banks_, strict=True):
        assert torch.equal(one.prototypes, two.prototypes)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.layers, two.layers, strict=True))
        assert not torch.equal(one.prototypes, three.prototypes)


def test_members_differ_and_have_equal_weights(ensemble) -> None:
    assert len(ensemble.banks_) == 3
    assert [bank.mixture_weight.item() for bank in ensemble.banks_] == pytest.approx([1 / 3] * 3)
    assert not torch.equal(ensemble.banks_[0].prototypes, ensemble.banks_[1].prototypes)


def test_the_kernel_computes_what_the_network_does(problem) -> None:
    member = a_member(problem, steps=20)
    member.train(20)
    network = member.network(member.values)
    bank = member.bank()
    assert bank.layers[-2].relu
    assert torch.allclose(bank.transform(member.reference.pooled), network, atol=1e-5)
    # Of several members the kernel averages the softmax of cosines.
    other = a_member(problem, steps=20, seed=5).bank()
    pair = [bank, other]
    expected = torch.stack([(b.transform(member.reference.pooled) @ b.prototypes.T / 0.1).softmax(1) for b in pair])
    halves = [replace(b, mixture_weight=torch.tensor(0.5)) for b in pair]
    assert torch.allclose(torch.cat(list(classify(halves, member.reference.pooled))).exp(), expected.mean(0), atol=1e-5)


def test_prototypes_are_made_by_the_trained_network_from_all_observations(problem) -> None:
    member = a_member(problem, steps=20)
    before = member.prototypes(member.kept)
    member.train(20)
    bank = member.bank()
    projected, truth = member.network(member.values).detach(), member.reference.labels
    means = torch.stack([projected[truth == index].mean(dim=0) for index in range(CLASSES)])
    assert torch.allclose(bank.prototypes, normalize(means, dim=1), atol=1e-5)
    assert not torch.allclose(bank.prototypes, before, atol=1e-2)
    assert not torch.allclose(bank.prototypes, member.prototypes(member.kept), atol=1e-3)
    sums = torch.stack([projected[truth == index].sum(dim=0) for index in range(CLASSES)])
    assert torch.allclose(bank.counts, sums.norm(dim=1), atol=1e-4)


def test_a_member_learns_nothing_from_its_held_out_observations(problem) -> None:
    embeddings, observations, classes, taxonomy = problem
    kept, held_out = make_folds(classes[::2], 0)[0]
    disturbed, photos = embeddings.copy(), held_out[observations]
    disturbed[photos] = l2_normalize(np.random.default_rng(0).standard_normal(disturbed[photos].shape))
    trained = []
    for values in (embeddings, disturbed):
        member = a_member((values, observations, classes, taxonomy), steps=5, split=(kept, held_out))
        member.train(5)
        trained.append(member)
    assert torch.equal(trained[0].network.outer, trained[1].network.outer)
    assert torch.equal(trained[0].start[0].weight, trained[1].start[0].weight)
    assert not torch.equal(trained[0].bank().prototypes, trained[1].bank().prototypes)


def test_with_one_observation_per_class_nothing_is_held_out_and_the_members_stay_as_they_started() -> None:
    embeddings, observations, classes = nuisance_problem(per_class=1, seed=3, nuisance=0.3)
    taxonomy = Taxonomy.unknown(CLASSES + 2)  # two classes are not in the reference
    fitted = ProjectionEnsemble(**{**SMALL, "steps": 10, "epochs": 0}).fit(
        embeddings[::2], observations[::2], classes[::2], taxonomy
    )
    assert fitted.steps_ == 0  # nothing can be held out to evaluate the training
    assert all(torch.isfinite(bank.prototypes).all() for bank in fitted.banks_)
    assert np.isnan(list(fitted.mean_recalls_.values())).all()
    queries = nuisance_problem(per_class=10, seed=4, nuisance=0.3)
    assert recall(fitted.banks_, *queries) > 0.8


def test_training_that_gains_nothing_is_undone() -> None:
    embeddings, observations, _ = nuisance_problem(per_class=4, seed=1)
    chance = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 4))[observations]
    fitted = ProjectionEnsemble(0.0, **SMALL).fit(embeddings, observations, chance, Taxonomy.unknown(CLASSES))
    assert fitted.steps_ == 0
    assert not any(layer.relu for bank in fitted.banks_ for layer in bank.layers)


def test_samples_without_added_variation_are_near_their_observation(problem) -> None:
    member = a_member(problem, variation=0.0, draws=64)
    everyone = torch.arange(len(member.reference.labels))
    nearest = normalize(member.sample(everyone), dim=1) @ normalize(member.values, dim=1).T
    assert torch.equal(nearest.argmax(dim=1), everyone)
    varied = a_member(problem, variation=1.0, draws=64).sample(everyone)
    assert (torch.cosine_similarity(varied, member.values) < 0.999).all()


def test_the_contrastive_loss_is_the_formula_of_khosla_et_al() -> None:
    rng = np.random.default_rng(0)
    projected, labels = l2_normalize(rng.normal(size=(7, 4))), np.array([0, 0, 1, 1, 1, 2, 2])
    similarities, terms = projected @ projected.T / 0.1, []
    for anchor in range(7):
        others = np.delete(np.arange(7), anchor)
        positives = others[labels[others] == labels[anchor]]
        total = np.log(np.exp(similarities[anchor, others]).sum())
        terms.append(-np.mean(similarities[anchor, positives] - total))
    found = contrastive_loss(torch.tensor(projected), torch.tensor(labels), 0.1)
    assert found.item() == pytest.approx(np.mean(terms))


def test_the_kernel_reads_the_banks_of_networks_that_were_saved(ensemble, problem, tmp_path) -> None:
    save_banks(ensemble.banks_, tmp_path / "bank.safetensors")
    queries = torch.tensor(pool(problem[0], problem[1]), dtype=torch.float32)
    written, kept = (
        torch.cat(list(classify(banks, queries)))
        for banks in (read_banks(tmp_path / "bank.safetensors"), ensemble.banks_)
    )
    assert torch.equal(written, kept)


def test_all_members_that_a_recipe_selects_have_one_logit_scale(problem, monkeypatch, tmp_path) -> None:
    embeddings, observations, classes, taxonomy = problem
    monkeypatch.setattr(
        "local.banks.fitting.ProjectionEnsemble",
        lambda whitening, **given: ProjectionEnsemble(whitening, **given, **SMALL | {"steps": 30}),
    )
    embedded = Embedded(embeddings, ("plain", "hflip", "rotate90"), observations, classes[::2], taxonomy)
    recipe = BankSettings(
        matcher="projection", views=("plain", "hflip"), nearest_neighbour_weight=0.25, class_prior_exponent=0.5
    )
    everyone = np.ones(len(embedded.labels), dtype=bool)
    banks = fit_banks(recipe, embedded, everyone, logit_scales=(8.0, 32.0))
    assert [bank.logit_scale.item() for bank in banks] == [8, 8, 8, 32]
    assert [bank.mixture_weight.item() for bank in banks] == pytest.approx([0.25] * 4)
    save_banks(banks, tmp_path / "bank.safetensors")
    search = Search(lambda mode: embedded, "encoder", make_folds(embedded.labels, 0)[:2], 10, everyone)
    evaluation, means = (search.evaluate(replace(recipe, matcher=matcher)) for matcher in ("projection", "means"))
    assert len(evaluation.logit_scales) == 2
    assert (evaluation.ranks == 0).mean() > (means.ranks == 0).mean()


def a_member(problem, steps: int = 1, seed: int = 3, split=None, **given) -> ProjectionMember:
    """A network before its training."""
    embeddings, observations, classes, taxonomy = problem
    settings = ProjectionEnsemble(0.0, **{**SMALL, **given})
    reference = ReferenceSet.of(embeddings, observations, classes, taxonomy, pool(embeddings, observations))
    kept, held_out = split or make_folds(classes[::2], 0)[0]
    return ProjectionMember(settings, reference, kept, held_out, steps, seed)

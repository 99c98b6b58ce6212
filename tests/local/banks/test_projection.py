"""An ensemble of networks learns what means cannot, tells the kernel the same, and knows when to leave it.

python -m pytest tests/local/banks/test_projection.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from kernel.bank import classify, read_banks
from local.banks.estimators import Centring, ClassMeans, make_bank, pool, save_banks, unit
from local.banks.folds import make_folds
from local.banks.projection import Member, ProjectionEnsemble, Reference, contrastive_loss, surely_better
from local.banks.search import Embedded, Search, fit_banks
from local.data.taxonomy import Taxonomy
from local.recipes.settings import BankSettings

CLASSES, FEATURES, VIEWS = 12, 24, 3
SMALL = {"members": 3, "hidden": 64, "width": 16, "steps": 60, "batch_size": 64}


def nuisance_problem(per_class: int, seed: int, classes: int = CLASSES, nuisance: float = 1.5):
    """Classes told apart in 8 directions of a rotated space, by their signs' product with a nuisance in 8 others.

    Returns:
        embeddings (photos, views, features) of two photos per observation, and the observation and class of each photo.
    """
    rng = np.random.default_rng(7)  # the world is one, whatever is drawn of it
    rotation = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
    centres, common = rng.standard_normal((classes, 8)), 3 * rng.standard_normal(FEATURES)
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), per_class)
    observations = np.repeat(np.arange(len(truth)), 2)
    signal = centres[truth][observations][:, None] + 0.2 * rng.standard_normal((len(observations), VIEWS, 8))
    disturbing = np.repeat(rng.standard_normal((len(truth), 1, 8)), 2, axis=0).repeat(VIEWS, axis=1) * nuisance
    rest = 0.2 * rng.standard_normal((len(observations), VIEWS, FEATURES - 16))
    values = np.concatenate([signal, disturbing, rest], axis=2) @ rotation + common
    return unit(values), observations, truth[observations]


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
    return ProjectionEnsemble(Centring(), **SMALL).fit(*problem)


def test_networks_see_through_a_nuisance_that_misleads_centred_means(problem, ensemble) -> None:
    embeddings, observations, classes, taxonomy = problem
    pooled = pool(embeddings, observations)
    centring = Centring().fit(*problem)
    space = normalize(torch.tensor(pooled) + centring.layers_[0].bias.double(), dim=1).numpy()
    means = make_bank(centring.layers_, ClassMeans().fit(space, observations, classes[::2], taxonomy), 16.0)
    queries = nuisance_problem(per_class=20, seed=2)
    assert ensemble.steps_ > 0
    assert recall(ensemble.banks_, *queries) > recall([means], *queries) + 0.1


def test_the_same_seed_gives_the_same_banks_and_another_seed_others(problem, ensemble) -> None:
    state = torch.random.get_rng_state()
    again = ProjectionEnsemble(Centring(), **SMALL).fit(*problem)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers change by training
    other = ProjectionEnsemble(Centring(), **SMALL, seed=1).fit(*problem)
    for one, two, three in zip(ensemble.banks_, again.banks_, other.banks_, strict=True):
        assert torch.equal(one.prototypes, two.prototypes)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.layers, two.layers, strict=True))
        assert not torch.equal(one.prototypes, three.prototypes)


def test_members_differ_and_share_the_whole_equally(ensemble) -> None:
    assert len(ensemble.banks_) == 3
    assert sum(bank.mixture_weight.item() for bank in ensemble.banks_) == pytest.approx(1)
    assert not torch.equal(ensemble.banks_[0].prototypes, ensemble.banks_[1].prototypes)


def test_the_kernel_computes_what_the_network_does(problem) -> None:
    member = a_member(problem, steps=20)
    member.advance(20)
    network = member.network(member.space)
    bank = member.bank()
    assert bank.layers[-2].relu
    assert torch.allclose(bank.transform(member.reference.pooled), network, atol=1e-5)
    # Averaged over members, the kernel's probabilities are the mean of each one's softmax of cosines.
    other = a_member(problem, steps=20, seed=5).bank()
    pair = [bank, other]
    expected = torch.stack([(b.transform(member.reference.pooled) @ b.prototypes.T / 0.1).softmax(1) for b in pair])
    halves = [b.__class__(**{**vars(b), "mixture_weight": torch.tensor(0.5)}) for b in pair]
    assert torch.allclose(torch.cat(list(classify(halves, member.reference.pooled))).exp(), expected.mean(0), atol=1e-5)


def test_prototypes_are_made_anew_by_the_trained_network_from_all_observations(problem) -> None:
    member = a_member(problem, steps=20)
    before = member.prototypes(member.kept)
    member.advance(20)
    bank = member.bank()
    projected, truth = member.network(member.space).detach(), member.reference.classes
    means = torch.stack([projected[truth == index].mean(dim=0) for index in range(CLASSES)])
    assert torch.allclose(bank.prototypes, normalize(means, dim=1), atol=1e-5)
    assert not torch.allclose(bank.prototypes, before, atol=1e-2)
    assert not torch.allclose(bank.prototypes, member.prototypes(member.kept), atol=1e-3)
    assert bank.counts.sum() > len(member.kept) * 0.5


def test_a_member_learns_nothing_from_what_it_leaves_out(problem) -> None:
    embeddings, observations, classes, taxonomy = problem
    kept, held = make_folds(classes[::2], 0)[0]
    disturbed = embeddings.copy()
    disturbed[held[observations]] = unit(np.random.default_rng(0).standard_normal(disturbed.shape))[held[observations]]
    trained = []
    for values in (embeddings, disturbed):
        member = a_member((values, observations, classes, taxonomy), steps=5, split=(kept, held))
        member.advance(5)
        trained.append(member)
    assert torch.equal(trained[0].network.outer, trained[1].network.outer)
    assert torch.equal(trained[0].start[0].weight, trained[1].start[0].weight)
    assert not torch.equal(trained[0].bank().prototypes, trained[1].bank().prototypes)


def test_classes_of_one_observation_are_never_left_out_and_their_starts_suffice() -> None:
    embeddings, observations, classes = nuisance_problem(per_class=1, seed=3, nuisance=0.3)
    taxonomy = Taxonomy.unknown(CLASSES + 2)  # two classes are not in the reference
    fitted = ProjectionEnsemble(**{**SMALL, "steps": 10, "epochs": 0}).fit(
        embeddings[::2], observations[::2], classes[::2], taxonomy
    )
    assert fitted.steps_ == 0  # nothing can be left out to judge the training by
    assert all(torch.isfinite(bank.prototypes).all() for bank in fitted.banks_)
    queries = nuisance_problem(per_class=10, seed=4, nuisance=0.3)
    assert recall(fitted.banks_, *queries) > 0.8
    with_one = np.concatenate([[0], np.repeat(np.arange(1, CLASSES), 3)])
    assert all(kept[0] for kept, _ in make_folds(with_one, 0))


def test_training_that_gains_nothing_is_undone() -> None:
    embeddings, observations, _ = nuisance_problem(per_class=4, seed=1)
    chance = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 4))[observations]
    fitted = ProjectionEnsemble(Centring(), **SMALL).fit(embeddings, observations, chance, Taxonomy.unknown(CLASSES))
    assert fitted.steps_ == 0
    assert not any(layer.relu for bank in fitted.banks_ for layer in bank.layers)


def test_a_single_observation_is_no_evidence_for_a_training() -> None:
    for count in (0, 1):
        assert not surely_better(np.ones(count), np.zeros(count))
    assert surely_better(np.ones(2), np.zeros(2))


def test_samples_of_an_observation_that_is_left_as_it_is_are_its_own_means(problem) -> None:
    member = a_member(problem, variation=0.0, draws=64)
    everyone = torch.arange(len(member.reference.classes))
    nearest = normalize(member.sample(everyone), dim=1) @ normalize(member.space, dim=1).T
    assert torch.equal(nearest.argmax(dim=1), everyone)
    moved = a_member(problem, variation=1.0, draws=64).sample(everyone)
    assert (torch.cosine_similarity(moved, member.space) < 0.999).all()


def test_the_contrastive_loss_falls_as_positives_approach() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    apart = together[[0, 2, 1, 3]]
    assert contrastive_loss(together, labels, 0.1) < 0.01 < contrastive_loss(apart, labels, 0.1)


def test_banks_of_networks_survive_their_file(ensemble, problem, tmp_path) -> None:
    save_banks(ensemble.banks_, tmp_path / "bank.safetensors")
    queries = torch.tensor(pool(problem[0], problem[1]), dtype=torch.float32)
    written, kept = (
        torch.cat(list(classify(banks, queries)))
        for banks in (read_banks(tmp_path / "bank.safetensors"), ensemble.banks_)
    )
    assert torch.equal(written, kept)


def test_a_recipe_may_ask_for_networks_and_all_members_have_one_scale(problem, monkeypatch, tmp_path) -> None:
    embeddings, observations, classes, taxonomy = problem
    monkeypatch.setattr(
        "local.banks.search.ProjectionEnsemble", lambda start, **given: ProjectionEnsemble(start, **given, **SMALL)
    )
    embedded = Embedded(embeddings, ("plain", "hflip", "rotate90"), observations, classes[::2], taxonomy)
    recipe = BankSettings(
        matcher="projection", views=("plain", "hflip"), nearest_neighbour_weight=0.25, class_prior_exponent=0.5
    )
    everyone = np.ones(len(embedded.classes), dtype=bool)
    banks = fit_banks(recipe, embedded, everyone, scales=(8.0, 32.0))
    assert [bank.logit_scale.item() for bank in banks] == [8, 8, 8, 32]
    assert [bank.mixture_weight.item() for bank in banks] == pytest.approx([0.25] * 4)
    save_banks(banks, tmp_path / "bank.safetensors")
    search = Search(lambda fit: embedded, "encoder", make_folds(embedded.classes, 0), 10, everyone)
    outcome = search.judge(recipe)
    assert len(outcome.scales) == 2
    centred = search.judge(replace(recipe, matcher="means"))
    assert (outcome.places == 0).mean() > (centred.places == 0).mean()


def a_member(problem, steps: int = 1, seed: int = 3, split=None, **given) -> Member:
    """A network about to be trained."""
    embeddings, observations, classes, taxonomy = problem
    settings = ProjectionEnsemble(Centring(), **SMALL, **given)
    reference = Reference.of(embeddings, observations, classes, taxonomy, pool(embeddings, observations))
    kept, held = split or make_folds(classes[::2], 0)[0]
    return Member(settings, reference, kept, held, steps, seed)

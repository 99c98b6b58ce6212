"""A head is trained by the formula that the kernel matches with."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from local.recipes.settings import TrainSettings
from local.training.head import Head

FEATURES, CLASSES = 6, 4
SIZES = np.array([1, 2, 4, 1])
PHOTOS = normalize(torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0)))
OWNERS, TRUTH = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3, 1, 0])
TARGETS = one_hot(TRUTH, CLASSES).float()
ALL = torch.ones(3, dtype=torch.bool)


def make_head(ranks=(), pooling="mean", **settings):
    torch.manual_seed(0)
    centre, prototypes = torch.randn(FEATURES) / 5, torch.randn(CLASSES, FEATURES)
    return Head(centre, prototypes, SIZES, TrainSettings(**settings), ranks, pooling)


def embedded(head, pooling="mean"):
    """The three observations in the prototypes' space, the slow way."""
    own = [PHOTOS[owner == OWNERS] for owner in range(3)]
    pooled = torch.stack([photos.mean(dim=0) if pooling == "mean" else photos.amax(dim=0) for photos in own])
    return normalize(normalize(pooled) - head.centre)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_loss_is_cross_entropy_over_squared_distances(pooling):
    head = make_head(temperature=0.5, pooling=pooling)
    distances = torch.cdist(embedded(head, pooling), normalize(head.prototypes)) ** 2
    expected = cross_entropy(-distances / 0.5, TRUTH)
    assert torch.allclose(head(PHOTOS, OWNERS, TARGETS, ALL), expected, atol=1e-5)


def test_fixed_prototypes_stay_and_learned_ones_move():
    assert not any(parameter.requires_grad for parameter in make_head().parameters())
    head = make_head(prototypes="learned", hidden_features=8)
    head(PHOTOS, OWNERS, TARGETS, ALL).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_margin_of_arcface_widens_the_angle_to_the_true_class_alone():
    plain, arc = (make_head(**margin).eval() for margin in ({}, {"arcface_margin": 0.3}))
    spaced = embedded(plain)
    before = plain.logits(spaced, TARGETS) / plain.scale
    angles = (arc.logits(spaced, TARGETS) / arc.scale).acos() - before.acos()
    assert torch.allclose(angles, 0.3 * TARGETS, atol=1e-3)


def test_classes_of_many_observations_weigh_less():
    head, losses = make_head(class_weight_exponent=1.0, temperature=0.5), []
    for place in range(3):
        photos = place == OWNERS
        alone = (PHOTOS[photos], torch.zeros(int(photos.sum()), dtype=torch.long), TARGETS[place : place + 1], ALL[:1])
        losses.append(head(*alone))
    weights = torch.tensor([1.0, 0.5, 1.0])  # of classes 3, 1 and 0
    expected = (torch.stack(losses) * weights).sum() / weights.sum()
    assert torch.allclose(head(PHOTOS, OWNERS, TARGETS, ALL), expected, atol=1e-5)


def test_the_probability_of_a_rank_is_the_sum_over_its_species():
    genera = np.array([7, 7, 9, 9])
    head, plain = make_head(ranks=(genera, None, None, None, None), rank_weights=[0.5, 1.0, 0.0, 0.0, 0.0]), make_head()
    probabilities = (plain.scale * embedded(plain) @ normalize(plain.prototypes).T).softmax(dim=1)
    of_genera = torch.stack([probabilities[:, :2].sum(dim=1), probabilities[:, 2:].sum(dim=1)], dim=1)
    species = -probabilities[torch.arange(3), TRUTH].log().mean()
    genus = -of_genera[torch.arange(3), TRUTH // 2].log().mean()
    assert torch.allclose(head(PHOTOS, OWNERS, TARGETS, ALL), (species + 0.5 * genus) / 1.5, atol=1e-5)


def test_a_hidden_layer_takes_a_batch_of_one_observation():
    head = make_head(prototypes="learned", hidden_features=8).train()
    before = head.layers[3].running_mean.clone()
    loss = head(PHOTOS[:1], OWNERS[:1], TARGETS[:1], ALL[:1])
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(head.layers[3].running_mean, before)


def test_an_episode_asks_its_queries_against_the_means_of_its_support():
    head = make_head(prototypes="episodic", temperature=0.5)
    photos = normalize(torch.randn(6, FEATURES))
    truth, asked = torch.tensor([2, 2, 0, 2, 0, 3]), torch.tensor([False, False, False, True, True, False])
    spaced = normalize(photos - head.centre)
    means = normalize(torch.stack([spaced[2], spaced[:2].mean(dim=0), spaced[5]]))  # of classes 0, 2, 3
    expected = cross_entropy(spaced[[3, 4]] @ means.T * 4, torch.tensor([1, 0]))
    loss = head(photos, torch.arange(6), one_hot(truth, CLASSES).float(), asked)
    assert torch.allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"hidden_features": 8}])
def test_the_bank_answers_what_the_head_answers(settings):
    head = make_head(prototypes="learned", dropout=0.5, **settings)
    with torch.no_grad():
        for _ in range(5):  # so that the normalisation of the hidden layer has seen something
            head(PHOTOS + torch.randn_like(PHOTOS) / 9, OWNERS, TARGETS, ALL)
        head.eval()
        pooled = head.pool(PHOTOS, OWNERS, 3)
        expected = head.logits(head.space(pooled), TARGETS).log_softmax(dim=1)
    bank = head.bank()
    found = bank.log_probabilities(bank.similarities(bank.transform(normalize(pooled))))
    assert torch.allclose(found, expected, atol=1e-4)

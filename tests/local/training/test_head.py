"""A head is trained by the formula that the kernel matches with."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from local.recipes.settings import TrainSettings
from local.training.head import Head

FEATURES, CLASSES = 6, 4
COUNTS = np.array([1, 2, 4, 1])
PHOTOS = normalize(torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0)))
OBSERVATION, LABELS = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3, 1, 0])
TARGETS = one_hot(LABELS, CLASSES).float()
ALL = torch.ones(3, dtype=torch.bool)


def make_head(ranks=(), pooling="mean", **settings):
    torch.manual_seed(0)
    centre, prototypes = torch.randn(FEATURES) / 5, torch.randn(CLASSES, FEATURES)
    return Head(centre, prototypes, COUNTS, TrainSettings(**settings), ranks, pooling)


def embedded(head, pooling="mean"):
    """The three observations in the prototypes' space, the slow way."""
    own = [PHOTOS[index == OBSERVATION] for index in range(3)]
    pooled = torch.stack([photos.mean(dim=0) if pooling == "mean" else photos.amax(dim=0) for photos in own])
    return normalize(normalize(pooled) - head.centre)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_loss_is_cross_entropy_over_squared_distances(pooling):
    head = make_head(temperature=0.5, pooling=pooling)
    distances = torch.cdist(embedded(head, pooling), normalize(head.prototypes)) ** 2
    expected = cross_entropy(-distances / 0.5, LABELS)
    assert torch.allclose(head(PHOTOS, OBSERVATION, TARGETS, ALL), expected, atol=1e-5)


def test_fixed_prototypes_stay_and_learned_ones_move():
    assert not any(parameter.requires_grad for parameter in make_head().parameters())
    head = make_head(prototypes="learned", hidden_features=8)
    head(PHOTOS, OBSERVATION, TARGETS, ALL).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_arcface_is_cross_entropy_with_a_margin_on_the_angle_to_the_true_class():
    head = make_head(arcface_margin=0.3, temperature=0.5)
    angles = (embedded(head) @ normalize(head.prototypes).T).acos()
    angles[torch.arange(3), LABELS] += 0.3
    expected = cross_entropy(angles.cos() * 4, LABELS)
    assert torch.allclose(head(PHOTOS, OBSERVATION, TARGETS, ALL), expected, atol=1e-5)


def test_an_angle_with_its_margin_is_at_most_pi():
    head = make_head(arcface_margin=1.0, temperature=0.5)
    opposite = -normalize(head.prototypes)[:1]
    assert torch.allclose(head.logits(opposite, TARGETS[2:])[0, 0], torch.tensor(-4.0), atol=1e-3)


def plain_logits(head):
    return head.logit_scale * embedded(head) @ normalize(head.prototypes).T


def test_label_smoothing_is_that_of_torch():
    head = make_head(label_smoothing=0.3, temperature=0.5)
    expected = cross_entropy(plain_logits(head), LABELS, label_smoothing=0.3)
    assert torch.allclose(head(PHOTOS, OBSERVATION, TARGETS, ALL), expected, atol=1e-5)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_class_weighs_its_count_to_the_minus_exponent_as_in_torch(exponent):
    head = make_head(class_weight_exponent=exponent, temperature=0.5)
    weight = torch.tensor(COUNTS, dtype=torch.float32) ** -exponent
    expected = cross_entropy(plain_logits(head), LABELS, weight=weight)
    assert torch.allclose(head(PHOTOS, OBSERVATION, TARGETS, ALL), expected, atol=1e-5)


def test_a_mixed_photo_has_the_mean_of_the_losses_of_both_classes():
    head = make_head(temperature=0.5)
    mixed = 0.25 * TARGETS + 0.75 * TARGETS.flip(0)
    expected = 0.25 * cross_entropy(plain_logits(head), LABELS) + 0.75 * cross_entropy(
        plain_logits(head), LABELS.flip(0)
    )
    assert torch.allclose(head(PHOTOS, OBSERVATION, mixed, ALL), expected, atol=1e-5)


def test_the_probability_of_a_rank_is_the_sum_over_its_species():
    genera = np.array([7, 7, 9, 9])
    head, plain = make_head(ranks=(genera, None, None, None, None), rank_weights=[0.5, 1.0, 0.0, 0.0, 0.0]), make_head()
    probabilities = (plain.logit_scale * embedded(plain) @ normalize(plain.prototypes).T).softmax(dim=1)
    of_genera = torch.stack([probabilities[:, :2].sum(dim=1), probabilities[:, 2:].sum(dim=1)], dim=1)
    species = -probabilities[torch.arange(3), LABELS].log().mean()
    genus = -of_genera[torch.arange(3), LABELS // 2].log().mean()
    assert torch.allclose(head(PHOTOS, OBSERVATION, TARGETS, ALL), (species + 0.5 * genus) / 1.5, atol=1e-5)


def test_a_hidden_layer_takes_a_batch_of_one_observation():
    head = make_head(prototypes="learned", hidden_features=8).train()
    before = head.layers[3].running_mean.clone()
    loss = head(PHOTOS[:1], OBSERVATION[:1], TARGETS[:1], ALL[:1])
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(head.layers[3].running_mean, before)


def test_an_episode_asks_its_queries_against_the_means_of_its_support():
    head = make_head(prototypes="episodic", temperature=0.5)
    photos = normalize(torch.randn(6, FEATURES))
    labels, query_mask = torch.tensor([2, 2, 0, 2, 0, 3]), torch.tensor([False, False, False, True, True, False])
    projected = normalize(photos - head.centre)
    means = normalize(torch.stack([projected[2], projected[:2].mean(dim=0), projected[5]]))  # of classes 0, 2, 3
    expected = cross_entropy(projected[[3, 4]] @ means.T * 4, torch.tensor([1, 0]))
    loss = head(photos, torch.arange(6), one_hot(labels, CLASSES).float(), query_mask)
    assert torch.allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"hidden_features": 8}])
def test_the_bank_answers_what_the_head_answers(settings):
    head = make_head(prototypes="learned", dropout=0.5, **settings)
    with torch.no_grad():
        for _ in range(5):  # so that the normalisation of the hidden layer has seen something
            head(PHOTOS + torch.randn_like(PHOTOS) / 9, OBSERVATION, TARGETS, ALL)
        head.eval()
        pooled = head.pool(PHOTOS, OBSERVATION, 3)
        expected = head.logits(head.project(pooled), TARGETS).log_softmax(dim=1)
    bank = head.bank()
    found = bank.log_probabilities(bank.similarities(bank.transform(normalize(pooled))))
    assert torch.allclose(found, expected, atol=1e-4)

"""Matching: cosines in a centred space, in chunks, summed over an ensemble."""

import numpy as np
import torch
from torch.nn.functional import normalize

from kernel import bank as module
from kernel.bank import Bank, rank
from local.banks import commonest_classes, fit_centroids


def random_bank(classes=30, features=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prototypes = normalize(torch.randn(classes, features, generator=generator))
    return Bank(torch.randn(features, generator=generator) / 10, prototypes, torch.zeros(classes))


def test_scores_are_cosines_after_centring():
    bank, queries = random_bank(), normalize(torch.randn(5, 8))
    moved = queries - bank.centre
    for row, query in enumerate(moved):
        cosines = torch.cosine_similarity(query[None], bank.prototypes)
        assert torch.allclose(bank.scores(queries)[row], cosines, atol=1e-6)


def test_chunks_do_not_change_the_ranking(monkeypatch):
    bank, queries = random_bank(), normalize(torch.randn(50, 8))
    whole = rank([bank], [queries], 10)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(rank([bank], [queries], 10), whole)
    assert torch.equal(whole, bank.scores(queries).sort(descending=True, stable=True).indices[:, :10])


def test_an_ensemble_ranks_by_the_sum_of_its_members_scores():
    banks = [random_bank(seed=1), random_bank(features=5, seed=2)]
    queries = [normalize(torch.randn(9, 8)), normalize(torch.randn(9, 5))]
    total = sum(bank.scores(query) for bank, query in zip(banks, queries, strict=True))
    assert torch.equal(rank(banks, queries, 3), total.topk(3).indices)


def test_equal_scores_keep_the_order_of_the_classes():
    bank = Bank(torch.zeros(2), torch.tensor([[1.0, 0.0]] * 4), torch.zeros(4))
    assert rank([bank], [torch.tensor([[1.0, 0.0]])], 4).tolist() == [[0, 1, 2, 3]]


def test_more_guesses_than_classes_gives_all_and_no_queries_give_none():
    assert rank([random_bank(classes=3)], [torch.randn(2, 8)], 10).shape == (2, 3)
    assert rank([random_bank()], [torch.zeros(0, 8)], 10).shape == (0, 10)


def test_a_bias_moves_a_class_up():
    plain = random_bank()
    favoured = Bank(plain.centre, plain.prototypes, torch.nn.functional.one_hot(torch.tensor(4), 30).float() * 3)
    assert (rank([favoured], [torch.randn(6, 8)], 1) == 4).all()


def test_a_prototype_is_the_direction_of_its_classs_mean():
    values = normalize(torch.randn(6, 4, dtype=torch.float64)).float()
    classes = np.array(["7", "3", "7", "3", "7", "11"], dtype=object)
    bank = fit_centroids(values, classes, ["3", "7", "11"], centre=False)
    assert torch.allclose(bank.prototypes[1], normalize(values[[0, 2, 4]].mean(dim=0), dim=0), atol=1e-6)
    centred = fit_centroids(values, classes, ["3", "7", "11"], centre=True)
    assert torch.allclose(centred.centre, values.mean(dim=0), atol=1e-6)


def test_a_class_without_a_readable_photo_is_never_guessed_first():
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    bank = fit_centroids(values, np.array(["a", "b"], dtype=object), ["a", "b"], centre=False)
    assert rank([bank], [torch.tensor([[-1.0, 0.0]])], 2).tolist() == [[0, 1]]


def test_the_prior_is_the_commonest_classes_first():
    assert commonest_classes(np.array(["5", "2", "5", "9", "2", "5"]), ["2", "5", "9"], 2) == ["5", "2"]

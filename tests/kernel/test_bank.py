"""Matching: one formula for all banks, in chunks, moved by the test's own observations, summed over an ensemble."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from kernel import bank as module
from kernel.bank import Bank, Layer, classify, rank


def random_bank(classes=30, features=8, seed=0, **changes):
    """Centred class means."""
    generator = torch.Generator().manual_seed(seed)
    centre = Layer(torch.eye(features), torch.randn(features, generator=generator) / 10, torch.tensor(0.0))
    bank = Bank(
        layers=(centre,),
        prototypes=normalize(torch.randn(classes, features, generator=generator)),
        owners=torch.arange(classes),
        counts=torch.ones(classes),
        bias=torch.zeros(classes),
        scale=torch.tensor(10.0),
        share=torch.tensor(1.0),
        transduction=torch.tensor(0.0),
    )
    return replace(bank, **changes)


def classified(banks, queries):
    return torch.cat(list(classify(banks, queries)))


def test_scores_are_cosines_after_centring():
    bank, queries = random_bank(), normalize(torch.randn(5, 8))
    moved = queries + bank.layers[0].bias
    cosines = torch.stack([torch.cosine_similarity(row[None], bank.prototypes) for row in moved])
    assert torch.allclose(classified([bank], queries), (10 * cosines).log_softmax(dim=1), atol=1e-5)


def test_a_rectified_layer_is_a_perceptron():
    weight, bias = torch.randn(8, 12), torch.randn(12)
    hidden = Layer(weight, bias, torch.tensor(1.0))
    out = Layer(torch.randn(12, 8), torch.zeros(8), torch.tensor(0.0))
    queries = torch.randn(5, 8)
    expected = normalize((queries @ weight + bias).clamp(min=0) @ out.weight, dim=1)
    assert torch.allclose(random_bank(layers=(hidden, out)).transform(queries), expected, atol=1e-5)


def test_a_class_is_as_near_as_the_nearest_of_its_prototypes():
    single, queries = random_bank(classes=6), normalize(torch.randn(9, 8))
    double = replace(single, owners=torch.tensor([0, 1, 2, 2, 1, 0]), counts=torch.ones(6), bias=torch.zeros(3))
    each, nearest = single.similarities(single.transform(queries)), double.similarities(double.transform(queries))
    for index, own in enumerate(([0, 5], [1, 4], [2, 3])):
        assert torch.equal(nearest[:, index], each[:, own].amax(dim=1))


def test_prototypes_in_another_order_than_the_classes_still_belong_to_them():
    bank, queries = random_bank(classes=4), normalize(torch.randn(7, 8))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(bank, prototypes=bank.prototypes[order], owners=order)
    assert torch.allclose(classified([bank], queries), classified([shuffled], queries), atol=1e-6)


def test_chunks_do_not_change_the_ranking(monkeypatch):
    bank, queries = random_bank(transduction=torch.tensor(0.5)), normalize(torch.randn(50, 8))
    whole = rank([[bank]], [1.0], [queries], 10)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(rank([[bank]], [1.0], [queries], 10), whole)
    assert torch.equal(whole, classified([bank], queries).sort(descending=True, stable=True).indices[:, :10])


def test_a_members_banks_average_their_probabilities():
    banks = [random_bank(seed=1, share=torch.tensor(0.3)), random_bank(seed=2, share=torch.tensor(0.7))]
    queries = normalize(torch.randn(9, 8))
    alone = [classified([replace(bank, share=torch.tensor(1.0))], queries).exp() for bank in banks]
    assert torch.allclose(classified(banks, queries).exp(), 0.3 * alone[0] + 0.7 * alone[1], atol=1e-5)


def test_an_ensemble_ranks_by_the_weighted_sum_of_its_members_log_probabilities():
    banks = [random_bank(seed=1), random_bank(features=5, seed=2)]
    queries = [normalize(torch.randn(9, 8)), normalize(torch.randn(9, 5))]
    parts = [classified([bank], query) for bank, query in zip(banks, queries, strict=True)]
    assert torch.equal(
        rank([[bank] for bank in banks], [0.8, 0.2], queries, 3), (0.8 * parts[0] + 0.2 * parts[1]).topk(3).indices
    )


def test_equal_scores_keep_the_order_of_the_classes():
    bank = random_bank(classes=4, features=2, layers=(), prototypes=torch.tensor([[1.0, 0.0]] * 4))
    assert rank([[bank]], [1.0], [torch.tensor([[1.0, 0.0]])], 4).tolist() == [[0, 1, 2, 3]]


def test_more_guesses_than_classes_gives_all_and_no_queries_give_none():
    assert rank([[random_bank(classes=3)]], [1.0], [torch.randn(2, 8)], 10).shape == (2, 3)
    assert rank([[random_bank()]], [1.0], [torch.zeros(0, 8)], 10).shape == (0, 10)


def test_a_bias_moves_a_class_up():
    favoured = random_bank(bias=torch.nn.functional.one_hot(torch.tensor(4), 30).float() * 30)
    assert (rank([[favoured]], [1.0], [torch.randn(6, 8)], 1) == 4).all()


def crescent(seed=0, moved=0.6):
    """Two classes, one known observation of each, and test observations that lie to one side of it."""
    generator = torch.Generator().manual_seed(seed)
    known = normalize(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.2]]))
    shift = torch.tensor([[moved, 0.0, 0.9], [0.0, moved, -0.9]])
    truth = torch.arange(2).repeat(40)
    queries = normalize(shift[truth] + 0.35 * torch.randn(80, 3, generator=generator))
    return known, queries, truth


def test_transduction_moves_prototypes_towards_what_resembles_them():
    known, queries, truth = crescent()
    still = random_bank(classes=2, features=3, layers=(), prototypes=known, bias=torch.zeros(2))
    moving = replace(still, transduction=torch.tensor(1.0))
    assert (rank([[moving]], [1.0], [queries], 1)[:, 0] == truth).sum() > (
        rank([[still]], [1.0], [queries], 1)[:, 0] == truth
    ).sum()
    moved = moving.moved(queries).prototypes
    centres = normalize(torch.stack([queries[truth == index].mean(dim=0) for index in range(2)]))
    assert ((moved * centres).sum(dim=1) > (known * centres).sum(dim=1)).all()


def test_observations_without_a_readable_photo_move_nothing():
    known, queries, _ = crescent()
    bank = random_bank(classes=2, features=3, prototypes=known, bias=torch.zeros(2), transduction=torch.tensor(1.0))
    blind = torch.cat([queries, torch.zeros(500, 3)])
    assert torch.allclose(classified([bank], blind)[:80], classified([bank], queries), atol=1e-6)


@pytest.mark.parametrize("count", [0.0, 1e9])
def test_a_prototype_of_many_observations_hardly_moves(count):
    known, queries, _ = crescent()
    bank = random_bank(
        classes=2, features=3, layers=(), prototypes=known, bias=torch.zeros(2), transduction=torch.tensor(1.0)
    )
    moved = replace(bank, counts=torch.full((2,), count)).moved(queries).prototypes
    assert torch.allclose(moved, known, atol=1e-4) == (count > 0)


def test_transduction_that_fails_leaves_the_bank_as_it_was(capsys):
    known, queries, _ = crescent()
    bank = random_bank(classes=2, features=3, layers=(), prototypes=known, bias=torch.zeros(2))
    broken = replace(bank, transduction=torch.tensor(1.0), counts=torch.full((2,), torch.nan))
    assert torch.allclose(classified([broken], queries), classified([bank], queries))
    assert "transduction" in capsys.readouterr().out

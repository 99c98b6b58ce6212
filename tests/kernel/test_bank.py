"""The bank: one formula for all methods, with transduction."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from kernel import bank as module
from kernel.bank import Bank, Layer, full_precision, inner_products, read_banks
from kernel.inputs import InputError
from kernel.ranking import classify, rank

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_bank(classes=30, features=8, seed=0, **changes):
    """A bank of random class means behind a layer that shifts the embedding."""
    generator = torch.Generator().manual_seed(seed)
    centre = Layer(torch.eye(features), torch.randn(features, generator=generator) / 10, torch.tensor(0.0))
    bank = Bank(
        layers=(centre,),
        prototypes=normalize(torch.randn(classes, features, generator=generator)),
        prototype_labels=torch.arange(classes),
        counts=torch.ones(classes),
        bias=torch.zeros(classes),
        logit_scale=torch.tensor(10.0),
        mixture_weight=torch.tensor(1.0),
        transduction=torch.tensor(0.0),
    )
    return replace(bank, **changes)


def classified(banks, queries):
    return torch.cat(list(classify(banks, queries)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "others", "features"), [(0, 3, 8), (1, 300, 50), (3, 7, 5), (200, 1, 70), (65, 999, 130)]
)
def test_products_are_those_of_double_precision(device, rows, others, features):
    left, right, bias = torch.randn(rows, features), torch.randn(others, features), torch.randn(others)
    expected = left.double() @ right.double().T
    left, right, bias = left.to(device), right.to(device), bias.to(device)
    with full_precision():
        plain, biased = inner_products(left, right).cpu(), inner_products(left, right, bias).cpu()
    assert torch.allclose(plain.double(), expected, atol=1e-4)
    assert torch.allclose(biased.double(), expected + bias.cpu().double(), atol=1e-4)


def test_scores_are_cosines_after_centring():
    bank, queries = random_bank(), normalize(torch.randn(5, 8))
    centred = queries + bank.layers[0].bias
    cosines = torch.stack([torch.cosine_similarity(row[None], bank.prototypes) for row in centred])
    assert torch.allclose(classified([bank], queries), (10 * cosines).log_softmax(dim=1), atol=1e-5)


def test_a_layer_with_a_relu_and_one_without_are_a_perceptron():
    weight, bias = torch.randn(8, 12), torch.randn(12)
    hidden = Layer(weight, bias, torch.tensor(1.0))
    out = Layer(torch.randn(12, 8), torch.zeros(8), torch.tensor(0.0))
    queries = torch.randn(5, 8)
    expected = normalize((queries @ weight + bias).clamp(min=0) @ out.weight, dim=1)
    assert torch.allclose(random_bank(layers=(hidden, out)).transform(queries), expected, atol=1e-5)


def test_the_nearest_of_its_prototypes_scores_for_a_class():
    single, queries = random_bank(classes=6), normalize(torch.randn(9, 8))
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    double = replace(single, prototype_labels=labels, bias=torch.zeros(3))
    each, nearest = single.similarities(single.transform(queries)), double.similarities(double.transform(queries))
    for index, own in enumerate(([0, 5], [1, 4], [2, 3])):
        assert torch.allclose(nearest[:, index], each[:, own].amax(dim=1), atol=1e-6)


def test_a_similarity_may_be_below_minus_one_and_a_class_without_a_prototype_has_minus_one():
    coefficients = torch.tensor([[3.0, 0.0], [0.0, -2.0]])  # of a linear classifier: their length is not 1
    bank = random_bank(
        features=2, layers=(), prototypes=coefficients, prototype_labels=torch.tensor([2, 0]), bias=torch.zeros(3)
    )
    found = bank.similarities(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    assert found.tolist() == [[0.0, -1.0, -3.0], [-2.0, -1.0, 0.0]]


def test_the_order_of_the_prototypes_does_not_matter():
    bank, queries = random_bank(classes=4), normalize(torch.randn(7, 8))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(bank, prototypes=bank.prototypes[order], prototype_labels=order)
    assert torch.allclose(classified([bank], queries), classified([shuffled], queries), atol=1e-6)


def test_a_bias_moves_a_class_up():
    favoured = random_bank(bias=torch.nn.functional.one_hot(torch.tensor(4), 30).float() * 30)
    assert (rank([[favoured]], [1.0], [torch.randn(6, 8)], 1)[0] == 4).all()


def shifted(shift=0.6):
    """Two classes with one reference observation each, and 80 test observations that lie to one side of it."""
    generator = torch.Generator().manual_seed(0)
    reference = normalize(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.2]]))
    means = torch.tensor([[shift, 0.0, 0.9], [0.0, shift, -0.9]])
    truth = torch.arange(2).repeat(40)
    queries = normalize(means[truth] + 0.35 * torch.randn(80, 3, generator=generator))
    return reference, queries, truth


def transductive(reference, **changes):
    """A bank of two classes that moves its prototypes."""
    settings = {"bias": torch.zeros(2), "transduction": torch.tensor(1.0), **changes}
    return random_bank(classes=2, features=3, layers=(), prototypes=reference, **settings)


def test_transduction_is_soft_k_means_that_starts_at_the_prototypes():
    reference, queries, _ = shifted()
    counts, weight, bias = torch.tensor([1.0, 3.0]), 0.5, torch.tensor([0.2, -0.1])
    prototypes = reference
    for _ in range(module.TRANSDUCTION_ROUNDS):
        probabilities = torch.softmax(10 * queries @ prototypes.T + bias, dim=1)
        sums = [counts[c] * reference[c] + weight * (probabilities[:, c, None] * queries).sum(dim=0) for c in range(2)]
        prototypes = normalize(torch.stack(sums))
    bank = transductive(reference, counts=counts, bias=bias, transduction=torch.tensor(weight))
    refined = bank.refined(queries)
    assert torch.allclose(refined.bank.prototypes, prototypes, atol=1e-5)
    # Each observation is compared with the prototypes that the others give.
    for row, query in enumerate(queries):
        others = torch.stack(sums) - weight * probabilities[row, :, None] * query
        expected = 10 * normalize(others) @ query + bias
        assert torch.allclose(refined.scores(queries)[row], expected, atol=1e-4)


def test_an_observation_alone_does_not_confirm_its_own_guess():
    reference, queries, _ = shifted()
    for layout in (reference, reference.repeat(2, 1)):  # one prototype for each class, or two
        labels = torch.arange(len(layout)) % 2
        shared = {"prototype_labels": labels, "counts": torch.ones(len(layout))}
        moving, fixed = (transductive(layout, transduction=torch.tensor(one), **shared) for one in (2.0, 0.0))
        assert torch.allclose(classified([moving], queries[:1]), classified([fixed], queries[:1]), atol=1e-4)
        assert not torch.allclose(classified([moving], queries), classified([fixed], queries), atol=0.1)


def test_observations_without_a_readable_photo_take_no_part_in_transduction():
    reference, queries, _ = shifted()
    bank = transductive(reference)
    padded = classified([bank], torch.cat([queries, torch.zeros(500, 3)]))
    assert torch.allclose(padded[:80], classified([bank], queries), atol=1e-6)
    assert torch.allclose(padded[80:].exp(), torch.tensor(0.5))  # of two classes


@pytest.mark.parametrize(("count", "is_fixed"), [(0.0, False), (1e9, True)])
def test_a_prototype_of_many_observations_hardly_moves(count, is_fixed):
    reference, queries, _ = shifted()
    refined = transductive(reference, counts=torch.full((2,), count)).refined(queries).bank.prototypes
    assert torch.allclose(refined, reference, atol=1e-4) == is_fixed


def test_transduction_that_fails_leaves_the_bank_as_it_was(capsys):
    reference, queries, _ = shifted()
    fixed = transductive(reference, transduction=torch.tensor(0.0))
    broken = transductive(reference, counts=torch.full((2,), torch.nan))
    assert torch.equal(classified([broken], queries), classified([fixed], queries))
    assert capsys.readouterr().out == "predicting without transduction: the prototypes are not finite\n"


def test_a_bank_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    names = ("prototypes", "owners", "counts", "bias", "scale", "share", "transduction")
    save_file({f"0.{name}": torch.zeros(1) for name in names}, tmp_path / "bank.safetensors")
    with pytest.raises(InputError, match=r"bank\.safetensors is not a bank of this version .*owners.*: train"):
        read_banks(tmp_path / "bank.safetensors")

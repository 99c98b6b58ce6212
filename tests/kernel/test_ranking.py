"""The ranking: in chunks, on every device, summed over an ensemble."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from kernel import bank, ranking
from kernel.bank import CPU_CHUNK, GPU_CHUNK, MIN_OBSERVATIONS, TRANSDUCTION_ROUNDS, Bank, observations_at_once
from kernel.ranking import best_of_tiles, classify, largest, probable_classes, rank
from tests.kernel.test_bank import DEVICES, classified, random_bank


def chunks_of(monkeypatch, count):
    for module in (bank, ranking):
        monkeypatch.setattr(module, "observations_at_once", lambda columns, device: count)


def test_chunks_do_not_change_the_ranking(monkeypatch):
    bank, queries = random_bank(transduction=torch.tensor(0.5)), normalize(torch.randn(50, 8))
    whole = rank([[bank]], [1.0], [queries], 10)[0]
    chunks_of(monkeypatch, 7)
    assert torch.equal(rank([[bank]], [1.0], [queries], 10)[0], whole)
    assert torch.equal(whole, classified([bank], queries).sort(descending=True, stable=True).indices[:, :10])


def test_the_scores_of_a_chunk_fit_in_a_fixed_memory():
    for device, memory in ((torch.device("cpu"), CPU_CHUNK), (torch.device("cuda"), GPU_CHUNK)):
        for classes in (1, 71, 2427, 32_000):
            observations = observations_at_once(classes, device)
            assert memory - 4 * classes < 4 * classes * observations <= memory
    assert observations_at_once(10**9, torch.device("cpu")) == MIN_OBSERVATIONS


def in_double_precision(bank, queries):
    """(observations, classes) log-probabilities by the formula, a class at a time."""
    weight, bias = (getattr(bank.layers[0], name).double() for name in ("weight", "bias"))
    queries = normalize(queries.double() @ weight + bias, dim=1)
    has_photo, prototypes, counts = queries[:-1], bank.prototypes.double(), bank.counts.double()[:, None]
    labels, start = bank.prototype_labels, bank.prototypes.double()
    own = torch.zeros(len(queries), len(prototypes), 1, dtype=torch.float64)  # the part of each query in a prototype
    sums = start
    for _ in range(TRANSDUCTION_ROUNDS if bank.transduction else 0):
        logits = bank.logit_scale.double() * has_photo @ prototypes.T + bank.bias.double()[labels]
        own[:-1] = bank.transduction.double() * logits.softmax(dim=1)[:, :, None]
        sums = start * counts + (own[:-1] * has_photo[:, None]).sum(dim=0)
        prototypes = normalize(sums, dim=1)
    others = normalize(sums - own * queries[:, None], dim=2)  # (queries, prototypes, features)
    found = (others * queries[:, None]).sum(dim=2)
    classes = [found[:, labels == label].amax(dim=1) for label in range(len(bank.bias))]
    return (torch.stack(classes, dim=1) * bank.logit_scale.double() + bank.bias.double()).log_softmax(dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [3, 16, None])
def test_an_ensemble_of_mixtures_ranks_as_its_formula_in_double_precision(monkeypatch, size, device):
    generator, classes, queries = torch.Generator().manual_seed(3), 24, 41
    several = torch.cat([torch.arange(classes), torch.randint(classes, (50,), generator=generator)])
    several = several[torch.randperm(len(several), generator=generator)]  # prototypes of each class, in any order
    labels, alone = [torch.arange(classes), several, several.flip(0)], torch.zeros(1, 8)
    banks = [
        random_bank(
            classes=len(own),
            seed=seed,
            prototype_labels=own,
            counts=torch.rand(len(own), generator=generator) + 0.5,
            bias=torch.randn(classes, generator=generator) / 4,
            mixture_weight=torch.tensor(weight),
            transduction=torch.tensor(transduction),
        )
        for seed, (own, weight, transduction) in enumerate(zip(labels, (0.3, 0.7, 1.0), (0.5, 0.5, 0.0), strict=True))
    ]
    embeddings = [torch.cat([normalize(torch.randn(queries, 8, generator=generator)), alone]) for _ in range(2)]
    metadata_prior = torch.randn(queries + 1, classes, generator=generator)
    first, second, third = (in_double_precision(bank, embeddings[bank is banks[2]]) for bank in banks)
    mixture = (0.3 * first.exp() + 0.7 * second.exp()).log()
    expected = 0.6 * mixture + 0.4 * third
    expected[-1] = 0  # no readable photo: the metadata alone
    expected += metadata_prior
    if size:
        chunks_of(monkeypatch, size)
    members, weights = [banks[:2], banks[2:]], [0.6, 0.4]
    found = rank(members, weights, embeddings, classes, metadata_prior, torch.device(device))[0]
    assert torch.equal(found, expected.sort(dim=1, descending=True).indices)
    scores = torch.cat(list(classify(banks[:2], embeddings[0], torch.device(device)))).cpu()
    assert torch.allclose(scores[:-1].double(), mixture[:-1], atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_are_ranked_by_class_on_every_device(device):
    generator = torch.Generator().manual_seed(0)
    # Small powers of two: their products and sums are exact on every device.
    prototypes = 2.0 ** -torch.randint(1, 4, (12, 16), generator=generator)
    bank = random_bank(classes=2000, features=16, layers=(), bias=torch.zeros(2000), logit_scale=torch.tensor(4.0))
    bank = replace(bank, prototypes=prototypes[torch.randint(12, (2000,), generator=generator)])
    queries = torch.nn.functional.one_hot(torch.randint(16, (300,), generator=generator), 16).float()
    scores = 4 * queries @ bank.prototypes.T
    expected = scores.sort(dim=1, descending=True, stable=True).indices
    for guesses in (1, 10, 2000):
        assert torch.equal(
            rank([[bank]], [1.0], [queries], guesses, None, torch.device(device))[0], expected[:, :guesses]
        )


@pytest.mark.parametrize("limit", [1, 5, 20])
@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_where_memory_runs_out_smaller_chunks_rank_the_same(monkeypatch, capsys, limit, message):
    bank, queries = random_bank(transduction=torch.tensor(0.5)), normalize(torch.randn(50, 8))
    whole = rank([[bank]], [1.0], [queries], 10)[0]
    attempts = []

    def limited(method):
        def compute(bank, transformed, *chunk):
            attempts.append(len(transformed[chunk[0]] if chunk else transformed))
            if attempts[-1] > limit:
                raise RuntimeError(message)
            return method(bank, transformed, *chunk)

        return compute

    monkeypatch.setattr(Bank, "scores", limited(Bank.scores))
    monkeypatch.setattr(Bank, "assign", limited(Bank.assign))
    assert torch.equal(rank([[bank]], [1.0], [queries], 10)[0], whole)
    assert attempts[0] == 50 and attempts[-1] <= limit
    assert capsys.readouterr().out == ""


def test_any_other_error_ends_the_ranking_at_once(monkeypatch):
    def fail(bank, transformed):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Bank, "scores", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rank([[random_bank()]], [1.0], [torch.randn(9, 8)], 3)


META = torch.device("meta")  # a device on which some operations fail, since it has no memory to compute in


@pytest.mark.parametrize("transduction", [0.0, 0.5])
def test_a_device_that_fails_leaves_the_ranking_to_the_cpu(capsys, transduction):
    bank, queries = random_bank(transduction=torch.tensor(transduction)), normalize(torch.randn(50, 8))
    expected = rank([[bank]], [1.0], [queries], 10)[0]
    assert torch.equal(rank([[bank]], [1.0], [queries], 10, None, META)[0], expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ranking the classes on the CPU instead of meta: ")


def test_a_device_without_memory_for_one_observation_leaves_the_ranking_to_the_cpu(monkeypatch, capsys):
    bank, queries = random_bank(), normalize(torch.randn(50, 8))
    expected, compute, attempts = rank([[bank]], [1.0], [queries], 10)[0], Bank.scores, []

    def limited(bank, transformed):
        if transformed.device == META:
            attempts.append(len(transformed))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(bank, transformed)

    monkeypatch.setattr(Bank, "scores", limited)
    assert torch.equal(rank([[bank]], [1.0], [queries], 10, None, META)[0], expected)
    assert attempts == [50, 25, 12, 6, 3, 1]
    assert capsys.readouterr().out == "ranking the classes on the CPU instead of meta: its memory does not suffice\n"


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_in_full_precision_whatever_the_process_has_set(device):
    direction = normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    # In 8 bits, which some CPUs use for "medium", or the 10 of TF32, these would be equal, and ranked by class.
    bank = random_bank(classes=40, features=64, layers=(), prototypes=direction * torch.linspace(1, 1.001, 40)[:, None])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = rank([[bank]], [1.0], [direction.repeat(300, 1)], 40, None, torch.device(device))[0]
        assert found.tolist() == [list(range(39, -1, -1))] * 300
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels of score: many equal ones, also across the last guess
@pytest.mark.parametrize(("classes", "count"), [(20, 1), (20, 20), (20, 25), (3257, 1), (3257, 3), (10240, 10)])
def test_the_largest_scores_are_those_of_a_stable_sort(levels, classes, count):
    scores = torch.randint(levels, (200, classes), generator=torch.Generator().manual_seed(levels)).float()
    scores[0] = -torch.inf
    scores[1, ::2] = -torch.inf
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(largest(scores, count), expected)


def test_a_members_banks_average_their_probabilities():
    banks = [random_bank(seed=seed, mixture_weight=torch.tensor(weight)) for seed, weight in ((1, 0.3), (2, 0.7))]
    queries = normalize(torch.randn(9, 8))
    alone = [classified([replace(bank, mixture_weight=torch.tensor(1.0))], queries).exp() for bank in banks]
    assert torch.allclose(classified(banks, queries).exp(), 0.3 * alone[0] + 0.7 * alone[1], atol=1e-5)


def test_an_ensemble_ranks_by_the_weighted_sum_of_its_members_log_probabilities():
    banks = [random_bank(seed=1), random_bank(features=5, seed=2)]
    queries = [normalize(torch.randn(9, 8)), normalize(torch.randn(9, 5))]
    parts = [classified([bank], query) for bank, query in zip(banks, queries, strict=True)]
    assert torch.equal(
        rank([[bank] for bank in banks], [0.8, 0.2], queries, 3)[0], (0.8 * parts[0] + 0.2 * parts[1]).topk(3).indices
    )


def test_probabilities_are_the_softmax_of_what_ranks_the_classes():
    banks, queries = [random_bank(10, seed=seed) for seed in range(2)], [torch.randn(6, 8), torch.randn(6, 8)]
    prior = torch.randn(6, 10)
    totals = [torch.cat(list(classify([bank], own))) for bank, own in zip(banks, queries, strict=True)]
    expected = (0.8 * totals[0] + 0.2 * totals[1] + prior).softmax(dim=1).sort(descending=True)
    indices, probabilities = rank([[bank] for bank in banks], [0.8, 0.2], queries, 10, prior)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(probabilities, expected.values)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))


def test_the_metadata_prior_is_added_to_the_observation_that_it_belongs_to(monkeypatch):
    bank, queries, prior = random_bank(), normalize(torch.randn(50, 8)), 3 * torch.randn(50, 30)
    chunks_of(monkeypatch, 7)
    expected = (classified([bank], queries) + prior).sort(descending=True, stable=True).indices[:, :10]
    assert torch.equal(rank([[bank]], [1.0], [queries], 10, prior)[0], expected)


@pytest.mark.parametrize("seed", range(10))
def test_the_ranking_is_a_full_sort_by_score_and_then_by_class(seed):
    generator = torch.Generator().manual_seed(seed)
    bank = random_bank(classes=20, seed=seed)
    bank = replace(bank, prototypes=bank.prototypes[torch.randint(12, (20,), generator=generator)])  # equal scores
    queries = torch.randn(30, 8, generator=generator)
    scores = classified([bank], queries).tolist()
    expected = [sorted(range(20), key=lambda label: (-row[label], label)) for row in scores]
    for guesses in (1, 10, 20):
        assert rank([[bank]], [1.0], [queries], guesses)[0].tolist() == [row[:guesses] for row in expected]


def test_more_guesses_than_classes_gives_all_and_no_queries_give_none():
    assert rank([[random_bank(classes=3)]], [1.0], [torch.randn(2, 8)], 10)[0].shape == (2, 3)
    assert rank([[random_bank()]], [1.0], [torch.zeros(0, 8)], 10)[0].shape == (0, 10)


def test_a_class_is_as_probable_as_in_its_best_tile_and_tiles_without_an_embedding_do_not_count():
    ranked = torch.tensor([[2, 0], [0, 5], [1, 2], [3, 4], [4, 3], [0, 1]])
    probabilities = torch.tensor([[0.6, 0.2], [0.7, 0.1], [0.9, 0.05], [0.5, 0.25], [0.4, 0.3], [0.1, 0.1]])
    has_embedding = torch.tensor([True, True, False, True, True, True])
    first, second = best_of_tiles(ranked, probabilities, has_embedding.view(2, -1))
    assert list(first.items()) == [(0, pytest.approx(0.7)), (2, pytest.approx(0.6)), (5, pytest.approx(0.1))]
    assert list(second) == [3, 4, 0, 1]
    assert list(best_of_tiles(ranked[:2], probabilities[:2], torch.zeros(1, 2, dtype=torch.bool))) == [{}]


@pytest.mark.parametrize(
    ("threshold", "most", "expected"), [(0.6, 9, [0, 2]), (0.61, 9, [0]), (0.8, 9, [0]), (0, 2, [0, 2])]
)
def test_an_answer_has_the_classes_from_a_probability_on_and_one_at_least(threshold, most, expected):
    assert list(probable_classes({0: 0.7, 2: 0.6, 5: 0.1}, threshold, most)) == expected

"""The benchmark of matching compares ways that find the same neighbours."""

import sys

import pytest
import torch

from local.benchmarks.matching import faiss_search, matching_row, measure_matching


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)


def test_the_kernel_and_a_product_with_topk_find_the_same(without_faiss, capsys):
    row = measure_matching(torch.device("cpu"), 40, 300)
    assert set(row) == {"observations", "classes", "seconds", "topk_seconds"}
    assert (row["observations"], row["classes"]) == (40, 300)
    assert "100.000% the same" in capsys.readouterr().out


def test_a_missing_faiss_leaves_its_cell_empty(without_faiss):
    assert faiss_search(torch.eye(3)) is None
    found = matching_row({"seconds": 1.0, "topk_seconds": 2.0}, {"topk_seconds": 1.0})
    assert found == "| 1.00 | 2.00 (the kernel 0.50×, 100.000% the same) | not installed |"


def test_faiss_finds_the_same(capsys):
    pytest.importorskip("faiss")
    assert "faiss_seconds" in measure_matching(torch.device("cpu"), 40, 300)
    assert capsys.readouterr().out.count("100.000% the same") == 2

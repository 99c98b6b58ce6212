"""The report shows near-duplicates of held-out photos, and scores with and without them.

python -m pytest tests/local/report/test_duplicates.py
"""

import dataclasses
import re

import numpy as np
import pytest

from local.base.metrics import held_out_scores, interval_of
from local.data import duplicates
from local.recipes.recipe import make_recipe
from local.report.duplicates import score_duplicates
from local.report.evidence import Evidence, read_evidence
from local.training.run import train_run
from tests.conftest import TINY


@pytest.fixture(scope="module")
def evidence(trained, drawn) -> Evidence:
    return read_evidence(trained, drawn.competition)


def with_embeddings(evidence: Evidence, plain: np.ndarray, **changes: object) -> Evidence:
    """The evidence with other embeddings of its photos."""
    changed = dataclasses.replace(evidence)
    changed.__dict__["embedded"] = dataclasses.replace(evidence.embedded, plain=plain, **changes)
    return changed


def photo_of(evidence: Evidence, observation: int) -> int:
    """The index of the first photo of an observation."""
    return int(np.flatnonzero(evidence.embedded.photo_observations == observation)[0])


def test_the_scores_without_near_duplicates_are_those_of_the_other_observations(evidence):
    copied, others = [0, 3], len(evidence.queries)
    plain = np.eye(len(evidence.embedded.photos))
    for query in copied:
        plain[photo_of(evidence, query)] = plain[photo_of(evidence, others + query)]
    found = score_duplicates(with_embeddings(evidence, plain))
    assert (found.duplicates, found.observations) == (2, 2)
    classes = np.array(evidence.classes)
    is_copied = np.isin(np.arange(others), copied)
    for mask, own in ((is_copied, found.with_duplicates), (~is_copied, found.without_duplicates)):
        truth, top = classes[evidence.truth[mask]], classes[evidence.outcome.top[mask]]
        expected = held_out_scores(truth, top, evidence.weights[mask], is_macro=False)
        for name in ("recall_at_1", "recall_at_5", "macro_f1"):
            assert dataclasses.asdict(own[name]) == pytest.approx(interval_of(expected, name))


def test_a_pair_names_both_photos_and_observations_with_their_classes(evidence):
    embedded, other = evidence.embedded, len(evidence.queries)
    plain = np.eye(len(embedded.photos))
    plain[photo_of(evidence, 0)] = 0.99 * plain[photo_of(evidence, other)] + 0.1 * plain[photo_of(evidence, 0)]
    found = score_duplicates(with_embeddings(evidence, plain))
    [pair] = found.pairs
    assert (pair.observation, pair.other_observation) == (evidence.queries[0].id, embedded.observations[other].id)
    assert pair.photo == evidence.photo(evidence.queries[0])
    assert pair.other_photo == evidence.photo(embedded.observations[other])
    assert (pair.label, pair.other_label) == (embedded.classes[0], embedded.classes[other])
    assert found.same_class == int(pair.label == pair.other_label)
    assert pair.cosine == pytest.approx(0.99 / np.hypot(0.99, 0.1))


def test_two_held_out_photos_that_match_each_other_are_one_pair(evidence):
    plain = np.eye(len(evidence.embedded.photos))
    plain[photo_of(evidence, 0)] = plain[photo_of(evidence, 1)]
    in_bank = np.ones_like(evidence.embedded.is_reference)
    found = score_duplicates(with_embeddings(evidence, plain, is_reference=in_bank))
    assert (found.duplicates, found.observations, len(found.pairs)) == (2, 2, 1)


def test_without_near_duplicates_the_scores_are_those_of_the_headline(evidence):
    found = score_duplicates(with_embeddings(evidence, np.eye(len(evidence.embedded.photos))))
    assert (found.duplicates, found.pairs, found.with_duplicates) == (0, [], None)
    printed = evidence.manifest.members[0].validation
    assert found.without_duplicates["recall_at_1"].value == pytest.approx(printed["recall_at_1"])


def test_training_counts_the_near_duplicates_that_the_report_shows(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duplicates, "MAX_BACKGROUND", 1.0)  # to the tiny encoder most photos look the same
    settings = {**TINY, "epochs": 0, "reference": "train+val", "views": ["plain", "rotate90"]}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "run")
    [line] = re.findall(r"near-duplicates: (\d+) of (\d+) held-out photos", capsys.readouterr().out)
    found = score_duplicates(read_evidence(tmp_path / "run", drawn.competition))
    assert (str(found.duplicates), str(found.photos)) == line
    assert found.duplicates > 0

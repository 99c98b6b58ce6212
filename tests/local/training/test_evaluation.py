"""An encoder is evaluated as a run is scored, and the best epoch is the best by the monitored score."""

import numpy as np
import pytest
import torch

from kernel.embeddings import embed_observations
from kernel.ranking import classify
from local.base.metrics import score
from local.data.competition import read_competition
from local.data.observations import sort_ids, split_for_validation
from local.training.evaluation import Evaluator, best_row


def test_the_macro_f1_of_an_epoch_is_that_of_a_run_also_where_the_bank_lacks_classes(encoder, drawn):
    split = split_for_validation(read_competition(drawn.competition), 0)
    train, validation = split.train_set, split.validation_set
    lacking = sort_ids(validation.class_ids)[:2]
    classes = [class_id for class_id in sort_ids(train.class_ids) if class_id not in lacking]
    train = train.subset(np.isin(train.class_ids, classes))
    assert len(set(validation.class_ids) - set(classes)) == 2
    evaluation = Evaluator(train, validation, ("plain",), "mean", "half").evaluate(encoder, "epoch 0")
    queries = embed_observations(encoder, validation.observations, ("plain",)).values
    firsts = [classes[one.argmax()] for chunk in classify([evaluation.bank], queries) for one in chunk]
    assert set(firsts) - set(validation.class_ids) or set(validation.class_ids) - set(firsts)
    expected = score(validation.class_ids, [[first] for first in firsts])["macro_f1"]
    assert evaluation.scores["macro_f1"] == pytest.approx(expected, abs=1e-12)


def test_an_epoch_is_evaluated_in_the_precision_of_the_kernel_and_trained_further_in_full(encoder, drawn, monkeypatch):
    split = split_for_validation(read_competition(drawn.competition), 0)
    used = []
    hook = encoder.module.register_forward_pre_hook(lambda module, inputs: used.append(inputs[0].dtype))
    # As on a GPU.
    monkeypatch.setattr("local.training.evaluation.fitting_dtype", lambda module, device, precision: torch.bfloat16)
    evaluator = Evaluator(split.train_set, split.validation_set, ("plain",), "mean", "half")
    evaluation = evaluator.evaluate(encoder, "epoch 0")
    hook.remove()
    monkeypatch.undo()
    assert set(used) == {torch.bfloat16}
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}
    expected = evaluator.evaluate(encoder, "epoch 0")
    assert evaluation.scores != expected.scores
    assert evaluation.scores["log_loss"] == pytest.approx(expected.scores["log_loss"], rel=0.02)


@pytest.mark.parametrize(("monitor", "best"), [("recalls", 0), ("macro_f1", 1), ("recall_at_10", 2), ("log_loss", 2)])
def test_the_best_epoch_is_the_best_by_the_monitored_score(monitor, best):
    rows = [
        {"recall_at_1": 0.6, "recall_at_5": 0.8, "recall_at_10": 0.8, "macro_f1": 0.3, "log_loss": 2.0},
        {"recall_at_1": 0.5, "recall_at_5": 0.8, "recall_at_10": 0.8, "macro_f1": 0.4, "log_loss": 1.0},
        {"recall_at_1": 0.1, "recall_at_5": 0.7, "recall_at_10": 0.9, "macro_f1": 0.4, "log_loss": 0.5},
    ]
    assert best_row(rows, monitor) == best

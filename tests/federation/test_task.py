"""Metrics of a task: by hand, and over the batches of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.task import CLASSIFICATION, MeanOverBatches, OfPredictions, Task
from tests.algorithms.task import AllOptions


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    values = torch.arange(float(sum(sizes))).view(-1, 1)
    return [(part, torch.zeros_like(part)) for part in values.split(sizes)]


def test_classification_is_cross_entropy_and_accuracy() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    found = evaluate(nn.Identity(), [(logits, labels)], "cpu", *CLASSIFICATION)
    # -log softmax: log(1 + e^-2) for the first, 2 more for the second
    assert found.loss == pytest.approx(math.log1p(math.exp(-2)) + 1) and found.accuracy == 0.5
    assert CLASSIFICATION.metric.name == "accuracy"


def test_a_metric_of_all_predictions_sees_them_together() -> None:
    # A median is no mean of medians: of 0 1 2 3 10 it is 2; of the batches 0 1 2 3 | 4 it would be 1.5 and 4.
    task = Task(squares, OfPredictions("median", lambda targets, outputs: np.median(outputs) / 10))
    found = evaluate(nn.Identity(), batches(4, 1), "cpu", *task)
    assert found.accuracy == pytest.approx(0.2)
    # (0 + 1 + 4 + 9 + 16) / 5: samples weigh, whatever batch they are in
    assert found.loss == pytest.approx(6.0) and found.samples == 5


def test_targets_come_first_and_keep_their_shape() -> None:
    seen = []
    task = Task(squares, OfPredictions("seen", lambda targets, outputs: seen.append((targets, outputs)) or 0.5))
    evaluate(nn.Identity(), [(torch.ones(2, 1), torch.zeros(2, 1)), (torch.ones(1, 1), torch.zeros(1, 1))],
             "cpu", *task)  # fmt: skip
    assert (seen[0][0] == 0).all() and (seen[0][1] == 1).all() and seen[0][0].shape == (3, 1)


def test_a_mean_over_batches_weighs_batches_alike() -> None:
    task = Task(squares, MeanOverBatches("mean", lambda targets, outputs: outputs.mean() / 10))
    # batches 0 1 2 3 and 4: (1.5 + 4) / 2 / 10
    assert evaluate(nn.Identity(), batches(4, 1), "cpu", *task).accuracy == pytest.approx(0.275)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_of_predictions_that_diverged_there_is_no_metric(broken: float) -> None:
    task = Task(squares, OfPredictions("never", lambda *_: pytest.fail("it was asked")))
    found = evaluate(nn.Identity(), [(torch.full((2, 1), broken), torch.zeros(2, 1))], "cpu", *task)
    assert math.isnan(found.accuracy) and found.samples == 2


def test_a_metric_without_comparable_samples_is_nan() -> None:
    task = Task(squares, OfPredictions("index", lambda targets, outputs: 1 / 0))
    assert math.isnan(evaluate(nn.Identity(), batches(2), "cpu", *task).accuracy)


def test_a_worker_trains_on_the_tasks_loss() -> None:

    from fedsq_plugin.algorithms import algorithm
    from fedsq_plugin.federation.client import Client
    from fedsq_plugin.federation.training import LocalTraining

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    client = Client(model, algorithm("FedAvg"), AllOptions(), LocalTraining(learning_rate=0.1), seed=0, loss=squares)
    client.train(0, [(torch.tensor([[2.0]]), torch.tensor([[1.0]]))], 0)
    # d/dw (2w - 1)² = 4 (2w - 1) = 4 at w = 1
    assert model.weight.item() == pytest.approx(1 - 0.1 * 4)

"""Labels of every kind beside outputs: the task that is told, its loss and metric against naive ones, and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.evaluate import evaluate, pooled
from fedsq_plugin.federation.labels import misfit, tell
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.task import R2, Accuracy, CrossEntropy, LabelError, MultiLabel, SquaredError, Task
from fedsq_plugin.federation.training import LocalTraining
from fedsq_plugin.federation.updates import metrics_problem

DRAW = torch.Generator().manual_seed(0)
LOGITS, ONE = torch.randn(12, 3, generator=DRAW), torch.randn(12, 1, generator=DRAW)
PIXELS = torch.randn(4, 3, 5, 5, generator=DRAW)
NUMBERS = torch.arange(12) % 3
MASK = torch.randint(3, (4, 5, 5), generator=DRAW)
SOFT = torch.softmax(torch.randn(12, 3, generator=DRAW), 1)
MANY = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]] * 4)
REAL = torch.randn(12, generator=DRAW)
ONE_HOT = nn.functional.one_hot(NUMBERS, 3)


def told(outputs: Tensor, labels: Tensor, asked: str = "auto", ignored: int = -100, **more: Any) -> tuple[str, Task]:
    return tell(outputs, labels, asked, ignored, **more)


@pytest.mark.parametrize(
    ("outputs", "labels", "kind"),
    [
        (LOGITS, NUMBERS, "classification"),
        (LOGITS, NUMBERS.to(torch.uint8), "classification"),
        (LOGITS, NUMBERS.float(), "classification"),
        (LOGITS, NUMBERS[:, None], "classification"),
        (LOGITS, ONE_HOT, "classification"),
        (LOGITS, ONE_HOT.bool(), "classification"),
        (LOGITS, SOFT, "classification"),
        (LOGITS, SOFT.half(), "classification"),
        (LOGITS, MANY, "multi_label"),
        (LOGITS, MANY.float(), "multi_label"),
        (LOGITS, MANY.bool(), "multi_label"),
        (LOGITS, torch.randn(12, 3), "regression"),
        (ONE, REAL, "regression"),
        (ONE, REAL[:, None], "regression"),
        (ONE[:, 0], REAL[:, None], "regression"),
        (PIXELS, MASK, "classification"),
        (PIXELS, MASK[:, None], "classification"),
        (PIXELS, torch.softmax(PIXELS, 1), "classification"),
        (PIXELS[:, :1], torch.randn(4, 5, 5), "regression"),
    ],
)
def test_the_task_is_told_from_labels_and_outputs(outputs: Tensor, labels: Tensor, kind: str) -> None:
    assert told(outputs, labels)[0] == kind


def test_more_labels_tell_what_a_batch_cannot() -> None:
    assert told(LOGITS, ONE_HOT, others=[MANY])[0] == "multi_label"
    assert told(ONE, torch.ones(12), others=[REAL])[0] == "regression"


@pytest.mark.parametrize(
    ("outputs", "labels", "line"),
    [
        (ONE, NUMBERS % 2, "the labels are 0 and 1 beside one output, which may be a decision or a value: set task to"),
        (ONE, (NUMBERS % 2).float()[:, None], "set task to multi_label or regression"),
        (ONE, NUMBERS, "the label 2, and the model has one output: give it one for every class, or set task"),
        (LOGITS, ONE_HOT * 2, "whole numbers (0 to 2), one for each of 3 outputs, which fit several tasks: set task"),
        (LOGITS, NUMBERS + 7, "the label 7 is outside: the model has 3 outputs, for labels 0 to 2; mend the labels or"),
        (LOGITS, NUMBERS - 1, "set ignore_index: -1 where it marks"),
        (LOGITS, REAL, "is no class number, and the model has 3 outputs"),
        (LOGITS, torch.full((12,), math.nan), "the labels have NaN or infinite values"),
        (LOGITS, torch.zeros(12, 2), "the labels of a batch are 12x2 float32 beside outputs 12x3 float32, which fits"),
        (PIXELS, torch.zeros(4, 6, 6).long(), "4x6x6 int64 beside outputs 4x3x5x5 float32"),
        (LOGITS, torch.zeros(12, 3, dtype=torch.complex64), "which no task takes"),
        (LOGITS, NUMBERS[0], "a batch has a label for every sample (N, …); a data set alone, or a loader without a"),
        (LOGITS, NUMBERS[:-1], "a batch has labels 11 int64 beside outputs 12x3 float32: they are not as many"),
    ],
)  # fmt: skip
def test_labels_that_fit_no_task_or_several_are_refused(outputs: Tensor, labels: Tensor, line: str) -> None:
    with pytest.raises(LabelError) as caught:
        told(outputs, labels)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "labels", "asked", "line"),
    [
        (ONE, NUMBERS % 2, "classification", "the model has one output, which tells no classes apart"),
        (LOGITS, MANY, "classification", "whose rows are no class probabilities"),
        (LOGITS, NUMBERS, "regression", "a regression needs a label for every output"),
        (LOGITS, torch.randn(12, 3), "multi_label", "is outside: decisions are 0 or 1"),
    ],
)
def test_a_task_that_the_labels_do_not_fit_is_refused(outputs: Tensor, labels: Tensor, asked: str, line: str) -> None:
    with pytest.raises(LabelError, match=line):
        told(outputs, labels, asked)


@pytest.mark.parametrize("asked", ["multi_label", "regression"])
def test_what_is_ambiguous_runs_as_asked(asked: str) -> None:
    assert told(ONE, NUMBERS % 2, asked)[0] == asked


def test_a_label_that_is_ignored_is_not_outside() -> None:
    labels = NUMBERS.clone()
    labels[::2] = 255
    assert misfit("classification", LOGITS, labels, 255) is None
    assert misfit("classification", LOGITS, labels.to(torch.uint8), 255) is None
    with pytest.raises(LabelError, match="the label 255 is outside"):
        told(LOGITS, labels)
    # as a byte, -100 would be 156
    assert misfit("classification", LOGITS, torch.full((12,), 156, dtype=torch.uint8), -100) is not None


# Losses


def grads(loss: Any, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    outputs = outputs.clone().requires_grad_()
    value = loss(outputs, labels)
    value.backward()
    assert outputs.grad is not None
    return value.detach(), outputs.grad


@pytest.mark.parametrize(
    ("outputs", "labels", "wanted"),
    [
        (LOGITS, NUMBERS, NUMBERS),
        (LOGITS, NUMBERS[:, None], NUMBERS),
        (LOGITS, NUMBERS.to(torch.int16), NUMBERS),
        (LOGITS, ONE_HOT, ONE_HOT.float()),
        (LOGITS, SOFT.double(), SOFT),
        (PIXELS, MASK[:, None], MASK),
    ],
)
def test_cross_entropy_is_torchs_bit_for_bit(outputs: Tensor, labels: Tensor, wanted: Tensor) -> None:
    found = grads(told(outputs, labels)[1].loss, outputs, labels)
    assert all(
        torch.equal(*pair) for pair in zip(found, grads(nn.functional.cross_entropy, outputs, wanted), strict=True)
    )


def test_ignored_labels_alone_give_no_loss_and_no_gradient() -> None:
    for loss, outputs, labels in (
        (CrossEntropy(), LOGITS, torch.full((12,), -100)),
        (CrossEntropy(7), PIXELS, torch.full((4, 5, 5), 7)),
        (MultiLabel(-1), LOGITS, torch.full((12, 3), -1)),
    ):
        value, gradient = grads(loss, outputs, labels)
        assert value == 0 and torch.equal(gradient, torch.zeros_like(outputs))


def test_binary_cross_entropy_by_a_naive_loop() -> None:
    labels = MANY.clone()
    labels[0, 1] = labels[5, 2] = -100
    found, gradient = grads(MultiLabel(), LOGITS, labels)
    terms = [
        -math.log(p if label else 1 - p)
        for logit, label in zip(LOGITS.flatten().tolist(), labels.flatten().tolist(), strict=True)
        for p in (1 / (1 + math.exp(-logit)),)
        if label != -100
    ]
    assert len(terms) == 34 and float(found) == pytest.approx(sum(terms) / 34, rel=1e-5)
    assert gradient[0, 1] == gradient[5, 2] == 0


@pytest.mark.parametrize("labels", [torch.arange(12.0), torch.arange(12.0)[:, None], torch.arange(12)])
def test_a_squared_error_never_broadcasts(labels: Tensor) -> None:
    naive = sum((a - b) ** 2 for a, b in zip(ONE.flatten().tolist(), range(12), strict=True)) / 12
    assert float(SquaredError()(ONE, labels)) == pytest.approx(naive, rel=1e-6)
    with pytest.raises(LabelError, match="12x2 float32 beside outputs 12x1"):
        SquaredError()(ONE, torch.zeros(12, 2))


@pytest.mark.parametrize("wrong", [torch.full((12,), 3), torch.full((12,), -1), torch.zeros(11).long()])
def test_labels_that_torch_refuses_are_a_line(wrong: Tensor) -> None:
    with pytest.raises(LabelError, match=r"the labels of a batch are 1\d int64 beside outputs 12x3 float32 \("):
        CrossEntropy()(LOGITS, wrong)


# Metrics


def test_ignored_labels_count_nowhere_in_an_evaluation() -> None:
    labels = MASK.clone()
    labels[0], labels[2, :4] = -100, -100  # unevenly over the batches
    batches = [(PIXELS[:1], labels[:1]), (PIXELS[1:3], labels[1:3]), (PIXELS[3:], labels[3:])]
    found = evaluate(nn.Identity(), batches, "cpu", *told(PIXELS, labels)[1])
    counted = labels != -100
    loss = nn.functional.cross_entropy(PIXELS, labels)
    right = (PIXELS.argmax(1) == labels)[counted].float().mean()
    assert found == pytest.approx((float(loss), float(right), int(counted.sum())), rel=1e-6)
    parts = [evaluate(nn.Identity(), [batch], "cpu", *told(PIXELS, labels)[1]) for batch in batches]
    assert math.isnan(parts[0].accuracy) and parts[0].samples == 0
    assert pooled(parts) == pytest.approx(found, rel=1e-6)


def test_an_ignored_class_counts_nowhere_where_the_model_finds_it() -> None:
    # The model says class 0 twice; label 0 is ignored, of the others one of two is right.
    outputs, labels = torch.tensor([[9.0, 0], [9.0, 0], [0, 9.0]]), torch.tensor([0, 1, 1])
    metric = Accuracy(ignored=0)
    assert metric.of_all([metric.of_batch(outputs, labels)], [metric.size(labels)]) == 0.5


@pytest.mark.parametrize("labels", [SOFT, ONE_HOT, NUMBERS, NUMBERS[:, None]])
def test_accuracy_of_every_form(labels: Tensor) -> None:
    found = evaluate(nn.Identity(), [(LOGITS[:5], labels[:5]), (LOGITS[5:], labels[5:])], "cpu",
                     *told(LOGITS, labels)[1])  # fmt: skip
    numbers = labels.argmax(1) if labels.shape == LOGITS.shape else labels.flatten()
    assert found.accuracy == pytest.approx(np.mean(LOGITS.argmax(1).numpy() == numbers.numpy()))
    assert found.samples == 12


def test_one_hot_labels_may_be_truth_values() -> None:
    metric = told(LOGITS, ONE_HOT.bool())[1].metric
    assert metric.of_batch(LOGITS, ONE_HOT.bool()) == (LOGITS.argmax(1) == ONE_HOT.argmax(1)).sum()


def test_right_decisions_by_hand() -> None:
    outputs, labels = torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[1, 1], [-100, 1]])
    found = evaluate(nn.Identity(), [(outputs, labels)], "cpu", *told(outputs, labels, "multi_label")[1])
    assert (found.accuracy, found.samples) == (pytest.approx(2 / 3), 3)


def test_r2_is_that_of_all_batches_together() -> None:
    outputs, targets = torch.randn(12, 2), torch.randn(12, 2) + torch.tensor([100.0, -3.0])
    found = evaluate(nn.Identity(), [(outputs[:5], targets[:5]), (outputs[5:], targets[5:])], "cpu",
                     SquaredError(), R2())  # fmt: skip
    errors = ((outputs - targets).double() ** 2).sum()
    around = ((targets - targets.mean(0)).double() ** 2).sum()
    assert found.accuracy == pytest.approx(float(1 - errors / around), rel=1e-4) and found.accuracy < 0
    assert metrics_problem([1.0, found.accuracy, 12], R2().lowest) is None
    assert metrics_problem([1.0, found.accuracy, 12]) is not None


def test_r2_of_targets_that_do_not_vary_is_nan() -> None:
    found = evaluate(nn.Identity(), [(ONE, torch.full((12,), 2.5))], "cpu", SquaredError(), R2())
    assert math.isnan(found.accuracy) and math.isfinite(found.loss)


# Training


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression"])
def test_training_equals_a_naive_loop(kind: str) -> None:
    x = torch.randn(12, 4)
    width = 1 if kind == "regression" else 3
    labels = {"classification": ONE_HOT, "multi_label": MANY, "regression": x.sum(1)}[kind]
    naive_loss = {
        "classification": lambda z, y: nn.functional.cross_entropy(z, y.argmax(1)),
        "multi_label": lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, y.float()),
        "regression": lambda z, y: ((z[:, 0] - y) ** 2).mean(),
    }[kind]
    nets = [nn.Linear(4, width) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    batches = [(x[:5], labels[:5]), (x[5:], labels[5:])]
    found, task = told(nets[0](x), labels)
    assert found == kind
    training = LocalTraining(learning_rate=0.1)
    local_update(
        nets[0], batches, training, [Phase(2, frozenset(Role))], roles(nets[0]), round=0, seed=0, loss=task.loss
    )
    optimizer = torch.optim.SGD(nets[1].parameters(), 0.1)
    for inputs, targets in batches * 2:
        optimizer.zero_grad()
        naive_loss(nets[1](inputs), targets).backward()
        optimizer.step()
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-6)


def test_a_silo_whose_label_is_outside_is_named() -> None:
    from fedsq_plugin.algorithms import algorithm
    from fedsq_plugin.federation.client import Client
    from tests.algorithms.task import AllOptions

    client = Client(nn.Linear(4, 3), algorithm("FedAvg"), AllOptions(), LocalTraining(learning_rate=0.1), 0)
    with pytest.raises(ConfigError, match=r"^silo 4: the labels of a batch are 2 int64 beside outputs 2x3"):
        client.train(4, [(torch.zeros(2, 4), torch.tensor([0, 9]))], 0)

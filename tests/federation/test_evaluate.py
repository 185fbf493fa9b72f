"""Loss and accuracy, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.federation.evaluate import Metrics, evaluate, pooled
from fedsq_plugin.federation.task import cross_entropy

LOG3 = math.log(3)

# The inputs are the logits: softmax([0, ln 3]) = (1/4, 3/4).
RIGHT = torch.tensor([0.0, LOG3])
WRONG = torch.tensor([LOG3, 0.0])


class Wrapped(nn.Module):
    """The input, wrapped as the function says."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


def test_loss_and_accuracy_by_hand() -> None:
    # Labels 1: -ln(3/4) where right, -ln(1/4) where wrong. Two right, one wrong:
    # (2·(ln 4 - ln 3) + ln 4) / 3 = ln 4 - 2/3·ln 3 = 0.653887
    batch = (torch.stack([RIGHT, WRONG, RIGHT]), torch.tensor([1, 1, 1]))
    found = evaluate(nn.Identity(), [batch])
    assert found.loss == pytest.approx(math.log(4) - 2 / 3 * LOG3, rel=1e-6)
    assert (found.accuracy, found.samples) == (2 / 3, 3)


def test_batches_count_by_their_samples() -> None:
    # Three right in the first batch, one wrong in the second: (3·ln(4/3) + ln 4) / 4, not the mean of
    # the two batches' means.
    batches = [(torch.stack([RIGHT] * 3), torch.tensor([1, 1, 1])), (torch.stack([WRONG]), torch.tensor([1]))]
    found = evaluate(nn.Identity(), batches)
    assert found.loss == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4, rel=1e-6)
    assert (found.accuracy, found.samples) == (0.75, 4)


def test_several_labels_per_sample_are_counted_as_the_loss_counts_them() -> None:
    # A loss that is a mean over all six labels, 0.5 everywhere, is 0.5 over the data set too.
    # Classes are the second dimension, as in torch's cross-entropy.
    batches = [(torch.zeros(2, 5, 3), torch.zeros(2, 3)), (torch.zeros(1, 5, 3), torch.zeros(1, 3))]
    found = evaluate(nn.Identity(), batches, loss=lambda logits, labels: torch.tensor(0.5))
    assert (found.loss, found.accuracy, found.samples) == (0.5, 1.0, 9)


def test_own_loss_is_used() -> None:
    batches = [(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)) for n in (1, 3)]
    # Losses 1 and 3: (1·1 + 3·3) / 4
    found = evaluate(nn.Identity(), batches, loss=lambda logits, labels: torch.tensor(float(len(labels))))
    assert found.loss == 2.5


def test_cross_entropy_takes_labels_of_any_integer_type() -> None:
    value = cross_entropy(RIGHT.view(1, 2), torch.tensor([1], dtype=torch.uint8))
    assert float(value) == pytest.approx(math.log(4 / 3), rel=1e-6)


class Output(NamedTuple):
    logits: Tensor
    aux: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: Output(x, x.neg()),
        lambda x: {"aux": x.neg(), "out": x},
        lambda x: {"loss": x.sum(), "logits": x},
        lambda x: {"scores": x, "loss": x.sum()},
        lambda x: ({"aux": x.neg(), "out": x}, None),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "out", "logits", "only", "nested"],
)
def test_prediction_is_found_in_what_the_model_returns(wrap: Any) -> None:
    batch = (torch.stack([RIGHT, RIGHT]), torch.tensor([1, 1]))
    assert evaluate(Wrapped(wrap), [batch]).accuracy == 1.0


def test_no_batch_gives_nan() -> None:
    found = evaluate(nn.Identity(), [])
    assert (math.isnan(found.loss), math.isnan(found.accuracy), found.samples) == (True, True, 0)


def test_batch_without_samples_gives_nan() -> None:
    found = evaluate(nn.Identity(), [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))])
    assert found.samples == 0
    assert math.isnan(found.accuracy)


def test_model_is_evaluated_in_evaluation_mode() -> None:
    # Dropout of everything would make all logits equal, and class 0 the first of the largest.
    batch = (torch.stack([RIGHT] * 4), torch.ones(4, dtype=torch.long))
    assert evaluate(nn.Dropout(1.0).train(), [batch]).accuracy == 1.0


def test_running_statistics_do_not_move() -> None:
    model = nn.BatchNorm1d(2)
    evaluate(model, [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))])
    assert (model.running_mean.tolist(), int(model.num_batches_tracked)) == ([0.0, 0.0], 0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back(training: bool) -> None:
    model = nn.Sequential(nn.Identity()).train(training)
    evaluate(model, [(torch.stack([RIGHT]), torch.tensor([1]))])
    assert [module.training for module in model.modules()] == [training] * 2


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_after_an_exception(training: bool) -> None:
    model = nn.Linear(3, 2).train(training)
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 5), torch.tensor([0]))])
    assert model.training is training


def test_mode_of_both_copies_is_put_back() -> None:
    dual = DualCopy(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).train())
    evaluate(dual, [(torch.stack([RIGHT]), torch.tensor([1]))])
    assert (dual.training, dual.quantitative.training, dual.structural.training) == (True, True, False)


def test_no_graph_is_built() -> None:
    seen: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits)
        return logits.sum()

    evaluate(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.tensor([0]))], loss=loss)
    assert not seen[0].requires_grad


def test_mode_of_every_module_is_put_back() -> None:
    # A layer that is frozen in evaluation mode stays so.
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.Identity())).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))])
    assert [module.training for module in model.modules()] == before
    assert before.count(False) == 1


# Several data sets


def test_pooled_metrics_by_hand() -> None:
    # (1·2 + 4·6)/8 and (0.5·2 + 1·6)/8
    found = pooled([Metrics(1.0, 0.5, 2), Metrics(4.0, 1.0, 6)])
    assert found == Metrics(3.25, 0.875, 8)


def test_pooled_metrics_are_those_of_the_pooled_data() -> None:
    x, labels = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    parts = [(x[:3], labels[:3]), (x[3:14], labels[3:14]), (x[14:], labels[14:])]
    found = pooled(evaluate(nn.Identity(), [part]) for part in parts)
    assert found == pytest.approx(evaluate(nn.Identity(), [(x, labels)]), rel=1e-6)


def test_data_set_without_samples_does_not_count() -> None:
    nothing = Metrics(float("nan"), float("nan"), 0)
    assert pooled([nothing, Metrics(2.0, 0.5, 4), nothing]) == Metrics(2.0, 0.5, 4)


@pytest.mark.parametrize("parts", [[], [Metrics(float("nan"), float("nan"), 0)]], ids=["none", "empty"])
def test_no_samples_at_all_give_nan(parts: list[Metrics]) -> None:
    found = pooled(parts)
    assert (math.isnan(found.loss), math.isnan(found.accuracy), found.samples) == (True, True, 0)


def test_loss_that_diverged_is_not_hidden() -> None:
    assert math.isnan(pooled([Metrics(float("nan"), 0.5, 2), Metrics(1.0, 1.0, 2)]).loss)

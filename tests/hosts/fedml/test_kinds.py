"""What users bring to FedML: batches, outputs, targets, layers and loaders of many kinds. Each ends as in a naive loop,
or is refused in one line before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.errors import ConfigError

from . import naive
from .conftest import final
from .naive import KINDS, Shaped, assert_same, eight, net, points, three

Run = Callable[..., Any]
CLASSES = KINDS["class numbers"]


# Batches


class Deep(nn.Module):
    """Finds its input wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Any, times: Any = None) -> Any:
        while not isinstance(x, Tensor):
            x = x["x"] if isinstance(x, dict) else x[0]
        return self.net(x if times is None else x * times[:, None])


class Named(NamedTuple):
    target: Any
    image: Any


TWO = torch.tensor(2.0)
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dict": (lambda x, y, i: {"img": x, "label": y}, {}),
    "named tuple": (lambda x, y, i: Named(y, x), {}),
    "dict in a pair": (lambda x, y, i: ({"x": x}, y), {}),
    "tuple in a pair": (lambda x, y, i: ((x, 6), y), {}),
    "triple": (lambda x, y, i: (x, y, i), {"batch": {"inputs": 0, "labels": 1}}),
    "dict of three": (lambda x, y, i: {"id": i, "age": y, "x": x}, {"batch": {"inputs": "x", "labels": "age"}}),
    "keywords": (lambda x, y, i: {"times": TWO, "y": y, "x": x}, {"batch": {"inputs": ["x", "times"], "labels": "y"}}),
    "positions": (lambda x, y, i: (y, x, TWO), {"batch": {"inputs": [1, 2], "labels": 0}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_train_as_plain_pairs(form: str, run: Run) -> None:
    make, options = FORMS[form]
    sets = points(three)
    shaped = [Shaped(one, make) for one in sets[0]], Shaped(sets[1], make)
    found = run(eight(shaped, 3), Deep(), **options)
    times = 2 if form in ("keywords", "positions") else 1
    plain = [TensorDataset(times * x, y) for x, y in (one.tensors for one in (*sets[0], sets[1]))]
    assert_same(final(found), naive.of_sets(Deep(), (plain[:-1], plain[-1])))
    assert_figures(found, CLASSES, plain[-1])


def assert_figures(found: Any, kind: naive.Kind, test: TensorDataset, pick: Any = lambda output: output) -> None:
    x, y = test.tensors
    with torch.no_grad():
        right = kind.figures(pick(found.aggregator.model.eval()(x)), y)
    loss, metric, samples = found.records[-1].metrics
    assert (loss, metric) == (pytest.approx(right.loss, rel=1e-5), pytest.approx(right.metric, rel=1e-5, abs=1e-6))
    assert samples == (y.numel() if kind.metric is naive.decided else len(y))


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedProx"])
@pytest.mark.parametrize("form", ["triple", "dict of three"])
def test_a_batch_that_is_not_clear_is_refused_before_training(form: str, name: str, run: Run, steps: list[int]) -> None:
    shaped = [Shaped(one, FORMS[form][0]) for one in points(three)[0]]
    with pytest.raises(ConfigError, match=r"^silo 0: a batch is .*; set fedsq_args.batch: \{inputs") as caught:
        run(eight((shaped, None), 3), Deep(), name)
    assert "\n" not in str(caught.value) and not steps


# Outputs


class Wrapped(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net, self.head, self.wrap = net(12), nn.Linear(12, 3), wrap

    def forward(self, x: Tensor) -> Any:
        h = self.net(x)
        return self.wrap(h, self.head(h))


OUTPUTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "features first": (lambda h, z: (h, z), lambda out: out[1], {}),
    "logits of a dict": (lambda h, z: {"hidden": z * 2, "logits": z}, lambda out: out["logits"], {}),
    "by number": (lambda h, z: (z * 2, z), lambda out: out[1], {"output": 1}),
    "by name": (lambda h, z: {"aux": z * 2, "main": z}, lambda out: out["main"], {"output": "main"}),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_of_several_outputs_the_logits_are_trained_and_scored(name: str, run: Run) -> None:
    wrap, pick, options = OUTPUTS[name]
    sets = points(three)
    torch.manual_seed(1)
    model = Wrapped(wrap)
    right = naive.of_sets(model, sets, lambda out, y: F.cross_entropy(pick(out), y))
    found = run(eight(sets, 3), model, **options)
    assert_same(final(found), right)
    assert_figures(found, CLASSES, sets[1], pick)


def test_outputs_that_do_not_decide_are_refused_before_training(run: Run, steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"the model returns \(.*\), and which of .* set fedsq_args.output to"):
        run(eight(points(three), 3), Wrapped(lambda h, z: (z, z * 2)), "FedSQ")
    assert not steps


# Targets


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_metric_follow_the_targets(kind: str, run: Run) -> None:
    known = KINDS[kind]
    sets = points(known.label)
    found = run(eight(sets, known.outputs), net(known.outputs))
    assert_same(final(found), naive.of_sets(net(known.outputs), sets, known.over))
    assert_figures(found, known, sets[1])


@pytest.mark.parametrize("told", ["multi_label", "regression"])
def test_zero_and_one_beside_one_output_follow_what_is_told(told: str, run: Run) -> None:
    kind = naive.Kind(lambda x: (x[:, :1] > 0).float(), 1, *KINDS[
        {"multi_label": "several labels", "regression": "real values"}[told]
    ][2:])  # fmt: skip
    sets = points(kind.label)
    found = run(eight(sets, 1), net(1), task=told)
    assert_same(final(found), naive.of_sets(net(1), sets, kind.over))
    assert_figures(found, kind, sets[1])


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "beyond the outputs": (lambda x: three(x) + (x[:, 5] > 0), 3, r"silo \d: the label 3 is outside"),
    "below": (lambda x: three(x) - 1, 3, r"silo \d: the label -1 is outside"),
    "a column beyond": (lambda x: three(x)[:, None] + 1, 3, r"silo \d: the label 3 is outside"),
    "not finite": (lambda x: x[:, 0] / 0, 1, r"silo \d: the labels have NaN or infinite values"),
    "for no output": (lambda x: x[:, :2], 3, r"silo \d: the labels of a batch are"),
    "zero and one beside one output": (lambda x: three(x) // 2, 1, r"set fedsq_args.task to multi_label or regression"),
}


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ"])
@pytest.mark.parametrize("wrong", WRONG)
def test_labels_that_fit_nothing_are_refused_before_training(wrong: str, name: str, run: Run, steps: list[int]) -> None:
    label, outputs, line = WRONG[wrong]
    with pytest.raises(ConfigError, match=line) as caught:
        run(eight(points(label), outputs), net(outputs), name)
    assert "\n" not in str(caught.value) and not steps


def test_a_wrong_label_of_the_last_silo_is_found_before_training(run: Run, steps: list[int]) -> None:
    sets = points(three)
    sets[0][2].tensors[1][-1] = 3
    with pytest.raises(ConfigError, match=r"^silo 2: the label 3 is outside"):
        run(eight(sets, 3), net())
    assert not steps


@pytest.mark.parametrize(("ignored", "options"), [(-100, {}), (255, {"ignore_index": 255})])
def test_ignored_labels_count_nowhere(ignored: int, options: dict[str, Any], run: Run) -> None:
    """Of pixels; the first batch of a silo has no label that counts."""

    def label(x: Tensor) -> Tensor:
        y = three(x)[:, None].repeat(1, 4)
        y[:, 1:] = torch.where(x[:, :3] > 0, y[:, 1:], ignored)
        return y

    sets = points(label)
    sets[0][1].tensors[1][:8] = ignored

    def model() -> nn.Module:
        return nn.Sequential(*net(12), nn.Unflatten(1, (3, 4)))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        known = [-z[n, :, p].log_softmax(0)[int(y[n, p])] for n, p in (y != ignored).nonzero().tolist()]
        return torch.stack(known).mean() if known else (z * 0).sum()

    found = run(eight(sets, 3), model(), **options)
    assert_same(final(found), naive.of_sets(model(), sets, loss))
    x, y = sets[1].tensors
    with torch.no_grad():
        z = found.aggregator.model.eval()(x)
    right = [bool(z[n, :, p].argmax() == y[n, p]) for n, p in (y != ignored).nonzero().tolist()]
    assert found.records[-1].metrics == (
        pytest.approx(float(loss(z, y)), rel=1e-5), pytest.approx(sum(right) / len(right)), len(right),
    )  # fmt: skip


@pytest.mark.parametrize("nothing", [None, [], "an empty loader"])
def test_without_test_data_a_run_trains_and_has_no_figures(nothing: Any, run: Run) -> None:
    sets = points(three)
    data = eight(sets, 3)
    data[3] = DataLoader(sets[1], batch_size=64, drop_last=True) if nothing == "an empty loader" else nothing
    data[6] = dict.fromkeys(data[5], data[3])
    found = run(data, net())
    assert_same(final(found), naive.of_sets(net(), sets))
    assert all(record.metrics is None or math.isnan(record.metrics.accuracy) for record in found.records)
    assert any("test set gives no batch" in note for note in found.notes)

"""Activations that no Python function of torch shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.errors import GateError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.get = lambda: act  # not copied: a scripted function cannot be

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.b(self.get()(self.a(x)))))
        return out


@torch.jit.script
def scripted_leaky(x: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(x, 0.1)


@torch.jit.script
def scripted_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class CutOfRelu(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


apply = Cut.apply


def set_below(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


HIDDEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "scripted leaky_relu": (scripted_leaky, "leaky_relu"),
    "scripted swish": (scripted_swish, "sigmoid"),
    "aten.relu": (torch.ops.aten.relu, "relu"),
    "aten.gelu": (torch.ops.aten.gelu, "gelu"),
    "aten.hardtanh_": (lambda x: torch.ops.aten.hardtanh_(x.clone(), 0.0, 1.0), "hardtanh"),
    "aten.clamp_min": (lambda x: torch.ops.aten.clamp_min(x, 0), "clamp"),
    "aten.max_pool2d": (lambda x: torch.ops.aten.max_pool2d(x[None, None], [1, 1])[0, 0], "max_pool2d"),
    "autograd function": (apply, "Cut"),
    "autograd function around a ReLU": (lambda x: CutOfRelu.apply(x), "CutOfRelu"),
    "GELU by hand": (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "erf"),
    "clamp": (lambda x: x.clamp(min=0), "clamp"),
    "clip": (lambda x: torch.clip(x, -1, 1), "clamp"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(())), "maximum"),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), "where"),
    "product": (lambda x: x * (x > 0), "mask"),
    "product with a float mask": (lambda x: (x > 0).to(x.dtype).mul(x), "mask"),
    "sign": (lambda x: x * (x.sign() + 1) / 2, "mask"),
    "absolute value": (lambda x: (x + x.abs()) / 2, "abs"),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 0.0), "where"),
    "assignment": (set_below, "where"),
    "maximum over a dimension": (lambda x: x.view(-1, 4, 2).max(2)[0].repeat(1, 2), "max"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_activation_is_refused_by_name(kind: str) -> None:
    act, name = HIDDEN[kind]
    with pytest.raises(GateError, match=f"the model itself: .*{name}") as error:
        DualCopy(Net(act))(X)
    assert "\n" not in str(error.value)
    assert any(name in finding.kind for finding in validate(Net(act), X))


@pytest.mark.parametrize("kind", ["aten.relu", "autograd function", "where", "product"])
def test_it_may_stay_ungated_by_name(kind: str) -> None:
    act, _ = HIDDEN[kind]
    (finding,) = validate(Net(act), X)
    model = Net(act)
    dual = DualCopy(model, accept=[f":{finding.kind}"])
    assert torch.equal(dual(X), model(X))


def test_a_relu_in_an_accepted_function_is_the_quantitative_copys() -> None:
    model = Net(lambda x: CutOfRelu.apply(x))
    dual = DualCopy(model, accept=[":CutOfRelu"])
    gate = model.b(F.relu(model.a(X))) > 0
    with torch.no_grad():
        model.a.bias += 3
    torch.testing.assert_close(dual(X), model.c(model.b(F.relu(model.a(X))) * gate))


HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "normalize": lambda x: F.normalize(x),
    "cosine": lambda x: x * F.cosine_similarity(x, x + 1)[:, None],
    "bound that keeps numbers sound": lambda x: x / x.norm().clamp(min=1e-6),
    "temperature": lambda x: x * x.std().exp().clamp(max=100),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "mask of ones": lambda x: x.masked_fill(torch.eye(4, 8).bool(), 0.0),
    "repaired numbers": lambda x: torch.nan_to_num(x),
    "softmax": lambda x: x.softmax(1),
    "weight": lambda x: x,
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_no_activation_is_fine(kind: str) -> None:
    model = Net(HARMLESS[kind])
    assert validate(model, X) == []
    assert torch.equal(DualCopy(model)(X), model(X))


@pytest.mark.parametrize("end", [torch.ops.aten.sigmoid, lambda x: x.clamp(0, 1), lambda x: x.max(1).values])
def test_as_the_output_it_is_fine(end: Callable[[Tensor], Any]) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return end(self.b(F.relu(self.a(x))))

    assert validate(Ends(), X) == []


def test_what_works_on_weights_alone_is_fine() -> None:
    class Positive(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.abs() * (self.weight > 0), self.bias)

    assert validate(nn.Sequential(Positive(6, 8), nn.ReLU(), nn.Linear(8, 2)), X) == []


def test_maximum_over_a_dimension_is_fine_where_pooling_is_left_alone() -> None:
    act, _ = HIDDEN["maximum over a dimension"]
    assert validate(Net(act), X, pooling="own") == []


def test_a_scripted_function_that_is_kept_is_one_line() -> None:
    model = Net(torch.relu)
    model.act = scripted_leaky
    with pytest.raises(GateError, match=r"^act: this ScriptFunction cannot be copied"):
        DualCopy(model)


@pytest.mark.parametrize("training", [False, True])
def test_the_fused_transformer_layer_is_not_used(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 6)
    dual = DualCopy(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(training)
    with torch.no_grad():
        expected = dual(x)
    torch.testing.assert_close(dual(x), expected)
    assert len(dual.gates(x)) == 2

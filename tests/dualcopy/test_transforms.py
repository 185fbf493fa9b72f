"""torch.func, torch.export and torch.compile refuse a DualCopy in one line that names the way out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.errors import GateError

X = torch.randn(4, 6)


def make() -> DualCopy:
    return DualCopy(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()


def per_sample(dual: DualCopy) -> Any:
    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(dual, parameters, (one[None],)).sum()
        return out

    return vmap(grad(loss), (None, 0))({k: p.detach() for k, p in dual.named_parameters()}, X)


TRANSFORMS: dict[str, Callable[[DualCopy], Any]] = {
    "gradients per sample": per_sample,
    "vmap": lambda dual: vmap(dual)(X[:, None]),
    "jacrev": lambda dual: jacrev(dual)(X),
    "export": lambda dual: torch.export.export(dual, (X,)),
    "compile": lambda dual: torch.compile(dual, backend="eager")(X),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_transform_is_refused_in_one_line(kind: str, used: bool) -> None:
    dual = make()
    if used:
        dual(X)
    with pytest.raises(GateError, match=r"release\(\)") as error:
        TRANSFORMS[kind](dual)
    assert "\n" not in str(error.value)
    torch.compiler.reset()
    assert torch.equal(dual(X), dual.quantitative(X))


class PerSample(nn.Module):
    """A forward that is itself a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = vmap(self.net)(x)
        return out


def test_a_transform_inside_the_forward_is_refused_by_name() -> None:
    with pytest.raises(GateError, match=r"^net.1: is called inside a transform of torch.func .*the whole batch"):
        DualCopy(PerSample())(X)


def test_nested_tensors_are_refused_by_name() -> None:
    with pytest.raises(GateError, match=r"^1: gets a nested tensor, .*pad its parts"):
        make()(torch.nested.nested_tensor([X[:3], X[:2]]))


def test_a_released_model_is_taken() -> None:
    model = make().release()
    torch.testing.assert_close(vmap(model)(X), model(X))


def test_the_compiler_is_not_imported_beforehand() -> None:
    code = "import sys, fedsq_plugin.dualcopy; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_layers_are_named() -> None:
    (first, *_) = validate(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert str(first).startswith("0.weight: is a lazy parameter")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_are_named() -> None:
    body = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), {nn.Linear})
    with pytest.raises(GateError, match=r"0: is quantised.*quantise it afterwards"):
        DualCopy(body)

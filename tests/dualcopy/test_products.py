"""Smooth activations that a forward computes from gated functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.errors import GateError

from .nets import Shifted

X = torch.linspace(-5, 5, 8).reshape(2, 4)
SIX = torch.tensor(6.0)

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "the gate first": lambda x: F.relu6(x + 3) / 6 * x,
    "in place": lambda x: F.relu6(x + 3.0, inplace=True).div_(6.0).mul_(x),
    "by torch's functions": lambda x: torch.mul(x, torch.div(F.relu6(torch.add(x, 3)), 6)),
    "by hardtanh": lambda x: F.hardtanh(0.5 + x / 6, 0.0, 1.0) * x,
    "by a tensor of one number": lambda x: x * (F.relu6(x + SIX / 2) / SIX),
    "of a shifted copy": lambda x: (x.clone() - 1) * F.relu(2 * x),
    "by relu itself": lambda x: x * F.relu(x),
}

PIECEWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "a gate of other features": lambda x: x * F.relu(x.flip(-1)),
    "squeeze and excitation": lambda x: x * F.relu6(x.mean(-1, keepdim=True) + 3) / 6,
    "twice": lambda x: F.relu(F.relu(x) - 1) * 2,
    "a sum": lambda x: x + F.relu(x),
    "statistics of what a gate lets through": lambda x: F.relu(x) / (F.relu(x) * F.relu(x)).mean(),
    "x was written into": lambda x: _written(x),
}


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    gate = F.relu(x)
    x.copy_(torch.ones_like(x))
    return gate * x


@pytest.mark.parametrize("spelling", SMOOTH)
def test_a_smooth_activation_is_found(spelling: str) -> None:
    (finding,) = validate(nn.Sequential(nn.ReLU(), Shifted(SMOOTH[spelling])), X)
    assert (finding.path, finding.kind) == ("1", "swish")
    assert finding.what == "hidden swish (an activation times its own input) has no fixed linear gate"


@pytest.mark.parametrize("kind", PIECEWISE)
def test_other_products_are_no_finding(kind: str) -> None:
    assert validate(Shifted(PIECEWISE[kind]), X) == []


def test_it_is_refused_as_torchs_own_is() -> None:
    model = nn.Sequential(nn.ReLU(), Shifted(SMOOTH["hardswish"]))
    with pytest.raises(GateError, match=r"1: hidden swish .* accept=\['1'\]"):
        DualCopy(model, example=X)
    with pytest.raises(GateError, match="hidden swish"):
        DualCopy(model)(X)


def test_accepted_it_is_the_quantitative_copys_and_other_gates_are_not() -> None:
    dual = DualCopy(nn.Sequential(Shifted(F.relu), Shifted(SMOOTH["hardswish"])), accept=["1"]).eval()
    x = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(dual(x), torch.tensor([0.0, 4 / 6]))
    with torch.no_grad():
        dual.get_parameter("0.shift").fill_(2.0)
    # ReLU's gate stays closed: not hardswish(1)
    torch.testing.assert_close(dual(x), torch.tensor([0.0, 3.0]))
    with torch.no_grad():
        dual.get_parameter("0.shift").fill_(-2.0)
        dual.get_parameter("1.shift").fill_(-3.0)
    # hardswish(-4) is 0; under the structural copy's region of relu6 it were -4 * -1 / 6
    torch.testing.assert_close(dual(x), torch.tensor([0.0, 0.0]))


def test_accepted_it_is_no_gate() -> None:
    (finding,) = validate(Shifted(SMOOTH["hardswish"]), X, accept=["*"])
    assert "has no gate" in finding.what

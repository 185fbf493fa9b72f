"""What is written on a DualCopy reaches the model, in both copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import GateError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)
        self.sign, self.options = 1.0, {"sign": 1.0}
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.relu(self.sign * self.options["sign"] * self.a(x) + self.shift))
        return out


def test_a_number_reaches_both_copies() -> None:
    dual = DualCopy(Net()).eval()
    dual(X)
    version = dual.structural_version
    dual.sign = -1.0
    h = -dual.a(X)
    assert (dual.sign, dual.quantitative.sign, dual.structural.sign) == (-1.0, -1.0, -1.0)
    assert torch.equal(dual(X), dual.fc(F.relu(h)))
    assert dual.structural_version > version


def test_a_mapping_reaches_both_copies() -> None:
    dual = DualCopy(Net())
    dual.options = {"sign": -1.0}
    assert torch.equal(dual(X), dual.fc(F.relu(-dual.a(X))))


def test_a_buffer_is_frozen_in_the_structural_copy() -> None:
    dual = DualCopy(Net())
    dual.shift = torch.ones(8)
    gate = dual.a(X) + 1 > 0
    dual.quantitative.shift += 5
    torch.testing.assert_close(dual(X), dual.fc((dual.a(X) + 6) * gate))
    assert "shift" in dual.state_dict()


def test_a_layer_and_a_parameter_are_frozen_in_the_structural_copy() -> None:
    dual = DualCopy(Net()).train()
    dual.fc = nn.Linear(8, 7)
    dual.extra = nn.Parameter(torch.ones(2))
    dual.refresh()
    assert dual(X).shape == (4, 7)
    assert not any(p.requires_grad for p in dual.structural.parameters())
    assert not dual.structural.fc.training
    assert {"fc.weight", "extra"} <= dict(dual.named_parameters()).keys()
    assert list(dual.state_dict()) == list(dual.structural.state_dict())


def test_registering_reaches_both_copies() -> None:
    dual = DualCopy(Net())
    dual.register_buffer("more", torch.zeros(2), persistent=False)
    dual.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    dual.add_module("layer", nn.Linear(2, 2))
    dual.refresh()
    for model in (dual.quantitative, dual.structural):
        assert model.more.shape == (2,) and model.layer.weight.shape == (2, 2) and model.weight.shape == (2,)
    assert "more" not in dual.state_dict()


def test_deleting_reaches_both_copies() -> None:
    dual = DualCopy(Net())
    del dual.sign
    assert not hasattr(dual.quantitative, "sign") and not hasattr(dual.structural, "sign")
    with pytest.raises(AttributeError):
        del dual.missing


def test_a_layer_that_cannot_be_gated_is_refused_and_not_set() -> None:
    dual = DualCopy(Net())
    with pytest.raises(GateError, match=r"fc\.0: GELU"):
        dual.fc = nn.Sequential(nn.GELU())
    assert isinstance(dual.fc, nn.Linear)


def test_a_name_of_the_dual_copy_is_refused() -> None:
    with pytest.raises(GateError, match=r"gates is a name of DualCopy.*quantitative\.gates"):
        DualCopy(Net()).gates = 3


def test_after_unfreezing_one_copy_is_left() -> None:
    dual = DualCopy(Net())
    dual.unfreeze()
    dual.fc = nn.Linear(8, 2)
    assert dual.unfrozen and dual(X).shape == (4, 2)


def test_a_written_dual_copy_survives_copies() -> None:
    dual = DualCopy(Net())
    dual.fc = nn.Linear(8, 2)
    dual.sign = -1.0
    with torch.no_grad():
        dual.a.bias += 1
    for other in (copy.deepcopy(dual), pickle.loads(pickle.dumps(dual)), dual.to(torch.float32)):
        assert torch.equal(other(X), dual(X))
    assert dual.double()(X.double()).dtype == torch.float64

"""Views: what the client trains."""

from __future__ import annotations

import pytest
import torch
from fedsq_plugin.algorithms.view import VIEWS, dualcopy, plain
from torch import nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, GateError
from fedsq_plugin.federation.state import fingerprint
from tests.algorithms.task import AllOptions


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def test_plain_is_the_model_itself() -> None:
    model = net()
    assert plain(model, AllOptions()) is model


def test_plain_refuses_a_dualcopy_and_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"the model is a DualCopy.*use the plain model"):
        plain(DualCopy(net()), AllOptions())


def test_dualcopy_trains_the_model_itself() -> None:
    model = net()
    assert dualcopy(model, AllOptions()).quantitative is model


def test_dualcopys_structural_copy_is_the_model_as_it_is_now() -> None:
    model = net()
    nn.init.constant_(model[0].weight, 0.5)
    structural = dualcopy(model, AllOptions()).structural
    assert fingerprint(structural.state_dict()) == fingerprint(model.state_dict())


def test_dualcopy_of_a_dualcopy_takes_its_structural_copy_anew() -> None:
    given = DualCopy(net())
    nn.init.constant_(given.quantitative[0].weight, 0.5)  # a warm start after the wrapping
    found = dualcopy(given, AllOptions())
    assert found.quantitative is given.quantitative
    assert torch.equal(found.structural[0].weight, torch.full((4, 2), 0.5))


def test_dualcopy_of_a_dualcopy_is_not_nested() -> None:
    found = dualcopy(DualCopy(net()), AllOptions())
    assert not any(isinstance(module, DualCopy) for module in list(found.modules())[1:])
    assert type(found.quantitative) is nn.Sequential


def test_dualcopy_of_a_dualcopy_leaves_the_given_one_alone() -> None:
    given = DualCopy(net())
    before = fingerprint(given.structural.state_dict())
    nn.init.constant_(given.quantitative[0].weight, 0.5)
    dualcopy(given, AllOptions())
    assert fingerprint(given.structural.state_dict()) == before


def test_model_that_cannot_be_gated_is_an_error() -> None:
    with pytest.raises(GateError):
        dualcopy(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.ReLU()), AllOptions())


def test_accepted_activation_stays_ungated() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.ReLU())
    found = dualcopy(model, AllOptions(gate_accept=("1",)))
    assert len(found.gates(torch.zeros(1, 2))) == 1


@pytest.mark.parametrize(("pooling", "gates"), [("structural", 2), ("own", 1)])
def test_pooling_is_gated_as_the_option_says(pooling: str, gates: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    found = dualcopy(model, AllOptions(gate_pooling=pooling))  # type: ignore[arg-type]
    assert len(found.gates(torch.zeros(1, 1, 4, 4))) == gates


def test_views_have_their_names() -> None:
    assert dict(VIEWS) == {"plain": plain, "dualcopy": dualcopy}

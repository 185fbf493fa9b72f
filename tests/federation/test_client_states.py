"""What stays with a client: its own, from the first use on."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import WeightsError
from fedsq_plugin.federation import state_files
from fedsq_plugin.federation.client_states import ClientStates
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.state import State, fingerprint, state_of

EVERYTHING = frozenset(Role)
STAYS_NORM = frozenset({Role.BODY, Role.HEAD})
STAYS_HEAD = EVERYTHING - {Role.HEAD}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


LOCAL = {
    STAYS_NORM: ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"],
    STAYS_HEAD: ["3.weight", "3.bias"],
}


def states(travelling: frozenset[Role] = STAYS_HEAD, net: nn.Module | None = None) -> ClientStates:
    net = net or model()
    return ClientStates(net, roles(net, "3"), travelling)


def fill(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if math.isfinite(value) or tensor.is_floating_point():
                tensor.fill_(value)


def keeping(value: float) -> nn.Module:
    net = model()
    fill(net, value)
    return net


@pytest.mark.parametrize("travelling", list(LOCAL), ids=["norm", "head"])
def test_own_part_comes_back_and_nothing_else(travelling: frozenset[Role]) -> None:
    kept = states(travelling)
    kept.keep(5, keeping(2))
    net = keeping(9)
    kept.load(5, net)
    values = {key: float(value.flatten()[0]) for key, value in net.state_dict().items()}
    assert values == {key: 2.0 if key in LOCAL[travelling] else 9.0 for key in values}


def test_first_use_gives_the_warm_start() -> None:
    net = model()
    kept = states(net=net)
    fill(net, 9)  # another client trained in it meanwhile
    kept.load(1, net)
    assert torch.equal(net.state_dict()["3.weight"], model().state_dict()["3.weight"])
    assert net.state_dict()["0.weight"].unique().item() == 9


def test_clients_have_their_own_parts() -> None:
    kept, net = states(), model()
    for client in (3, 1, 2):
        kept.keep(client, keeping(client))
    for client in (1, 2, 3):
        kept.load(client, net)
        assert net.state_dict()["3.weight"].unique().item() == client


def test_client_without_a_part_of_its_own_is_given_no_others() -> None:
    kept, net = states(), model()
    kept.keep(0, keeping(7))
    kept.load(1, net)
    assert torch.equal(net.state_dict()["3.weight"], model().state_dict()["3.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_part_that_diverged_is_not_kept(value: float) -> None:
    found, net = states(), model()
    found.keep(0, keeping(2.0))
    found.keep(0, keeping(value))
    found.load(0, net)
    assert net.state_dict()["3.bias"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("name", ["head/3.bias", "0/4.bias", "0/3.weight"])
def test_foreign_parts_are_refused(name: str) -> None:
    with pytest.raises(WeightsError, match="client states: "):
        states().restore({name: torch.zeros(2)})


def test_later_part_replaces_the_earlier() -> None:
    kept, net = states(), model()
    for value in (4, 6):
        kept.keep(0, keeping(value))
    kept.load(0, net)
    assert net.state_dict()["3.bias"].unique().item() == 6


def test_what_is_kept_is_a_copy() -> None:
    kept, net = states(), keeping(4)
    kept.keep(0, net)
    fill(net, 8)
    kept.load(0, net)
    assert net.state_dict()["3.bias"].unique().item() == 4


def test_training_after_loading_does_not_change_what_is_kept() -> None:
    kept, net = states(), model()
    kept.keep(0, keeping(4))
    kept.load(0, net)
    fill(net, 8)
    assert kept.tensors()["0/3.bias"].unique().item() == 4


def test_warm_start_is_not_changed_by_training() -> None:
    kept, net = states(), model()
    kept.load(0, net)
    fill(net, 8)
    kept.load(1, net)
    assert torch.equal(net.state_dict()["3.bias"], model().state_dict()["3.bias"])


def test_counter_stays_an_integer() -> None:
    kept = states(STAYS_NORM)
    kept.keep(0, keeping(3))
    assert kept.tensors()["0/1.num_batches_tracked"].dtype is torch.int64


def test_nothing_is_kept_where_everything_travels() -> None:
    kept, net = states(EVERYTHING), keeping(3)
    kept.keep(0, net)
    fill(net, 5)
    kept.load(0, net)
    assert (kept.tensors(), net.state_dict()["3.bias"].unique().item()) == ({}, 5)


def test_loading_alone_keeps_nothing() -> None:
    kept = states()
    kept.load(0, model())
    assert kept.tensors() == {}


def test_dualcopys_own_part_is_the_quantitative_copys() -> None:
    dual = DualCopy(model())
    kept = ClientStates(dual, roles(dual, "3"), STAYS_HEAD)
    kept.keep(0, keeping(3))
    kept.load(0, dual)
    assert dual.quantitative.state_dict()["3.bias"].unique().item() == 3
    assert torch.equal(dual.structural.state_dict()["3.bias"], model().state_dict()["3.bias"])


@given(st.dictionaries(st.integers(0, 10**6), st.integers(-9, 9), max_size=5))
def test_parts_come_back(values: dict[int, int]) -> None:
    kept, other = states(STAYS_NORM), states(STAYS_NORM)
    for client, value in values.items():
        kept.keep(client, keeping(value))
    other.restore(kept.tensors())
    assert fingerprint(other.tensors()) == fingerprint(kept.tensors())
    net = model()
    for client, value in values.items():
        other.load(client, net)
        assert net.state_dict()["1.running_mean"].unique().item() == value


def test_parts_come_back_from_a_file(tmp_path: Path) -> None:
    kept, other = states(), states()
    for client in (10, 2):
        kept.keep(client, keeping(client))
    state_files.save(tmp_path / "clients.safetensors", kept.tensors(), {})
    other.restore(state_files.load(tmp_path / "clients.safetensors")[0])
    assert fingerprint(other.tensors()) == fingerprint(kept.tensors())


def test_restoring_forgets_what_was_there() -> None:
    kept = states()
    kept.keep(0, keeping(3))
    kept.restore({})
    assert kept.tensors() == {}


def test_names_are_client_and_key() -> None:
    kept = states()
    kept.keep(12, keeping(1))
    assert list(kept.tensors()) == ["12/3.weight", "12/3.bias"]


def test_restored_clients_go_on_apart() -> None:
    kept, net = states(), model()
    given_tensors: State = State({"0/3.weight": torch.ones(2, 3), "0/3.bias": torch.ones(2)})
    kept.restore(given_tensors)
    kept.load(0, net)
    fill(net, 5)
    assert given_tensors["0/3.bias"].unique().item() == 1
    assert fingerprint(kept.tensors()) == fingerprint(given_tensors)
    assert state_of(net)["3.bias"].unique().item() == 5


def masked(value: float) -> nn.Module:
    net = model()
    net[1].register_buffer("mask", torch.tensor([0.0, value]))
    return net


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_part_with_an_entry_that_was_infinite_before_is_kept(value: float) -> None:
    kept, net = states(STAYS_NORM, masked(value)), masked(value)
    with torch.no_grad():
        net[1].weight.fill_(7)
    kept.keep(2, net)
    again = masked(value)
    kept.load(2, again)
    assert again[1].weight.unique().item() == 7
    torch.testing.assert_close(again[1].mask, net[1].mask, rtol=0, atol=0, equal_nan=True)


def test_part_that_became_infinite_is_not_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    kept, net = states(STAYS_NORM, masked(-math.inf)), masked(-math.inf)
    net[1].mask[0] = math.nan
    with caplog.at_level(logging.INFO):
        kept.keep(2, net)
    assert kept.of(2) == {}
    assert "silo 2: what stays with it has NaN or infinite values" in caplog.text

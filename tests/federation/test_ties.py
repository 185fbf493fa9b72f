"""Keys of one tensor: found by memory, with one role and one value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.federation.ties import tied_keys
from fedsq_plugin.federation.training import LocalTraining
from tests.algorithms.task import Federation, changed, corners


class Tied(nn.Module):
    """An encoder and a decoder of one weight, between other layers."""

    def __init__(self, how: str = "parameter") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.enc = nn.Linear(2, 8), nn.Linear(8, 8)
        self.norm, self.dec, self.out = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)
        if how == "parameter":
            self.dec.weight = self.enc.weight
        elif how == "view":
            self.dec.weight = nn.Parameter(self.enc.weight.detach().view(8, 8))
        elif how == "part":
            flat = torch.cat([self.enc.weight.detach().flatten(), torch.zeros(8)])
            self.enc.weight = nn.Parameter(flat[:64].view(8, 8))
            self.dec.weight = nn.Parameter(flat[8:].view(8, 8))
        elif how == "norm":
            self.norm.weight = self.enc.bias
        elif how == "module":
            self.dec = self.enc

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.enc(torch.relu(self.first(x)))))
        found: Tensor = self.out(torch.relu(self.dec(hidden)))
        return found


PAIR = {"dec.weight": "enc.weight"}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", {}),
        ("parameter", PAIR),
        ("view", PAIR),
        ("part", PAIR),
        ("norm", {"norm.weight": "enc.bias"}),
        ("module", {**PAIR, "dec.bias": "enc.bias"}),
    ],
)
def test_keys_that_share_memory_are_found(how: str, expected: dict[str, str]) -> None:
    assert tied_keys(Tied(how)) == expected


def test_layers_of_one_flat_memory_are_not_tied() -> None:
    flat = torch.zeros(12)
    model = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    model["a"].weight = nn.Parameter(flat[:6].view(3, 2))  # type: ignore[union-attr]
    model["b"].weight = nn.Parameter(flat[6:].view(3, 2))  # type: ignore[union-attr]
    assert tied_keys(model) == {}
    assert tied_keys(nn.LSTM(2, 3, 2)) == {}


def test_buffer_that_is_a_parameter_has_its_role() -> None:
    model = nn.Module()
    model.register_buffer("alias", torch.zeros(2))
    model.weight = nn.Parameter(model.alias)
    assert roles(model) == {"weight": Role.BODY, "alias": Role.BODY}


@pytest.mark.parametrize("how", ["parameter", "view", "part", "module"])
@pytest.mark.parametrize("name", ["FedRep", "FedBABU", "LP-FT", "FedSQ+FedRep"])
def test_tie_across_the_heads_border_is_refused_with_both_keys(name: str, how: str) -> None:
    with pytest.raises(ConfigError, match=r"treats the head apart, and enc\.weight and dec\.weight are one tensor"):
        algorithm(name).refuse_misfit(Tied(how), changed(head="dec"))


@pytest.mark.parametrize("head", ["out", "first"])
def test_tie_on_one_side_of_the_border_is_no_matter(head: str) -> None:
    algorithm("FedRep").refuse_misfit(Tied(), changed(head=head))


@pytest.mark.parametrize("name", ["FedBN", "FrozenBN"])
def test_tie_across_normalisation_layers_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"treats normalisation layers apart, and enc\.bias and norm\.weight"):
        algorithm(name).refuse_misfit(Tied("norm"), changed(head="out"))
    algorithm(name).refuse_misfit(Tied(), changed(head="out"))


@pytest.mark.parametrize("how", ["parameter", "view", "module"])
@pytest.mark.parametrize("frozen", ["enc", "dec", "d?c"])
def test_frozen_tensor_is_frozen_under_all_its_names(how: str, frozen: str) -> None:
    model, before = Tied(how), Tied(how).state_dict()
    algorithm("FrozenEarly").refuse_misfit(model, changed(head="out", frozen_modules=(frozen,)))
    phase = Phase(1, frozenset(Role), (frozen,))
    local_update(model, [corners(16, 0)], LocalTraining(), [phase], roles(model), round=0, seed=0)
    after = model.state_dict()
    assert torch.equal(after["enc.weight"], before["enc.weight"])
    assert torch.equal(after["dec.weight"], before["dec.weight"])
    assert not torch.equal(after["out.weight"], before["out.weight"])


@pytest.mark.parametrize("name", ["FedAvg", "FedMR", "FedAdam", "FedBN", "FedSQ", "FedMR+FedRep"])
def test_keys_of_one_tensor_have_one_value_in_every_state(name: str) -> None:
    found = Federation(name, Tied(), changed(head="out")).repeat(3)
    states: list[Any] = [found.state, *found.own_server.state.slots]
    assert all(torch.equal(state["enc.weight"], state["dec.weight"]) for state in states)
    assert not torch.equal(found.state["enc.weight"], Tied().enc.weight)


def test_mean_of_tied_weights_is_that_of_a_model_with_one_name() -> None:
    """A functional twin, which has the weight once, is trained beside it."""

    class Once(Tied):
        def __init__(self) -> None:
            super().__init__("none")
            bias = self.dec.bias
            del self.dec
            self.bias = bias

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.norm(self.enc(torch.relu(self.first(x)))))
            found: Tensor = self.out(torch.relu(nn.functional.linear(hidden, self.enc.weight, self.bias)))
            return found

    tied, once = (Federation("FedAvg", net, changed(head="out")).repeat(2).state for net in (Tied(), Once()))
    assert torch.equal(tied["dec.weight"], once["enc.weight"])
    assert fingerprint({"w": tied["out.weight"]}) == fingerprint({"w": once["out.weight"]})

"""FedBN, FedBABU and FedRep: what travels and what stays, on models whose names do not tell; their rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fedsq_plugin.algorithms import Algorithm, algorithm
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.evaluate import pooled
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.state import fingerprint, state_of
from fedsq_plugin.federation.updates import problem

from . import phased
from .task import SILOS, AllOptions, Federation, changed, mlp, values

EXCHANGES = values("exchange")
PERSONAL = ["FedBABU", "FedBN", "FedRep"]


def server(model: nn.Module, exchange: str, head: str | None = None) -> Server:
    """Of an algorithm that differs from FedAvg in its exchange alone."""
    own = Algorithm("Own", "nowhere", exchange=EXCHANGES[exchange])
    return Server(own, AllOptions(head=head), state_of(model), roles(model, head), 0)


def travels(model: nn.Module, exchange: str, head: str | None = None) -> list[str]:
    return list(server(model, exchange, head).travelling(state_of(model)))


def stays(model: nn.Module, exchange: str, head: str | None = None) -> set[str]:
    return set(model.state_dict()) - set(travels(model, exchange, head))


def of_modules(model: nn.Module, *types: type[nn.Module]) -> set[str]:
    """The keys of the modules of these types, found without the roles."""
    return {
        f"{path}.{key}" for path, module in model.named_modules() if isinstance(module, types)
        for key in module.state_dict()
    }  # fmt: skip


class Transformer(nn.Module):
    """Norms under names that say nothing, and a module called `norm` that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.second = nn.GroupNorm(2, 4)
        self.third = nn.LayerNorm(4)
        self.fourth = nn.RMSNorm(4)
        self.norm = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)


def test_all_sends_everything_in_the_models_order() -> None:
    model = resnet18(num_classes=2)
    assert travels(model, "all") == list(model.state_dict())


def test_resnets_norm_layers_stay_whatever_their_names() -> None:
    model = resnet18(num_classes=2)
    found = stays(model, "without norm layers")
    assert found == of_modules(model, nn.BatchNorm2d)
    # 20 layers of 5 entries each; the ones without "bn" in their name are among them.
    assert len(found) == 100
    assert {f"layer{n}.0.downsample.1.{key}" for n in (2, 3, 4) for key in ("weight", "running_var")} <= found


def test_convolutions_beside_norm_layers_travel() -> None:
    found = travels(resnet18(num_classes=2), "without norm layers", head="fc")
    assert {"layer2.0.downsample.0.weight", "conv1.weight", "fc.weight", "fc.bias"} <= set(found)


def test_group_layer_and_rms_norm_stay() -> None:
    found = stays(Transformer(), "without norm layers")
    assert found == {"second.weight", "second.bias", "third.weight", "third.bias", "fourth.weight"}


@pytest.mark.parametrize("head", [None, "1"])
def test_norm_layer_of_the_head_stays_without_norm_layers(head: str | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))
    assert stays(model, "without norm layers", head) == {"1.0.weight", "1.0.bias"}


def test_body_only_leaves_the_head_alone_at_home() -> None:
    assert stays(resnet18(num_classes=2), "body only", head="fc") == {"fc.weight", "fc.bias"}


def test_head_of_several_modules_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))
    assert stays(model, "body only", head="1") == {"1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"}


def test_body_only_sends_the_norm_layers_and_their_statistics() -> None:
    model = resnet18(num_classes=2)
    assert of_modules(model, nn.BatchNorm2d) <= set(travels(model, "body only", head="fc"))


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        ("all", set(Role)),
        ("without norm layers", {Role.BODY, Role.HEAD}),
        ("body only", {Role.BODY, Role.NORM_PARAMETER, Role.NORM_BUFFER, Role.COUNTER}),
    ],
)
def test_roles_that_travel(exchange: str, expected: set[Role]) -> None:
    assert EXCHANGES[exchange].travels == expected


def test_exchanges_have_their_names() -> None:
    assert set(EXCHANGES) == {"all", "without norm layers", "body only"}


@pytest.mark.parametrize(("exchange", "expected"), [("all", False), ("without norm layers", True), ("body only", True)])
def test_personal_where_something_stays(exchange: str, expected: bool) -> None:
    assert Algorithm("Own", "nowhere", exchange=EXCHANGES[exchange]).personal is expected


def test_what_travels_is_not_copied() -> None:
    found = server(nn.Linear(2, 2), "all")
    given = found.state.model
    assert all(found.travelling(given)[key] is value for key, value in given.items())


def test_server_keeps_what_does_not_travel_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    found, start = server(model, "without norm layers"), model.state_dict()
    gathering = found.begin([0])
    gathering.add(Update(0, 1, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}))
    gathering.finish()
    after = found.state.model
    assert list(after) == list(start)
    assert all(torch.equal(after[key], start[key]) == key.startswith("1.") for key in start)


def test_update_of_what_should_stay_is_refused() -> None:
    found = Federation("FedRep")
    whole = Update(0, 1, state_of(found.client.model))
    assert problem(whole, found.own_server.expected) == "it has the unknown key 3.bias"


# Models that they do not suit


@pytest.mark.parametrize("how", ["refresh", "ema"])
def test_structural_copy_cannot_follow_a_model_whose_norm_layers_stay_with_the_silos(how: str) -> None:
    options = changed(structural_copy=how)
    with pytest.raises(ConfigError, match=f"with structural_copy '{how}': it would follow a model whose"):
        algorithm("FedSQ+FedBN").refuse_misfit(mlp(), options)


@pytest.mark.parametrize("how", ["fixed", "unfreeze"])
def test_fedsq_goes_with_fedbn_under_a_copy_that_does_not_follow(how: str) -> None:
    options = changed(structural_copy=how)
    algorithm("FedSQ+FedBN").refuse_misfit(mlp(), options)


def test_model_without_norm_layers_has_none_to_keep() -> None:
    options = changed(head=None)
    with pytest.raises(ConfigError, match="FedBN treats normalisation layers apart, and the model has none"):
        algorithm("FedBN").refuse_misfit(nn.Linear(2, 2), options)


@pytest.mark.parametrize("name", ["FedRep", "FedBABU"])
def test_head_that_stays_must_be_named(name: str) -> None:
    options = changed(head=None)
    said = rf"{name} treats the head apart from the body: set head to .* \(linear layers: 0, 3\)"
    with pytest.raises(ConfigError, match=said):
        algorithm(name).refuse_misfit(mlp(), options)


# Phases


def test_fedreps_body_trains_under_the_head_of_the_first_phase() -> None:
    """FedRep by two separate rounds: the head alone, then the body alone."""
    once: dict[str, Any] = {"epochs": 1, "head_epochs": 1}
    both = phased.client("head then body", phased.without_dropout(), **once)
    both.train(0, phased.batches(), 0)
    head = phased.client("head first", phased.without_dropout(), **once)
    body = phased.client("body only", phased.without_dropout(), **once)
    head.train(0, phased.batches(), 0)
    body.model.load_state_dict(head.model.state_dict())
    body.train(0, phased.batches(), 0)
    assert phased.equal(state_of(both.model), state_of(body.model))


def test_fedrep_without_a_head_is_an_error() -> None:
    said = "a phase that trains head and norm parameter of the head finds no such parameter"
    with pytest.raises(ConfigError, match=said):
        phased.client("head then body", head=None).train(0, phased.batches(), 0)


# Federations


@pytest.mark.parametrize("name", [*PERSONAL, "FedSQ+FedRep", "FedMR+FedBN"])
def test_silos_own_models_solve_the_task(name: str) -> None:
    found = Federation(name).repeat(8)
    assert pooled(found.own(client) for client in range(SILOS)).accuracy > 0.95


@pytest.mark.parametrize("name", PERSONAL)
def test_silos_models_are_their_own(name: str) -> None:
    found = Federation(name).repeat(3)
    states = []
    for client in range(SILOS):
        found.own(client)
        states.append(fingerprint(state_of(found.client.model)))
    # FedBABU's heads are all the start's until the fine-tuning.
    assert len(set(states)) == (1 if name == "FedBABU" else SILOS)


def test_fine_tuning_gives_fedbabus_silos_their_heads() -> None:
    found = Federation("FedBABU").repeat(3)
    heads = []
    for client in range(SILOS):
        found.own(client, epochs=5, head_only=True)
        heads.append(fingerprint({"": found.client.model.state_dict()["3.weight"]}))
    assert len(set(heads)) == SILOS


def test_fedbabus_head_is_the_starts() -> None:
    assert torch.equal(Federation("FedBABU").repeat(3).state["3.weight"], mlp().state_dict()["3.weight"])

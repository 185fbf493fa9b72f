"""Exchange: what travels and what stays, on models whose names do not tell."""

from __future__ import annotations

import pytest
import torch
from fedsq_plugin.algorithms.exchange import EXCHANGES, personal
from torch import nn
from torchvision.models import resnet18

from fedsq_plugin.algorithms import Algorithm
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.state import State, state_of
from tests.algorithms.task import AllOptions


def travels(model: nn.Module, exchange: str, head: str | None = None) -> list[str]:
    row = Algorithm("Own", "nowhere", exchange=exchange)
    coordinator = Server(row, AllOptions(head=head), state_of(model), roles(model, head), 0, False)
    return list(coordinator.travelling(state_of(model)))


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


@pytest.mark.parametrize(
    "head",
    [
        None,
        "1",
    ],
)
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
    assert EXCHANGES[exchange] == expected


def test_exchanges_have_their_names() -> None:
    assert set(EXCHANGES) == {"all", "without norm layers", "body only"}


@pytest.mark.parametrize(
    ("exchange", "expected"), [("all", False), ("without norm layers", True), ("body only", True)]
)
def test_personal_where_something_stays(exchange: str, expected: bool) -> None:
    assert personal(exchange) is expected


def test_what_travels_is_not_copied() -> None:
    model = nn.Linear(2, 2)
    row = Algorithm("Own", "nowhere")
    coordinator = Server(row, AllOptions(), state_of(model), roles(model), 0, False)
    given: State = coordinator.state.model
    assert all(coordinator.travelling(given)[key] is value for key, value in given.items())


def test_server_keeps_what_does_not_travel_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    row = Algorithm("Own", "nowhere", exchange="without norm layers")
    coordinator = Server(row, AllOptions(), state_of(model), roles(model), 0, False)
    gathering = coordinator.begin([0])
    gathering.add(Update(0, 1, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}))
    found, start = gathering.finish().model, model.state_dict()
    assert list(found) == list(start)
    assert all(torch.equal(found[key], start[key]) for key in start if key.startswith("1."))

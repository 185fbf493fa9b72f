"""FedSQ: the view, the structural copy over the rounds, and federations in which server and silos agree on it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin.algorithms.fedsq import dualcopy, next_structural
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import GateError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.state import State, fingerprint, nbytes, state_of

from .task import OPTIONS, SILOS, AllOptions, Federation, mlp

# The view


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


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
    found = dualcopy(model, AllOptions(gate_pooling=pooling))
    assert len(found.gates(torch.zeros(1, 1, 4, 4))) == gates


# The structural copy over the rounds


def state(weight: float, count: int) -> State:
    return OrderedDict(weight=torch.tensor([float(weight)]), count=torch.tensor(count))


def options(how: str, rounds: int = 1, decay: float = 0.5) -> Any:
    changed = {"structural_copy": how, "structural_rounds": rounds, "structural_decay": decay}
    return OPTIONS.model_copy(update=changed)


def over(how: str, rounds: int, models: list[State]) -> list[State | None]:
    """The structural copy of every round; `models[r]` is the global model when round r begins."""
    found: list[State | None] = []
    structural: State | None = models[0]
    for round, model in enumerate(models):
        if structural is not None:
            structural = next_structural(structural, model, round, options(how, rounds))
        found.append(structural)
    return found


MODELS = [state(8 * n, n) for n in range(5)]


def test_fixed_is_the_first_for_ever() -> None:
    assert all(found is MODELS[0] for found in over("fixed", 1, MODELS))


def test_refresh_every_round_is_the_global_model() -> None:
    found = over("refresh", 1, MODELS)
    assert [f["weight"].item() for f in found if f] == [0.0, 8.0, 16.0, 24.0, 32.0]


def test_refresh_every_second_round() -> None:
    found = over("refresh", 2, MODELS)
    assert [f["weight"].item() for f in found if f] == [0.0, 0.0, 16.0, 16.0, 32.0]
    assert found[1] is found[0]
    assert found[3] is found[2]


def test_ema_over_three_rounds() -> None:
    # Decay 0.5 from 0: 0.5·0 + 0.5·8 = 4; 0.5·4 + 0.5·16 = 10; 0.5·10 + 0.5·24 = 17.
    found = over("ema", 1, MODELS[:4])
    assert [f["weight"].item() for f in found if f] == [0.0, 4.0, 10.0, 17.0]


def test_emas_counters_are_the_models() -> None:
    found = over("ema", 1, MODELS[:4])
    assert [(f["count"].item(), f["count"].dtype) for f in found if f] == [(n, torch.int64) for n in range(4)]


def test_ema_every_second_round() -> None:
    # Rounds 2 and 4: 0.5·0 + 0.5·16 = 8; 0.5·8 + 0.5·32 = 20.
    found = over("ema", 2, MODELS)
    assert [f["weight"].item() for f in found if f] == [0.0, 0.0, 8.0, 8.0, 20.0]


def test_emas_type_is_the_models() -> None:
    old, new = ({"weight": torch.tensor([x], dtype=torch.float16)} for x in (1.0, 3.0))
    found = next_structural(OrderedDict(old), new, 1, options("ema"))
    assert found is not None
    assert (found["weight"].dtype, found["weight"].item()) == (torch.float16, 2.0)


@pytest.mark.parametrize(
    ("decay", "expected"), [(0.0, 8.0), (1.0, 0.0), (0.25, 6.0)], ids=["refresh", "fixed", "between"]
)
def test_ema_between_refresh_and_fixed(decay: float, expected: float) -> None:
    found = next_structural(MODELS[0], MODELS[1], 1, options("ema", decay=decay))
    assert found is not None
    assert found["weight"].item() == expected


@pytest.mark.parametrize(("rounds", "gone"), [(1, [0, 1, 1, 1, 1]), (3, [0, 0, 0, 1, 1])])
def test_unfreeze_after_its_rounds(rounds: int, gone: list[int]) -> None:
    assert [found is None for found in over("unfreeze", rounds, MODELS)] == [bool(g) for g in gone]


@pytest.mark.parametrize("how", ["fixed", "refresh", "ema", "unfreeze"])
def test_states_are_left_alone(how: str) -> None:
    before = [fingerprint(model) for model in MODELS]
    over(how, 1, MODELS)
    assert [fingerprint(model) for model in MODELS] == before


@pytest.mark.parametrize("how", ["fixed", "refresh", "ema"])
def test_first_round_has_the_warm_start(how: str) -> None:
    assert over(how, 1, MODELS)[0] is MODELS[0]


# Federations


def dual(found: Client) -> DualCopy:
    assert isinstance(found.model, DualCopy)
    return found.model


def test_fedsq_leaves_the_structural_copy_as_it_was_at_the_start() -> None:
    found = Federation("FedSQ").repeat(5).model()
    assert isinstance(found, DualCopy)
    assert fingerprint(found.structural.state_dict()) == fingerprint(mlp().state_dict())
    assert fingerprint(found.quantitative.state_dict()) != fingerprint(mlp().state_dict())


def test_fedsq_sends_what_fedavg_sends() -> None:
    sq, avg = (Federation(name).repeat(5) for name in ("FedSQ", "FedAvg"))
    for one, other in ((sq.answers, avg.answers), (sq.sent, avg.sent)):
        pairs = [(a[c], b[c]) for a, b in zip(one, other, strict=True) for c in range(SILOS)]
        assert len(pairs) == 5 * SILOS
        assert [(nbytes(a), list(a)) for a, _ in pairs] == [(nbytes(b), list(b)) for _, b in pairs]


@pytest.mark.parametrize("name", ["FedSQ", "FedSQ+FedMR", "FedSQ+FedRep", "FedSQ+FedBN", "FedSQ+FedAvgM"])
@pytest.mark.parametrize("how", ["fixed", "refresh", "ema"])
def test_clients_have_the_servers_structural_copy(name: str, how: str) -> None:
    found = Federation(name, options=options(how, rounds=2))
    for clients in ([0, 1], [0, 2], [1, 2], [0, 1], [0, 1, 2]):
        found.round(clients)
        structural = found.own_server.state.structural
        assert structural is not None
        assert fingerprint(dual(found.client).structural.state_dict()) == fingerprint(structural)


def test_refreshed_copy_is_the_global_model_that_the_round_began_with() -> None:
    found = Federation("FedSQ", options=options("refresh")).repeat(2)
    start = found.state
    found.repeat(1)
    assert found.own_server.state.structural is not None
    assert fingerprint(found.own_server.state.structural) == fingerprint(start)


def test_federation_unfreezes_at_server_and_clients() -> None:
    found = Federation("FedSQ", options=options("unfreeze", rounds=2))
    seen = []
    for _ in range(4):
        found.repeat(1)
        seen.append((found.own_server.state.structural is None, dual(found.client).unfrozen))
    assert seen == [(False, False)] * 2 + [(True, True)] * 2


def test_ways_to_follow_give_different_models() -> None:
    ways = ("fixed", "refresh", "ema", "unfreeze")
    assert len({fingerprint(Federation("FedSQ", options=options(w)).repeat(3).state) for w in ways}) == 4


def test_one_round_is_the_same_whatever_the_way() -> None:
    ways = ("fixed", "refresh", "ema", "unfreeze")
    assert len({fingerprint(Federation("FedSQ", options=options(w)).repeat(1).state) for w in ways}) == 1


def sizes(messages: list[dict[int, State]]) -> list[list[int]]:
    return [[nbytes(message) for message in round.values()] for round in messages]


@pytest.mark.parametrize("partner", ["", "+FedMR", "+FedRep", "+FedBN", "+FedAdam", "+FedNCM"])
def test_bytes_of_every_round_are_those_of_the_plain_algorithm(partner: str) -> None:
    gated, plain = (Federation(f"{name}{partner}").repeat(3) for name in ("FedSQ", "FedAvg"))
    assert sizes(gated.sent) == sizes(plain.sent)
    assert sizes(gated.answers) == sizes(plain.answers)


def test_fixed_copy_leaves_plain_messages() -> None:
    found = Federation("FedSQ").repeat(2)
    keys = list(state_of(mlp()))
    assert all(list(m) == keys for messages in (*found.sent, *found.answers) for m in messages.values())


def test_refresh_costs_a_fingerprint() -> None:
    # SHA-256 in hex: 64 bytes.
    plain = nbytes(state_of(mlp()))
    found = Federation("FedSQ", options=options("refresh")).repeat(2)
    assert sizes(found.sent) == [[plain] * 3, [plain + 64] * 3]


def test_ema_costs_a_model_and_a_fingerprint() -> None:
    plain = nbytes(state_of(mlp()))
    found = Federation("FedSQ", options=options("ema")).repeat(2)
    assert sizes(found.sent) == [[plain] * 3, [2 * plain + 64] * 3]

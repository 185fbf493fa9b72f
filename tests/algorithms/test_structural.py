"""The structural copy over the rounds: by hand, and as server and clients agree on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fedsq_plugin.algorithms.structural import next_structural

from fedsq_plugin.algorithms import Algorithm, algorithm
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.local import LocalTraining
from fedsq_plugin.federation.messages import Announcement, packed, unpacked
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.state import State, fingerprint, nbytes, state_of

from .task import OPTIONS, Federation, corners, mlp


def state(weight: float, count: int) -> State:
    return OrderedDict(weight=torch.tensor([float(weight)]), count=torch.tensor(count))


def options(how: Any, rounds: int = 1, decay: float = 0.5) -> Options:
    return replace(OPTIONS, structural_copy=how, structural_rounds=rounds, structural_decay=decay)


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


# What clients are told

ROLES = {"weight": Role.BODY, "count": Role.COUNTER, "head": Role.HEAD}


def model(value: float) -> State:
    return OrderedDict(
        weight=torch.tensor([float(value)]),
        count=torch.tensor(int(value)),
        head=torch.tensor([float(value)]),
    )


def coordinator(how: str, rounds: int = 1, **row: str) -> Server:
    chosen = Algorithm("Own", "nowhere", view="dualcopy", **row)
    return Server(chosen, options(how, rounds), model(0), ROLES, seed=0, structural=True)


def advance(
    found: Server, clients: list[int], slots: bool = False, lost: Sequence[int] = ()
) -> list[Announcement | None]:
    """One round, after which the model is another; what the clients were told at its start. Those that are
    lost do not answer."""
    found.next_round()
    told = [assignment.structural for assignment in found.assign(clients)]
    for client in set(clients) - set(lost):
        found.confirm(client)
    number = found.state.round + 1
    changed = tuple(model(number + 10.0 * n) for n in range(len(clients))) if slots else ()
    found.state = replace(found.state, model=model(number), slots=changed, round=number)
    return told


def test_fixed_copy_is_never_announced() -> None:
    found = coordinator("fixed")
    assert [advance(found, [0, 1]) for _ in range(3)] == [[None, None]] * 3


def test_plain_view_has_nothing_to_announce() -> None:
    found = Server(algorithm("FedAvg"), options("refresh"), model(0), ROLES, 0, structural=False)
    for number in range(3):
        assert found.next_round() is False
        assert found.assign([0])[0].structural is None
        found.state = replace(found.state, round=number + 1)


def test_first_round_announces_nothing() -> None:
    assert advance(coordinator("refresh"), [0, 1]) == [None, None]


def test_refresh_is_announced_without_a_state() -> None:
    found = coordinator("refresh")
    advance(found, [0])
    assert advance(found, [0]) == [Announcement(fingerprint(model(1)))]


def test_client_is_told_once() -> None:
    found = coordinator("refresh", rounds=2)
    told = [advance(found, [0]) for _ in range(6)]
    # Rounds 2 and 4 (0-based) refresh.
    assert [one is not None for (one,) in told] == [False, False, True, False, True, False]


def test_who_was_told_is_remembered() -> None:
    found = coordinator("refresh")
    advance(found, [0, 1])
    assert found.state.told == {}
    advance(found, [1])
    assert (found.state.told, found.state.structural_version) == ({1: 1}, 1)
    advance(found, [0])
    assert (found.state.told, found.state.structural_version) == ({1: 1, 0: 2}, 2)


def test_client_that_was_lost_is_told_again() -> None:
    found = coordinator("refresh", rounds=2)
    for _ in range(2):
        advance(found, [0, 1])
    assert None not in advance(found, [0, 1], lost=[1])
    assert [one is not None for one in advance(found, [0, 1])] == [False, True]


def test_client_that_was_away_is_told_with_the_state_when_it_returns() -> None:
    found = coordinator("refresh", rounds=3)
    for _ in range(3):
        advance(found, [0, 1])
    assert advance(found, [0])[0] == Announcement(fingerprint(model(3)))
    (one, other) = advance(found, [0, 1])
    assert one is None
    assert other is not None
    assert other.fingerprint == fingerprint(model(3))
    assert other.state is not None
    assert fingerprint(other.state) == fingerprint(model(3))


def test_client_that_missed_two_changes_is_told_of_the_last() -> None:
    found = coordinator("refresh")
    for _ in range(3):
        advance(found, [0])
    (told,) = advance(found, [5])
    assert told is not None
    assert told.fingerprint == fingerprint(model(3))


def announced(found: Server, slots: bool = False) -> Announcement:
    advance(found, [0, 1], slots)
    told = advance(found, [0, 1], slots)[1]
    assert told is not None
    return told


def test_slots_need_the_state_with_the_announcement() -> None:
    told = announced(coordinator("refresh", server="recombine"), slots=True)
    assert told.state is not None
    assert (told.fingerprint, fingerprint(told.state)) == (fingerprint(model(1)),) * 2


def test_head_that_does_not_travel_needs_the_state_with_the_announcement() -> None:
    told = announced(coordinator("refresh", exchange="body only"))
    assert told.state is not None
    assert list(told.state) == ["weight", "count", "head"]


def test_average_with_the_copy_needs_the_state_with_the_announcement() -> None:
    # 0.5·0 + 0.5·1
    told = announced(coordinator("ema"))
    assert told.state is not None
    assert told.state["weight"].item() == 0.5
    assert told.fingerprint == fingerprint(told.state)


def test_unfrozen_gates_are_announced_without_a_fingerprint() -> None:
    found = coordinator("unfreeze", rounds=2)
    assert [advance(found, [0]) for _ in range(4)] == [[None], [None], [Announcement(None)], [None]]


def test_client_that_was_away_is_told_that_gates_are_unfrozen() -> None:
    found = coordinator("unfreeze", rounds=1)
    for _ in range(3):
        advance(found, [0])
    assert advance(found, [0, 1]) == [None, Announcement(None)]


def test_next_round_says_whether_the_copy_changed() -> None:
    found = coordinator("refresh", rounds=2)
    said = []
    for number in range(5):
        said.append(found.next_round())
        found.state = replace(found.state, model=model(number + 1), round=number + 1)
    assert said == [False, False, True, False, True]


# Clients

BATCHES = [corners(16, seed=3)]


def worker(row: str = "FedSQ") -> Client:
    return Client(DualCopy(mlp()), algorithm(row), OPTIONS, LocalTraining(learning_rate=0.1), 0)


def other_state() -> State:
    found = state_of(mlp())
    found["0.weight"] = found["0.weight"] + 1
    return found


def dual(found: Client) -> DualCopy:
    assert isinstance(found.model, DualCopy)
    return found.model


def test_client_takes_the_weights_that_came_as_its_structural_copy() -> None:
    found = worker()
    found.model.load_state_dict(other_state())
    found.follow(Announcement(fingerprint(other_state())))
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(other_state())


def test_client_takes_the_state_that_came_with_the_announcement() -> None:
    found = worker()
    found.follow(Announcement(fingerprint(other_state()), other_state()))
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(other_state())
    assert fingerprint(dual(found).quantitative.state_dict()) == fingerprint(state_of(mlp()))


@pytest.mark.parametrize("given", [None, state_of(mlp())], ids=["weights", "state"])
def test_client_refuses_another_structural_copy_than_the_servers(given: State | None) -> None:
    expected = fingerprint(other_state())
    own = fingerprint(state_of(mlp()))
    message = f"the structural copy is {own[:12]}…, the server announced {expected[:12]}…"
    with pytest.raises(UpdateError, match=message):
        worker().follow(Announcement(expected, given))


def test_client_without_a_fingerprint_gives_up_its_copy() -> None:
    found = worker()
    found.follow(Announcement(None))
    assert dual(found).unfrozen


def test_structural_copy_does_not_share_the_announced_tensors() -> None:
    found, given = worker(), other_state()
    found.follow(Announcement(fingerprint(given), given))
    given["0.weight"].zero_()
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(other_state())


def trained(found: Client, start: State) -> State:
    found.model.load_state_dict(start)
    found.train(0, BATCHES, 0)
    return state_of(found.model)


def test_unfrozen_client_trains_as_fedavg_does() -> None:
    unfrozen = worker()
    unfrozen.follow(Announcement(None))
    plain = Client(mlp(), algorithm("FedAvg"), OPTIONS, LocalTraining(learning_rate=0.1), 0)
    expected = fingerprint(trained(plain, other_state()))
    assert fingerprint(trained(unfrozen, other_state())) == expected
    assert fingerprint(trained(worker(), other_state())) != expected  # under the warm start's gates


# Federations


@pytest.mark.parametrize("row", ["FedSQ", "FedSQ+FedMR", "FedSQ+FedRep", "FedSQ+FedBN", "FedSQ+FedAvgM"])
@pytest.mark.parametrize("how", ["fixed", "refresh", "ema"])
def test_clients_have_the_servers_structural_copy(row: str, how: str) -> None:
    found = Federation(row, options=options(how, rounds=2))
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
def test_bytes_of_every_round_are_those_of_the_plain_row(partner: str) -> None:
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


def test_announcement_survives_the_wire() -> None:
    found = coordinator("ema")
    advance(found, [0])
    found.next_round()
    (assignment,) = found.assign([0])
    back = unpacked(packed(assignment))
    assert assignment.structural is not None
    assert back.structural is not None
    assert back.structural.fingerprint == assignment.structural.fingerprint
    assert fingerprint(back.structural.state or {}) == fingerprint(assignment.structural.state or {})

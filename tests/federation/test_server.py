"""The server: the mean, every server rule, and what silos are told of the structural copy."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fedsq_plugin.algorithms import Algorithm, ExtraOptions, ServerRule, algorithm
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.messages import Announcement, Update, packed, unpacked
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.server import Server, add_sums
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint
from tests.algorithms.rules import ROLES, RULES, SERVER, SILOS, plain, server, state, step
from tests.algorithms.task import AllOptions

AVERAGED = sorted(set(RULES) - {"recombine"})
Buffers = Literal["average", "keep"]


def averaged(buffers: Buffers) -> State:
    return step(server(options=AllOptions(buffers=buffers)), *SILOS).model


# The mean


def test_everything_is_averaged_by_samples() -> None:
    # (0 + 3·4)/4, (4 + 3·8)/4, (8 - 3·8)/4, (10 + 3·13)/4 = 12.25, (-4 + 3·4)/4
    assert plain(averaged("average")) == {"weight": 3.0, "norm": 7.0, "mean": -4.0, "count": 12, "head": 2.0}


def test_kept_buffers_and_counters_are_the_servers() -> None:
    assert plain(averaged("keep")) == {"weight": 3.0, "norm": 7.0, "mean": 100.0, "count": 100, "head": 2.0}


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_order_and_types_are_the_states(buffers: Buffers, rule: str) -> None:
    found = step(server(rule, AllOptions(buffers=buffers)), *SILOS).model
    assert [(key, value.dtype) for key, value in found.items()] == [(key, value.dtype) for key, value in SERVER.items()]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_result_is_an_ordered_dict(buffers: Buffers, rule: str) -> None:
    assert type(step(server(rule, AllOptions(buffers=buffers)), *SILOS).model) is OrderedDict


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_state_before_is_left_alone(buffers: Buffers, rule: str) -> None:
    found = server(rule, AllOptions(buffers=buffers))
    before = step(found, *SILOS)
    tensors, about = {k: v.clone() for k, v in before.tensors().items()}, before.about()
    assert step(found, *SILOS) is not before
    assert before.about() == about
    assert fingerprint(before.tensors()) == fingerprint(tensors)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_updates_are_left_alone(rule: str) -> None:
    before = [fingerprint(update.state) for update in SILOS]
    step(server(rule), *SILOS)
    assert [fingerprint(update.state) for update in SILOS] == before


@pytest.mark.parametrize("rule", sorted(RULES))
def test_kept_buffers_hide_what_silos_made_of_them(rule: str) -> None:
    found = server(rule, AllOptions(buffers="keep"))
    assert step(found, Update(0, 1, state(1, 1, float("nan"), 1, 1))).model["mean"].item() == 100.0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_kept_buffers_are_kept_by_every_rule(rule: str) -> None:
    found = plain(step(server(rule, AllOptions(buffers="keep")), *SILOS).model)
    assert (found["mean"], found["count"]) == (100.0, 100)


def test_kept_buffers_of_a_slot_are_the_slots() -> None:
    kept = [step(server("recombine", AllOptions(buffers="keep")), *SILOS).slots[n] for n in range(2)]
    assert [(slot["mean"].item(), slot["count"].item()) for slot in kept] == [(100.0, 100)] * 2


@pytest.mark.parametrize("rule", ["average", "recombine"])
def test_single_update_is_the_next_state(rule: str) -> None:
    found = step(server(rule), Update(0, 7, state(1, 2, 3, 4, 5)))
    assert plain(found.model) == {"weight": 1.0, "norm": 2.0, "mean": 3.0, "count": 4, "head": 5.0}


@pytest.mark.parametrize("rule", AVERAGED)
def test_no_update_is_an_error(rule: str) -> None:
    with pytest.raises(UpdateError, match="no update to average"):
        step(server(rule))


def test_no_update_to_recombine_is_an_error() -> None:
    with pytest.raises(UpdateError, match="no update to recombine"):
        step(server("recombine"))


@pytest.mark.parametrize("rule", AVERAGED)
def test_updates_are_not_held_together(rule: str) -> None:
    gathering, alive = server(rule).begin(range(3)), []
    for silo in range(3):
        update = Update(silo, 1, state(1, 1, 1, 1, 1))
        alive += [weakref.ref(value) for value in update.state.values()]
        gathering.add(update)
        del update
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_counts_the_round(rule: str) -> None:
    found = server(rule)
    for finished in (1, 2):
        assert step(found, *SILOS).round == finished


def test_rules_have_their_names() -> None:
    separate = {name: rule.separate for name, rule in RULES.items()}
    assert separate == {"average": False, "momentum": False, "adam": False, "yogi": False, "recombine": True}


def test_totals_of_sums_by_hand() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    found = add_sums([{"a": one}, {}, {"a": other, "b": one}])
    assert {name: value.tolist() for name, value in found.items()} == {"a": [11.0, 22.0], "b": [1.0, 2.0]}
    assert one.tolist() == [1.0, 2.0]


class Latest:
    """A mean that a host brings: the update that came last."""

    def __init__(self, model: State) -> None:
        self.model, self.state = model, State()

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        self.state = State(state)

    def result(self) -> State:
        assert self.model is SERVER
        return self.state


def test_mean_of_the_host_is_used_where_it_brings_one() -> None:
    found = Server(algorithm("FedAvg"), AllOptions(), SERVER, ROLES, 0, mean=Latest)
    assert plain(step(found, *SILOS).model) == plain(SILOS[1].state)


def test_round_that_is_passed_over_changes_nothing_but_its_number() -> None:
    found = server("momentum")
    before = step(found, *SILOS)
    found.begin([0, 1])
    found.confirm(1)
    found.forget([0])
    found.pass_over(before)
    assert found.state.round == before.round + 1
    assert fingerprint(found.state.tensors()) == fingerprint(before.tensors())
    assert found.state.told[0] == -1  # who was started anew meanwhile still has nothing


# A rule of another package


def median(
    server: ServerState, trained: Mapping[int, Mapping[str, Tensor]], roles: Any, options: Any, seed: int
) -> ServerState:
    """The middle update, and how often it was asked for; a value of another package."""
    middle = {
        key: torch.stack([update[key].double() for update in trained.values()]).median(0).values.to(kept.dtype)
        for key, kept in server.model.items()
    }
    rounds = server.memory.get("rounds", OrderedDict(count=torch.tensor(0)))
    memory = {"rounds": OrderedDict(count=rounds["count"] + options.extra["step"])}
    return replace(server, model=OrderedDict(server.model, **middle), memory=memory)


def test_third_partys_rule_sees_every_update_and_keeps_its_memory() -> None:
    own = Algorithm("Own", "nowhere", server=ServerRule("median", median, separate=True), options=ExtraOptions)
    found = Server(own, own.settings(extra={"step": 2}), SERVER, ROLES, 0)
    updates = [Update(n, 1 + 100 * n, state(value, 0, 0, 7, 0)) for n, value in enumerate((5, -100, 6))]
    for _ in range(2):
        step(found, *updates)
    assert (found.state.model["weight"].item(), found.state.model["count"].item()) == (5.0, 7)
    assert found.state.memory["rounds"]["count"].item() == 4


def test_third_partys_rule_is_given_slots_by_position() -> None:
    seen: list[dict[int, float]] = []

    def own(server: ServerState, trained: Any, *_: Any) -> ServerState:
        seen.append({slot: update["weight"].item() for slot, update in trained.items()})
        return server

    gathering = server(ServerRule("own", own, separate=True)).begin([4, 9, 11])
    for silo in (11, 4):  # 9 is missing, and they come in another order
        gathering.add(Update(silo, 1, state(silo, 0, 0, 0, 0)))
    gathering.finish()
    assert seen == [{2: 11.0, 0: 4.0}]


def test_third_partys_rule_is_given_the_runs_seed() -> None:
    seeds: list[int] = []

    def own(server: ServerState, mean: Any, roles: Any, options: Any, seed: int) -> ServerState:
        seeds.append(seed)
        return server

    step(server(ServerRule("own", own), seed=17), *SILOS)
    assert seeds == [17]


# What silos are told of the structural copy

GATED = {"weight": Role.BODY, "count": Role.COUNTER, "head": Role.HEAD}


def model(value: float) -> State:
    return OrderedDict(
        weight=torch.tensor([float(value)]), count=torch.tensor(int(value)), head=torch.tensor([float(value)])
    )


def following(how: str, rounds: int = 1, partner: str = "FedAvg") -> Server:
    """FedSQ, whose structural copy follows the global model in this way, with another algorithm."""
    options = AllOptions(structural_copy=how, structural_rounds=rounds, structural_decay=0.5)
    return Server(algorithm(f"FedSQ+{partner}"), options, model(0), GATED, seed=0)


def advance(
    found: Server, silos: list[int], slots: bool = False, lost: Sequence[int] = ()
) -> list[Announcement | None]:
    """One round, after which the model is another; what the silos were told at its start. Those that are
    lost do not answer."""
    found.follow_structural()
    told = [assignment.structural for assignment in found.assign(silos)]
    for silo in set(silos) - set(lost):
        found.confirm(silo)
    number = found.state.round + 1
    changed = tuple(model(number + 10.0 * n) for n in range(len(silos))) if slots else ()
    found.state = replace(found.state, model=model(number), slots=changed, round=number)
    return told


def test_fixed_copy_is_never_announced() -> None:
    found = following("fixed")
    assert [advance(found, [0, 1]) for _ in range(3)] == [[None, None]] * 3


def test_plain_view_has_nothing_to_announce() -> None:
    found = Server(algorithm("FedAvg"), AllOptions(structural_copy="refresh"), model(0), GATED, 0)
    for number in range(3):
        assert found.follow_structural() is False
        assert found.assign([0])[0].structural is None
        found.state = replace(found.state, round=number + 1)


def test_first_round_announces_nothing() -> None:
    assert advance(following("refresh"), [0, 1]) == [None, None]


def test_refresh_is_announced_without_a_state() -> None:
    found = following("refresh")
    advance(found, [0])
    assert advance(found, [0]) == [Announcement(fingerprint(model(1)))]


def test_silo_is_told_once() -> None:
    found = following("refresh", rounds=2)
    told = [advance(found, [0]) for _ in range(6)]
    # Rounds 2 and 4 (0-based) refresh.
    assert [one is not None for (one,) in told] == [False, False, True, False, True, False]


def test_who_was_told_is_remembered() -> None:
    found = following("refresh")
    advance(found, [0, 1])
    assert found.state.told == {}
    advance(found, [1])
    assert (found.state.told, found.state.structural_version) == ({1: 1}, 1)
    advance(found, [0])
    assert (found.state.told, found.state.structural_version) == ({1: 1, 0: 2}, 2)


def test_silo_that_was_lost_is_told_again() -> None:
    found = following("refresh", rounds=2)
    for _ in range(2):
        advance(found, [0, 1])
    assert None not in advance(found, [0, 1], lost=[1])
    assert [one is not None for one in advance(found, [0, 1])] == [False, True]


def test_silo_that_was_away_is_told_with_the_state_when_it_returns() -> None:
    found = following("refresh", rounds=3)
    for _ in range(3):
        advance(found, [0, 1])
    assert advance(found, [0])[0] == Announcement(fingerprint(model(3)))
    (one, other) = advance(found, [0, 1])
    assert one is None
    assert other is not None
    assert other.fingerprint == fingerprint(model(3))
    assert other.state is not None
    assert fingerprint(other.state) == fingerprint(model(3))


def test_silo_that_missed_two_changes_is_told_of_the_last() -> None:
    found = following("refresh")
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
    told = announced(following("refresh", partner="FedMR"), slots=True)
    assert told.state is not None
    assert (told.fingerprint, fingerprint(told.state)) == (fingerprint(model(1)),) * 2


def test_head_that_does_not_travel_needs_the_state_with_the_announcement() -> None:
    told = announced(following("refresh", partner="FedRep"))
    assert told.state is not None
    assert list(told.state) == ["weight", "count", "head"]


def test_average_with_the_copy_needs_the_state_with_the_announcement() -> None:
    # 0.5·0 + 0.5·1
    told = announced(following("ema"))
    assert told.state is not None
    assert told.state["weight"].item() == 0.5
    assert told.fingerprint == fingerprint(told.state)


def test_unfrozen_gates_are_announced_without_a_fingerprint() -> None:
    found = following("unfreeze", rounds=2)
    assert [advance(found, [0]) for _ in range(4)] == [[None], [None], [Announcement(None)], [None]]


def test_silo_that_was_away_is_told_that_gates_are_unfrozen() -> None:
    found = following("unfreeze", rounds=1)
    for _ in range(3):
        advance(found, [0])
    assert advance(found, [0, 1]) == [None, Announcement(None)]


def test_server_says_whether_the_copy_changed() -> None:
    found = following("refresh", rounds=2)
    said = []
    for number in range(5):
        said.append(found.follow_structural())
        found.state = replace(found.state, model=model(number + 1), round=number + 1)
    assert said == [False, False, True, False, True]


def test_announcement_survives_the_wire() -> None:
    found = following("ema")
    advance(found, [0])
    found.follow_structural()
    (assignment,) = found.assign([0])
    back = unpacked(packed(assignment))
    assert assignment.structural is not None
    assert back.structural is not None
    assert back.structural.fingerprint == assignment.structural.fingerprint
    assert fingerprint(back.structural.state or {}) == fingerprint(assignment.structural.state or {})

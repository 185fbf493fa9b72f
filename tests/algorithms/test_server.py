"""The server's rules, against numbers worked out by hand."""

from __future__ import annotations

import gc
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from fedsq_plugin.algorithms.recombination import recombine
from fedsq_plugin.algorithms.server import SERVERS, Server, average
from fedsq_plugin.algorithms.server_optimizers import adam, momentum, yogi
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsq_plugin.algorithms import ALGORITHMS, Algorithm
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint

ROLES = {
    "weight": Role.BODY,
    "norm": Role.NORM_PARAMETER,
    "mean": Role.NORM_BUFFER,
    "count": Role.COUNTER,
    "head": Role.HEAD,
}
PARAMETERS = ["weight", "norm", "head"]
OPTIMIZERS = {"momentum": momentum, "adam": adam, "yogi": yogi}
AVERAGED = ["average", *OPTIMIZERS]

from tests.algorithms.task import AllOptions


def state(weight: float, norm: float, mean: float, count: int, head: float) -> State:
    return OrderedDict(
        weight=torch.tensor([float(weight)]),
        norm=torch.tensor([float(norm)]),
        mean=torch.tensor([float(mean)]),
        count=torch.tensor(count),
        head=torch.tensor([float(head)]),
    )


SERVER = state(100, 100, 100, 100, 100)
CLIENTS = (Update(0, 1, state(0, 4, 8, 10, -4)), Update(1, 3, state(4, 8, -8, 13, 4)))
"""Of one and three samples."""

Buffers = Literal["average", "keep"]


def row(server: str = "average", exchange: str = "all") -> Algorithm:
    return Algorithm("Own", "nowhere", server=server, exchange=exchange)


def coordinator(
    server: str = "average", options: Any | None = None, exchange: str = "all", model: State = SERVER
) -> Server:
    return Server(row(server, exchange), options or AllOptions(), model, ROLES, seed=0, structural=False)


def after(found: Server, *updates: Update) -> ServerState:
    gathering = found.begin([update.client for update in updates])
    for update in updates:
        gathering.add(replace(update, state=found.travelling(update.state)))
    return gathering.finish()


def averaged(buffers: Buffers) -> State:
    return after(coordinator(options=AllOptions(buffers=buffers)), *CLIENTS).model


def plain(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in found.items()}


# The mean


def test_everything_is_averaged_by_samples() -> None:
    # (0 + 3·4)/4, (4 + 3·8)/4, (8 - 3·8)/4, (10 + 3·13)/4 = 12.25, (-4 + 3·4)/4
    assert plain(averaged("average")) == {"weight": 3.0, "norm": 7.0, "mean": -4.0, "count": 12, "head": 2.0}


def test_kept_buffers_and_counters_are_the_servers() -> None:
    assert plain(averaged("keep")) == {"weight": 3.0, "norm": 7.0, "mean": 100.0, "count": 100, "head": 2.0}


@pytest.mark.parametrize("server", sorted(SERVERS))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_order_and_types_are_the_states(buffers: Buffers, server: str) -> None:
    found = after(coordinator(server, AllOptions(buffers=buffers)), *CLIENTS).model
    assert [(key, value.dtype) for key, value in found.items()] == [
        (key, value.dtype) for key, value in SERVER.items()
    ]


@pytest.mark.parametrize("server", sorted(SERVERS))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_result_is_an_ordered_dict(buffers: Buffers, server: str) -> None:
    assert type(after(coordinator(server, AllOptions(buffers=buffers)), *CLIENTS).model) is OrderedDict


@pytest.mark.parametrize("server", sorted(SERVERS))
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_state_before_is_left_alone(buffers: Buffers, server: str) -> None:
    found = coordinator(server, AllOptions(buffers=buffers))
    found.state = after(found, *CLIENTS)
    before, tensors = found.state, {k: v.clone() for k, v in found.state.tensors().items()}
    after(found, *CLIENTS)
    assert found.state.about() == before.about()
    assert fingerprint(found.state.tensors()) == fingerprint(tensors)
    assert fingerprint(before.tensors()) == fingerprint(tensors)


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_updates_are_left_alone(server: str) -> None:
    before = [fingerprint(update.state) for update in CLIENTS]
    after(coordinator(server), *CLIENTS)
    assert [fingerprint(update.state) for update in CLIENTS] == before


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_kept_buffers_hide_what_clients_made_of_them(server: str) -> None:
    found = coordinator(server, AllOptions(buffers="keep"))
    assert after(found, Update(0, 1, state(1, 1, float("nan"), 1, 1))).model["mean"].item() == 100.0


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_kept_buffers_are_kept_by_every_rule(server: str) -> None:
    found = plain(after(coordinator(server, AllOptions(buffers="keep")), *CLIENTS).model)
    assert (found["mean"], found["count"]) == (100.0, 100)


def test_kept_buffers_of_a_slot_are_the_slots() -> None:
    kept = [after(coordinator("recombine", AllOptions(buffers="keep")), *CLIENTS).slots[n] for n in range(2)]
    assert [(slot["mean"].item(), slot["count"].item()) for slot in kept] == [(100.0, 100)] * 2


@pytest.mark.parametrize("server", ["average", "recombine"])
def test_single_update_is_the_next_state(server: str) -> None:
    found = after(coordinator(server), Update(0, 7, state(1, 2, 3, 4, 5)))
    assert plain(found.model) == {"weight": 1.0, "norm": 2.0, "mean": 3.0, "count": 4, "head": 5.0}


@pytest.mark.parametrize("server", AVERAGED)
def test_no_update_is_an_error(server: str) -> None:
    with pytest.raises(UpdateError, match="no update to average"):
        after(coordinator(server))


def test_no_update_to_recombine_is_an_error() -> None:
    with pytest.raises(UpdateError, match="no update to recombine"):
        after(coordinator("recombine"))


@pytest.mark.parametrize("server", AVERAGED)
def test_updates_are_not_held_together(server: str) -> None:
    gathering, alive = coordinator(server).begin(range(3)), []
    for client in range(3):
        update = Update(client, 1, state(1, 1, 1, 1, 1))
        alive += [weakref.ref(value) for value in update.state.values()]
        gathering.add(update)
        del update
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_every_rule_counts_the_round(server: str) -> None:
    found = coordinator(server)
    for finished in (1, 2):
        found.state = after(found, *CLIENTS)
        assert found.state.round == finished


def test_servers_have_their_names() -> None:
    assert dict(SERVERS) == {
        "average": Server(average),
        **{name: Server(rule) for name, rule in OPTIMIZERS.items()},
        "recombine": Server(recombine, separate=True),
    }


# Server optimizers


def weights(rule: str, options: Any, start: float, *means: float) -> list[float]:
    """The one weight after each round, from the mean of each round."""
    found = ServerState(OrderedDict(weight=torch.tensor([start], dtype=torch.float64)))
    values = []
    for mean in means:
        moved = {"weight": torch.tensor([mean], dtype=torch.float64)}
        found = SERVERS[rule].step(found, moved, ROLES, options, 0)
        values.append(found.model["weight"].item())
    return values


def test_momentum_over_two_rounds() -> None:
    # Δ = 3 - 1 = 2, v = 2, w = 3. Then Δ = 4 - 3 = 1, v = 0.5·2 + 1 = 2, w = 5.
    assert weights("momentum", AllOptions(server_momentum=0.5), 1, 3, 4) == [3.0, 5.0]


def test_momentum_at_a_rate_of_its_own() -> None:
    # v = 2, w = 1 + 0.25·2 = 1.5. Then Δ = 4 - 1.5 = 2.5, v = 0.5·2 + 2.5 = 3.5, w = 1.5 + 0.25·3.5.
    options = AllOptions(server_momentum=0.5, server_lr=0.25)
    assert weights("momentum", options, 1, 3, 4) == [1.5, 2.375]


def test_momentum_goes_on_when_the_mean_stands_still() -> None:
    # v = 2, w = 3. Then Δ = 0, v = 0.5·2 = 1, w = 4.
    assert weights("momentum", AllOptions(server_momentum=0.5), 1, 3, 3) == [3.0, 4.0]


def test_momentum_zero_is_fedavg() -> None:
    assert weights("momentum", AllOptions(server_momentum=0.0), 1, 3, -2, 8) == [3.0, -2.0, 8.0]


ADAPTIVE = AllOptions(server_lr=12.0, server_momentum=0.5, server_beta2=0.5, server_tau=1.0)


def test_adam_over_two_rounds() -> None:
    # v starts at τ² = 1. Δ = 7: m = 3.5, v = 0.5·1 + 0.5·49 = 25, w = 12·3.5/(5 + 1) = 7.
    # Δ = 2 - 7 = -5: m = 0.5·3.5 - 0.5·5 = -0.75, v = 0.5·25 + 0.5·25 = 25, w = 7 - 12·0.75/6.
    assert weights("adam", ADAPTIVE, 0, 7, 2) == [7.0, 5.5]


def test_yogi_over_two_rounds() -> None:
    # Δ = 4: m = 2, v = 1 + 0.5·16 = 9 (16 is above 1), w = 12·2/(3 + 1) = 6.
    # Δ = 8 - 6 = 2: m = 0.5·2 + 0.5·2 = 2, v = 9 - 0.5·4 = 7 (4 is below 9), w = 6 + 12·2/(√7 + 1).
    assert weights("yogi", ADAPTIVE, 0, 4, 8) == pytest.approx([6.0, 6 + 24 / (math.sqrt(7) + 1)], rel=1e-14)


def test_yogis_second_moment_stays_where_the_square_is_equal() -> None:
    # Δ² = v = 1, so v stays 1: m = 0.5, w = 12·0.5/(1 + 1).
    assert weights("yogi", ADAPTIVE, 0, 1) == [3.0]


@pytest.mark.parametrize("rule", ["adam", "yogi"])
def test_tau_bounds_the_step_of_a_small_difference(rule: str) -> None:
    # Without any difference v is (nearly) τ² = 0.25: Adam 0.5·0.25, Yogi 0.25; m = 0.5·2⁻²⁰, so the step is
    # 0.5·2⁻²⁰/(√v + 0.5).
    v = {"adam": 0.125, "yogi": 0.25}[rule]
    options = replace(ADAPTIVE, server_lr=1.0, server_tau=0.5)
    expected = 2**-21 / (math.sqrt(v) + 0.5)
    assert weights(rule, options, 0, 2**-20) == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize(("rule", "rate"), [("momentum", 1.0), ("adam", 0.01), ("yogi", 0.01)])
def test_default_rate(rule: str, rate: float) -> None:
    default = weights(rule, AllOptions(), 0, 3, 1)
    assert default == weights(rule, AllOptions(server_lr=rate), 0, 3, 1)
    assert default != weights(rule, AllOptions(server_lr=rate / 2), 0, 3, 1)


def test_defaults_are_the_papers() -> None:
    # β₁ 0.9, β₂ 0.99, τ 0.001 (arXiv 2003.00295): Δ = 1, m = 0.1, v = 0.99·1e-6 + 0.01.
    expected = 0.01 * 0.1 / (math.sqrt(0.99e-6 + 0.01) + 1e-3)
    assert weights("adam", AllOptions(), 0, 1) == pytest.approx([expected], rel=1e-12)


def naive(rule: str, options: Any, start: list[float], means: list[list[float]]) -> list[float]:
    """Algorithm 2 of arXiv 2003.00295 and FedAvgM, number by number."""
    result = []
    for position, w in enumerate(start):
        m, v, velocity = 0.0, options.server_tau**2, 0.0
        rate = options.server_lr or 0.0
        for mean in means:
            delta = mean[position] - w
            velocity = options.server_momentum * velocity + delta
            m = options.server_momentum * m + (1 - options.server_momentum) * delta
            if rule == "adam":
                v = options.server_beta2 * v + (1 - options.server_beta2) * delta**2
            elif rule == "yogi":
                v = v - (1 - options.server_beta2) * delta**2 * math.copysign(1, v - delta**2)
            w += rate * velocity if rule == "momentum" else rate * m / (math.sqrt(v) + options.server_tau)
        result.append(w)
    return result


numbers = st.floats(-8, 8, allow_subnormal=False)


@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(numbers, min_size=2, max_size=2),
    st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_optimizers_follow_the_naive_ones(
    rule: str, start: list[float], means: list[list[float]], beta: float, beta2: float
) -> None:
    options = AllOptions(server_lr=0.5, server_momentum=beta, server_beta2=beta2, server_tau=0.25)
    found = ServerState(OrderedDict(weight=torch.tensor(start, dtype=torch.float64)))
    for mean in means:
        moved = {"weight": torch.tensor(mean, dtype=torch.float64)}
        found = SERVERS[rule].step(found, moved, ROLES, options, 0)
    expected = naive(rule, options, start, means)
    assert found.model["weight"].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 1000)), min_size=1, max_size=5),
)
def test_buffers_and_counters_are_the_means_whatever_the_optimizer(
    rule: str, rounds: list[tuple[float, int]]
) -> None:
    # A step along a variance that shrinks overshoots: with momentum it would become negative.
    found = coordinator(rule, AllOptions(server_lr=2.0))
    for variance, count in rounds:
        found.state = after(found, Update(0, 1, state(1, 1, variance, count, 1)))
        kept = plain(found.state.model)
        assert (kept["mean"], kept["count"]) == (torch.tensor(variance).item(), count)


@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_every_parameter_takes_the_same_step(rule: str) -> None:
    found = coordinator(rule, AllOptions(server_lr=0.5), model=state(1, 1, 1, 1, 1))
    stepped = plain(after(found, Update(0, 1, state(3, 3, 3, 3, 3))).model)
    assert len({stepped[key] for key in PARAMETERS}) == 1
    assert stepped["weight"] not in (1.0, 3.0)


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("average", []),
        ("momentum", ["momentum"]),
        ("adam", ["first moment", "second moment"]),
        ("yogi", ["first moment", "second moment"]),
    ],
)
def test_memory_is_of_the_parameters_alone(rule: str, names: list[str]) -> None:
    memory = after(coordinator(rule), *CLIENTS).memory
    assert {name: list(kept) for name, kept in memory.items()} == dict.fromkeys(names, PARAMETERS)


def test_momentums_memory_by_hand() -> None:
    # Δ of the means above: 3 - 100, 7 - 100, 2 - 100.
    assert plain(after(coordinator("momentum"), *CLIENTS).memory["momentum"]) == {
        "weight": -97.0,
        "norm": -93.0,
        "head": -98.0,
    }


@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_memory_matters(rule: str) -> None:
    found = coordinator(rule)
    found.state = after(found, *CLIENTS)
    forgetful = coordinator(rule)
    forgetful.state = replace(found.state, memory={})
    assert fingerprint(after(found, *CLIENTS).model) != fingerprint(after(forgetful, *CLIENTS).model)


@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_head_that_does_not_travel_has_no_memory_and_does_not_move(rule: str) -> None:
    found = coordinator(rule, exchange="body only")
    for _ in range(2):
        found.state = after(found, *CLIENTS)
    assert found.state.model["head"].item() == 100.0
    assert all(list(kept) == ["weight", "norm"] for kept in found.state.memory.values())


@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_body_moves_the_same_whether_the_head_travels(rule: str) -> None:
    whole, body = (coordinator(rule, exchange=exchange) for exchange in ("all", "body only"))
    for found in (whole, body):
        for _ in range(2):
            found.state = after(found, *CLIENTS)
    shared = ["weight", "norm", "mean", "count"]
    assert [whole.state.model[key] for key in shared] == [body.state.model[key] for key in shared]


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi"])
def test_rows_options_are_the_rules_own(name: str) -> None:
    # Every option that the row names changes the result, and no other option does.
    rule = ALGORITHMS[name].server
    other = {"server_lr": 0.3, "server_momentum": 0.3, "server_beta2": 0.3, "server_tau": 0.3}
    default = weights(rule, AllOptions(), 0, 3, 1)
    reads = {
        key for key, value in other.items() if weights(rule, AllOptions(**{key: value}), 0, 3, 1) != default
    }
    assert reads == set(ALGORITHMS[name].options)


# Third parties


def median(
    server: ServerState, trained: Mapping[int, Mapping[str, Tensor]], roles: Any, options: Any, seed: int
) -> ServerState:
    """The middle update, and how often it was asked for; a value of another package."""
    middle = {
        key: torch.stack([update[key].double() for update in trained.values()])
        .median(0)
        .values.to(kept.dtype)
        for key, kept in server.model.items()
    }
    rounds = server.memory.get("rounds", OrderedDict(count=torch.tensor(0)))
    memory = {"rounds": OrderedDict(count=rounds["count"] + options.extra["step"])}
    return replace(server, model=OrderedDict(server.model, **middle), memory=memory)


def test_third_partys_rule_sees_every_update_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, "median", Server(median, separate=True))
    found = coordinator("median", AllOptions(extra={"step": 2}))
    updates = [Update(n, 1 + 100 * n, state(value, 0, 0, 7, 0)) for n, value in enumerate((5, -100, 6))]
    for _ in range(2):
        found.state = after(found, *updates)
    assert (found.state.model["weight"].item(), found.state.model["count"].item()) == (5.0, 7)
    assert found.state.memory["rounds"]["count"].item() == 4


def test_third_partys_rule_is_given_slots_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[int, float]] = []

    def step(server: ServerState, trained: Any, *_: Any) -> ServerState:
        seen.append({slot: update["weight"].item() for slot, update in trained.items()})
        return server

    monkeypatch.setitem(SERVERS, "own", Server(step, separate=True))
    gathering = coordinator("own").begin([4, 9, 11])
    for client in (11, 4):  # 9 is missing, and they come in another order
        gathering.add(Update(client, 1, state(client, 0, 0, 0, 0)))
    gathering.finish()
    assert seen == [{2: 11.0, 0: 4.0}]


def test_third_partys_rule_is_given_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def step(server: ServerState, mean: Any, roles: Any, options: Any, seed: int) -> ServerState:
        seeds.append(seed)
        return server

    monkeypatch.setitem(SERVERS, "own", Server(step))
    after(Server(row("own"), AllOptions(), SERVER, ROLES, 17, False), *CLIENTS)
    assert seeds == [17]

"""Server optimizers, FedAvgM, FedAdam and FedYogi, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import fingerprint

from .rules import PARAMETERS, ROLES, RULES, SILOS, plain, server, state, step
from .task import AllOptions

OPTIMIZERS = ["adam", "momentum", "yogi"]


def weights(rule: str, options: Any, start: float, *means: float) -> list[float]:
    """The one weight after each round, from the mean of each round."""
    found = ServerState(OrderedDict(weight=torch.tensor([start], dtype=torch.float64)))
    values = []
    for mean in means:
        moved = {"weight": torch.tensor([mean], dtype=torch.float64)}
        found = RULES[rule].step(found, moved, ROLES, options, 0)
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
    options = ADAPTIVE.model_copy(update={"server_lr": 1.0, "server_tau": 0.5})
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
    st.sampled_from(OPTIMIZERS),
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
        found = RULES[rule].step(found, moved, ROLES, options, 0)
    expected = naive(rule, options, start, means)
    assert found.model["weight"].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    st.sampled_from(OPTIMIZERS),
    st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 1000)), min_size=1, max_size=5),
)
def test_buffers_and_counters_are_the_means_whatever_the_optimizer(rule: str, rounds: list[tuple[float, int]]) -> None:
    # A step along a variance that shrinks overshoots: with momentum it would become negative.
    found = server(rule, AllOptions(server_lr=2.0))
    for variance, count in rounds:
        step(found, Update(0, 1, state(1, 1, variance, count, 1)))
        kept = plain(found.state.model)
        assert (kept["mean"], kept["count"]) == (torch.tensor(variance).item(), count)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_every_parameter_takes_the_same_step(rule: str) -> None:
    found = server(rule, AllOptions(server_lr=0.5), model=state(1, 1, 1, 1, 1))
    stepped = plain(step(found, Update(0, 1, state(3, 3, 3, 3, 3))).model)
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
    memory = step(server(rule), *SILOS).memory
    assert {name: list(kept) for name, kept in memory.items()} == dict.fromkeys(names, PARAMETERS)


def test_momentums_memory_by_hand() -> None:
    # Δ of the means above: 3 - 100, 7 - 100, 2 - 100.
    assert plain(step(server("momentum"), *SILOS).memory["momentum"]) == {"weight": -97.0, "norm": -93.0, "head": -98.0}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_memory_matters(rule: str) -> None:
    found, forgetful = server(rule), server(rule)
    step(found, *SILOS)
    forgetful.state = replace(found.state, memory={})
    assert fingerprint(step(found, *SILOS).model) != fingerprint(step(forgetful, *SILOS).model)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_head_that_does_not_travel_has_no_memory_and_does_not_move(rule: str) -> None:
    found = server(rule, exchange="body only")
    for _ in range(2):
        step(found, *SILOS)
    assert found.state.model["head"].item() == 100.0
    assert all(list(kept) == ["weight", "norm"] for kept in found.state.memory.values())


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_body_moves_the_same_whether_the_head_travels(rule: str) -> None:
    whole, body = (server(rule, exchange=exchange) for exchange in ("all", "body only"))
    for found in (whole, body):
        for _ in range(2):
            step(found, *SILOS)
    shared = ["weight", "norm", "mean", "count"]
    assert [whole.state.model[key] for key in shared] == [body.state.model[key] for key in shared]


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi"])
def test_options_of_the_algorithm_are_those_that_its_rule_reads(name: str) -> None:
    # Every option that the algorithm names changes the result, and no other option does.
    rule = algorithm(name).server.name
    other = {"server_lr": 0.3, "server_momentum": 0.3, "server_beta2": 0.3, "server_tau": 0.3}
    default = weights(rule, AllOptions(), 0, 3, 1)
    reads = {key for key, value in other.items() if weights(rule, AllOptions(**{key: value}), 0, 3, 1) != default}
    assert reads == set(algorithm(name).option_names)

"""FedMR: the published rule beside ours, and what recombination never changes."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.algorithms.fedmr import recombine, recombined
from fedsq_plugin.algorithms.personal import BODY_TRAVELS
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import roles
from fedsq_plugin.federation.seeding import derive, isolated
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint, state_of

from .task import AllOptions, Federation

Unit = Literal["key", "module"]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


ROLES = roles(model())
KEYS = list(ROLES)


def random_state(seed: int) -> State:
    """Values of no client are another's; the counter is an integer."""
    with isolated(seed):
        state = state_of(model())
        for value in state.values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(seed + 40))
    return state


def trained(slots: int, start: int = 0) -> dict[int, State]:
    return {slot: random_state(start + slot) for slot in range(slots)}


def published(
    w_locals: Sequence[Mapping[str, Tensor]], generator: np.random.Generator
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(global model, next models): the mean of the trained models without weights, then for every key an
    order of its own, `next[i][k] = trained[order[i]][k]` (arXiv 2305.10730)."""
    mean, following = {}, copy.deepcopy([dict(w) for w in w_locals])
    for key in w_locals[0]:
        total = sum(w[key].double() for w in w_locals)
        mean[key] = total / len(w_locals)
        order = generator.permutation(len(w_locals))
        for i in range(len(w_locals)):
            following[i][key] = w_locals[int(order[i])][key].clone()
    return mean, following


def stepped(
    given: Mapping[int, Mapping[str, Tensor]], server: ServerState | None = None, seed: int = 0, **options: Any
) -> ServerState:
    server = server or ServerState(random_state(99))
    return recombine(server, given, ROLES, AllOptions(**options), seed)


def fedmr(**options: Any) -> Server:
    return Server(algorithm("FedMR"), AllOptions(**options), random_state(9), ROLES, 0)


def gathered(server: Server, silos: Sequence[int], arrival: Mapping[int, float]) -> ServerState:
    """The state after a round of these silos, whose updates arrive in this order, with these samples."""
    gathering = server.begin(silos)
    for silo, samples in arrival.items():
        update = server.travelling(random_state(10 * server.state.round + silo))
        gathering.add(Update(silo, samples, update))
    gathering.finish()
    return server.state


def test_published_rule() -> None:
    found = stepped(trained(4), ServerState(random_state(99), round=3), seed=5)
    mean, following = published(list(trained(4).values()), np.random.default_rng(derive("recombination", 5, 3)))
    assert [fingerprint(slot) for slot in found.slots] == [fingerprint(slot) for slot in following]
    for key, value in found.model.items():
        expected = mean[key] if value.is_floating_point() else mean[key].round()
        assert torch.equal(value, expected.to(value.dtype)), key


def test_global_model_is_the_mean_of_the_trained_models_by_hand() -> None:
    state = {key: torch.zeros_like(value) for key, value in random_state(0).items()}
    models = [{**state, "3.bias": torch.tensor([x, -x])} for x in (1.0, 2.0, 6.0)]
    # (1 + 2 + 6)/3
    assert stepped(dict(enumerate(models))).model["3.bias"].tolist() == [3.0, -3.0]


def test_samples_do_not_weigh_in_the_global_model() -> None:
    def after(*samples: float) -> State:
        return gathered(fedmr(), range(len(samples)), dict(enumerate(samples))).model

    assert fingerprint(after(1, 1, 1)) == fingerprint(after(1, 500, 20))


units = st.sampled_from(["key", "module"])


@given(st.integers(1, 6), units, st.integers(0, 2**31), st.integers(0, 50))
def test_no_key_loses_or_gains_a_value(slots: int, unit: Unit, seed: int, round: int) -> None:
    given = trained(slots, seed % 1000)
    found = stepped(given, ServerState(random_state(99), round=round), seed, fedmr_unit=unit)
    for key in KEYS:
        before = sorted(fingerprint({"": state[key]}) for state in given.values())
        assert sorted(fingerprint({"": slot[key]}) for slot in found.slots) == before, key


@given(st.integers(1, 6), units, st.integers(0, 1000))
def test_mean_is_the_same_before_and_after(slots: int, unit: Unit, seed: int) -> None:
    # Small integers, so that a sum does not depend on its order.
    with isolated(seed):
        given = {
            n: {k: torch.randint(-8, 8, v.shape).to(v.dtype) for k, v in random_state(0).items()} for n in range(slots)
        }
    found = stepped(given, seed=seed, fedmr_unit=unit).slots
    for key in KEYS:
        total = torch.stack([state[key] for state in given.values()]).sum(0)
        assert torch.equal(torch.stack([slot[key] for slot in found]).sum(0), total)


def sources(found: ServerState, given: Mapping[int, Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """For every key, the trained slot that each slot's entry came from."""
    return {
        key: [next(n for n, state in given.items() if torch.equal(state[key], slot[key])) for slot in found.slots]
        for key in KEYS
    }


@given(st.integers(1, 6), st.integers(0, 1000))
def test_unit_module_keeps_a_modules_tensors_together(slots: int, seed: int) -> None:
    given = trained(slots)
    found = sources(stepped(given, seed=seed, fedmr_unit="module"), given)
    for path in ("0", "1", "3"):
        own = [order for key, order in found.items() if key.startswith(f"{path}.")]
        assert own == [own[0]] * len(own)


def test_unit_module_permutes_the_modules_apart() -> None:
    found = sources(stepped(trained(5), fedmr_unit="module"), trained(5))
    assert len({tuple(order) for order in found.values()}) == 3


def test_unit_key_permutes_every_key_apart() -> None:
    # With 7 slots, two of 9 keys share one of 5040 orders once in 140 seeds; not with this one.
    found = sources(stepped(trained(7)), trained(7))
    assert len({tuple(order) for order in found.values()}) == len(KEYS) == 9


def test_naive_rule_by_modules() -> None:
    given, generator = list(trained(4).values()), np.random.default_rng(3)
    found = recombined(given, KEYS, "module", generator)
    generator = np.random.default_rng(3)
    orders = {path: generator.permutation(4) for path in ("0", "1", "3")}
    for i, slot in enumerate(found):
        expected = OrderedDict((k, given[int(orders[k.split(".")[0]][i])][k]) for k in KEYS)
        assert fingerprint(slot) == fingerprint(expected)


@pytest.mark.parametrize("unit", ["key", "module"])
@pytest.mark.parametrize("bound", [0, 9])
def test_counters_stay_integers(unit: Unit, bound: int) -> None:
    found = stepped(trained(4), fedmr_unit=unit, first_stage_bound=bound)
    for state in (found.model, *found.slots):
        assert state["1.num_batches_tracked"].dtype is torch.int64


def test_counters_values_are_the_clients() -> None:
    # Counters of the clients: 40, 41, 42; the global model's is their mean.
    found = stepped(trained(3))
    assert sorted(slot["1.num_batches_tracked"].item() for slot in found.slots) == [40, 41, 42]
    assert found.model["1.num_batches_tracked"].item() == 41


@pytest.mark.parametrize("unit", ["key", "module"])
@pytest.mark.parametrize("bound", [0, 9])
def test_tensors_that_come_in_are_left_alone(unit: Unit, bound: int) -> None:
    given, server = trained(3), ServerState(random_state(9), tuple(random_state(n) for n in (5, 6, 7)))
    before = [fingerprint(state) for state in (*given.values(), server.model, *server.slots)]
    stepped(given, server, fedmr_unit=unit, first_stage_bound=bound)
    assert [fingerprint(state) for state in (*given.values(), server.model, *server.slots)] == before


def test_first_stage_gives_every_slot_the_mean() -> None:
    found = stepped(trained(3), ServerState(random_state(9), round=1), first_stage_bound=2)
    assert [fingerprint(slot) for slot in found.slots] == [fingerprint(found.model)] * 3
    assert fingerprint(found.model) == fingerprint(stepped(trained(3)).model)


def test_first_stage_ends_with_its_bound() -> None:
    found = stepped(trained(3), ServerState(random_state(9), round=2), first_stage_bound=2)
    assert len({fingerprint(slot) for slot in found.slots}) == 3


def test_same_seed_and_round_give_the_same_slots() -> None:
    one, other = (stepped(trained(5), seed=4) for _ in range(2))
    assert [fingerprint(slot) for slot in one.slots] == [fingerprint(slot) for slot in other.slots]


@pytest.mark.parametrize(("seed", "round"), [(4, 1), (5, 0)], ids=["another round", "another seed"])
def test_another_seed_or_round_gives_another_permutation(seed: int, round: int) -> None:
    given = trained(6)
    one = sources(stepped(given, seed=4), given)
    other = sources(stepped(given, ServerState(random_state(9), round=round), seed=seed), given)
    assert one != other


def chi_square(counts: Counter[tuple[int, ...]], cells: int, total: int) -> float:
    expected = total / cells
    unseen = cells - len(counts)
    return sum((seen - expected) ** 2 / expected for seen in counts.values()) + unseen * expected


def orders(slots: int, keys: Sequence[str], rounds: int) -> list[list[tuple[int, ...]]]:
    """By round, the order of every key, as the seeds of a run give it."""
    given = [OrderedDict((key, torch.tensor(slot)) for key in keys) for slot in range(slots)]
    found = []
    for round in range(rounds):
        server = ServerState(given[0], tuple(given), round=round)
        slots_after = recombine(server, dict(enumerate(given)), ROLES, AllOptions(), 0).slots
        found.append([tuple(int(slot[key]) for slot in slots_after) for key in keys])
    return found


def test_orders_are_uniform() -> None:
    # Six orders of three slots over 1200 rounds: 20.5 is exceeded with probability 0.001 (5 degrees).
    counts = Counter(order for (order,) in orders(3, ["a"], 1200))
    assert chi_square(counts, 6, 1200) < 20.5


def test_orders_of_two_keys_do_not_depend_on_one_another() -> None:
    # Two orders of two slots for each of two keys: four pairs, 3 degrees, 16.3 at probability 0.001.
    counts = Counter((*first, *second) for first, second in orders(2, ["a", "b"], 800))
    assert chi_square(counts, 4, 800) < 16.3


# Slots over the rounds


def test_slot_that_was_not_trained_takes_part_as_it_is() -> None:
    server = ServerState(random_state(9), tuple(random_state(n) for n in (20, 21, 22)))
    given = {0: random_state(0), 2: random_state(2)}
    found = stepped(given, server)
    whole = {0: given[0], 1: server.slots[1], 2: given[2]}
    for key in KEYS:
        expected = sorted(fingerprint({"": state[key]}) for state in whole.values())
        assert sorted(fingerprint({"": slot[key]}) for slot in found.slots) == expected


def test_slot_that_was_not_trained_is_not_in_the_global_model() -> None:
    server = ServerState(random_state(9), tuple(random_state(n) for n in (20, 21, 22)))
    given = {0: random_state(0), 2: random_state(2)}
    expected = stepped({0: random_state(0), 1: random_state(2)}).model
    assert fingerprint(stepped(given, server).model) == fingerprint(expected)


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5))
def test_number_of_slots_is_constant(arrived: list[set[int]]) -> None:
    server = ServerState(random_state(9), tuple(trained(4).values()))
    for slots in arrived:
        server = stepped({slot: random_state(slot) for slot in slots}, server)
        assert len(server.slots) == 4


def test_silos_that_differ_train_the_slots_that_persist() -> None:
    server = fedmr()
    begun: list[list[str]] = []
    for silos in ([0, 3], [1, 2], [3, 4]):
        slots = [fingerprint(server.state.begins(n)) for n in range(2)]
        begun.append([fingerprint(assignment.state) for assignment in server.assign(silos)])
        assert begun[-1] == slots
        assert len(gathered(server, silos, dict.fromkeys(reversed(silos), 1)).slots) == 2
    assert len(set(begun[0])) == 1  # the warm start
    assert len(set(begun[1])) == len(set(begun[2])) == 2


def test_update_goes_into_the_slot_that_its_silo_was_sent() -> None:
    # Were a slot given to whoever arrives first, the same permutation would give other slots.
    one, other = (
        [fingerprint(slot) for slot in gathered(fedmr(), [2, 5, 7], dict.fromkeys(arrival, 1)).slots]
        for arrival in ([7, 2, 5], [5, 7, 2])
    )
    assert one == other


def test_silo_lost_in_the_first_round_leaves_its_slot() -> None:
    assert len(gathered(fedmr(), [0, 1, 2], {0: 1, 1: 1}).slots) == 3


@pytest.mark.parametrize("unit", ["key", "module"])
def test_fedsq_under_fedmr_trains_every_slot_under_the_first_gates(unit: Unit) -> None:
    options = AllOptions(epochs=1, fedmr_unit=unit)
    found = Federation("FedSQ+FedMR", options=options).repeat(3)
    start = Federation("FedAvg", options=options).state
    assert fingerprint(found.client.model.structural.state_dict()) == fingerprint(start)
    assert len({fingerprint(slot) for slot in found.own_server.state.slots}) == 3


def test_fedsq_under_fedmr_sends_the_slots_and_nothing_else() -> None:
    found = Federation("FedSQ+FedMR", options=AllOptions(epochs=1)).repeat(2)
    slots = [fingerprint(slot) for slot in found.own_server.state.slots]
    found.round([0, 1, 2])
    assert [fingerprint(message) for message in found.sent[-1].values()] == slots


def test_body_alone_is_recombined_where_the_head_stays() -> None:
    body = replace(algorithm("FedMR"), exchange=BODY_TRAVELS)
    server = Server(body, AllOptions(head="3"), random_state(9), roles(model(), "3"), 0)
    for slot in gathered(server, [0, 1], {0: 1, 1: 1}).slots:
        assert torch.equal(slot["3.weight"], random_state(9)["3.weight"])
        assert not torch.equal(slot["0.weight"], random_state(9)["0.weight"])

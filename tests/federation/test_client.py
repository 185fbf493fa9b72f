"""The client's side: what stays with it, and its own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.local import LocalTraining, OptimizerTraining, Phase, local_update
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import fingerprint, state_of
from tests.algorithms.task import OPTIONS, AllOptions, Federation, mlp, silos

TRAINING = LocalTraining(learning_rate=0.1)
DATA = silos()


def worker(row: str, options: Any = OPTIONS) -> Client:
    return Client(mlp(), algorithm(row), options, TRAINING, seed=3)


def test_round_of_a_client_is_a_local_update_with_its_own_seed() -> None:
    found, expected = worker("FedAvg"), mlp()
    found.train(2, DATA[2], 5)
    seed = derive("local", 3, 5, 2)
    local_update(expected, DATA[2], TRAINING, [Phase(2, frozenset(Role))], found.roles, round=5, seed=seed)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(expected))


def test_objective_is_the_rows() -> None:
    avg, prox = worker("FedAvg"), worker("FedProx", AllOptions(epochs=2, fedprox_mu=1.0))
    for found in (avg, prox):
        found.train(0, DATA[0], 0)
    assert fingerprint(state_of(avg.model)) != fingerprint(state_of(prox.model))


def test_client_goes_on_with_its_own_head() -> None:
    found = worker("FedRep")
    found.train(0, DATA[0], 0)
    head = found.model.state_dict()["3.weight"].clone()
    found.train(1, DATA[1], 0)
    found.model.load_state_dict(state_of(mlp()))
    found.states.load(0, found.model)
    assert torch.equal(found.model.state_dict()["3.weight"], head)


def test_head_of_one_client_does_not_reach_the_next() -> None:
    alone, after = worker("FedRep"), worker("FedRep")
    after.train(0, DATA[0], 0)
    body = {key: value for key, value in state_of(mlp()).items() if not key.startswith("3.")}
    after.model.load_state_dict(body, strict=False)  # what travels
    for found in (alone, after):
        found.train(1, DATA[1], 0)
    assert fingerprint(state_of(alone.model)) == fingerprint(state_of(after.model))


def test_statistics_of_one_client_do_not_reach_the_next() -> None:
    alone, after = worker("FedBN"), worker("FedBN")
    after.train(0, DATA[0], 0)
    travelling = {key: value for key, value in state_of(mlp()).items() if not key.startswith("1.")}
    after.model.load_state_dict(travelling, strict=False)
    for found in (alone, after):
        found.train(1, DATA[1], 0)
    assert fingerprint(state_of(alone.model)) == fingerprint(state_of(after.model))


def test_nothing_stays_where_everything_travels() -> None:
    found = worker("FedAvg")
    found.train(0, DATA[0], 0)
    assert found.states.tensors() == {}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ("FedRep", ["3.weight", "3.bias"]),
        ("FedBABU", ["3.weight", "3.bias"]),
        ("FedBN", ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]),
    ],
)
def test_what_stays(row: str, keys: list[str]) -> None:
    found = worker(row)
    found.train(4, DATA[0], 0)
    assert list(found.states.tensors()) == [f"4/{key}" for key in keys]


# The client's own model


@pytest.mark.parametrize("row", ["FedRep", "FedBN"])
def test_own_model_is_the_global_one_with_the_own_part(row: str) -> None:
    found = Federation(row).repeat(2)
    found.own(1)
    kept = found.client.states.tensors()
    expected = {**found.state, **{k[2:]: v for k, v in kept.items() if k.startswith("1/")}}
    assert fingerprint(state_of(found.client.model)) == fingerprint(expected)


def test_own_model_of_a_client_that_never_trained_has_the_warm_starts_part() -> None:
    found = Federation("FedRep")
    found.round([0, 1])
    found.own(2)
    assert torch.equal(found.client.model.state_dict()["3.weight"], mlp().state_dict()["3.weight"])


@pytest.mark.parametrize("row", ["FedAvg", "FedRep", "FedBN", "FedBABU", "FedSQ"])
def test_own_model_leaves_nothing_behind(row: str) -> None:
    found, other = (Federation(row).repeat(1) for _ in range(2))
    for client in range(3):
        found.own(client, epochs=2)
    assert fingerprint(found.client.states.tensors()) == fingerprint(other.client.states.tensors())
    found.repeat(1), other.repeat(1)
    assert fingerprint(found.state) == fingerprint(other.state)


def differs(row: str, head_only: bool) -> set[str]:
    found = Federation(row).repeat(1)
    found.own(0)
    before = state_of(found.client.model)
    found.own(0, epochs=2, head_only=head_only)
    return {key for key, value in state_of(found.client.model).items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("row", ["FedAvg", "FedRep", "FedBABU", "FedBN", "FedSQ"])
def test_fine_tuning_of_the_head_moves_nothing_else(row: str) -> None:
    assert differs(row, head_only=True) == {"3.weight", "3.bias"}


@pytest.mark.parametrize("row", ["FedAvg", "FedBABU", "FrozenBN"])
def test_fine_tuning_of_all_moves_all(row: str) -> None:
    # A bias before a batch normalisation has no gradient.
    assert differs(row, head_only=False) >= set(state_of(mlp())) - {"0.bias"}


def test_fine_tuning_has_its_own_seed_and_the_rounds_rate() -> None:
    found, expected = worker("FedAvg"), mlp()
    losses: list[torch.Tensor] = []
    found.personalise(2, DATA[2], 3, head_only=False, on_step=losses.append)
    assert len(losses) == 3 * len(list(DATA[2]))
    seed = derive("finetune", 3, 2)
    local_update(expected, DATA[2], TRAINING, [Phase(3, frozenset(Role))], found.roles, round=4, seed=seed)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(expected))


def test_fine_tuning_is_the_same_for_every_row() -> None:
    found = []
    for row in ("FedAvg", "FedProx"):
        one = worker(row, AllOptions(epochs=2, fedprox_mu=1.0))
        one.personalise(0, DATA[0], 2, head_only=False)
        found.append(fingerprint(state_of(one.model)))
    assert found[0] == found[1]


def test_without_epochs_nothing_is_trained() -> None:
    found = worker("FedAvg")
    found.personalise(0, [], 0, head_only=True)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(mlp()))


def test_kept_optimizers_are_each_clients_own_and_need_a_constant_rate() -> None:
    training = OptimizerTraining(optimizer=torch.optim.Adam, learning_rate=0.01)
    one = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0, keep_optimizers=True)
    begun, batches = state_of(one.model), silos()[0]
    results = []
    for client, round in ((0, 0), (1, 0), (0, 1)):
        one.model.load_state_dict(begun)
        one.train(client, batches, round)
        results.append(state_of(one.model))
    anew = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0)
    anew.train(1, batches, 0)
    assert fingerprint(results[1]) == fingerprint(state_of(anew.model))
    anew.model.load_state_dict(begun)
    anew.train(0, batches, 1)
    assert fingerprint(results[2]) != fingerprint(state_of(anew.model))
    with pytest.raises(ConfigError, match="constant"):
        schedule = LocalTraining(lr_schedule="cosine")
        Client(mlp(), algorithm("FedAvg"), OPTIONS, schedule, seed=0, keep_optimizers=True)

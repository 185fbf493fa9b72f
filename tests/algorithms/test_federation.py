"""Whole federations on the core alone: no host, three clients, a task that no linear model solves."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.algorithms.objective import OBJECTIVES
from fedsq_plugin.algorithms.options import Options
from fedsq_plugin.algorithms.phases import PHASES
from fedsq_plugin.algorithms.server import SERVERS
from fedsq_plugin.algorithms.view import VIEWS
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.local import LocalTraining, local_update
from fedsq_plugin.federation.partition import partition
from fedsq_plugin.federation.roles import roles
from fedsq_plugin.federation.seeding import derive, isolated, sample_clients
from fedsq_plugin.federation.state import State, fingerprint, nbytes, state_of
from fedsq_plugin.federation.updates import Update, problem

SILOS = 3


def corners(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four clouds around (±1, ±1); the class is whether the signs agree."""
    with isolated(seed):
        signs = torch.randint(2, (samples, 2)) * 2 - 1
        return signs + 0.3 * torch.randn(samples, 2), (signs.prod(1) > 0).long()


def mlp() -> nn.Module:
    with isolated(0):
        return nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


@dataclass
class Outcome:
    model: nn.Module
    accuracies: list[float]
    sent: list[State]


def federate(
    name: str, model: nn.Module, rounds: int = 5, order: int = 1, options: Options | None = None
) -> Outcome:
    """The rounds of a host, by the five choices; clients are visited forwards or backwards."""
    row, options = algorithm(name), options or Options(epochs=2)
    training = LocalTraining(learning_rate=0.1, momentum=0.9)
    x, labels = corners(240, seed=1)
    silos = [
        [(x[part[i : i + 16]], labels[part[i : i + 16]]) for i in range(0, len(part), 16)]
        for part in partition(labels.numpy(), SILOS, "hetero", 1.0, seed=0, min_size=20)
    ]
    server = VIEWS[row.view](model, options)
    client, known = copy.deepcopy(server), roles(server)
    accuracies, sent = [], []
    for round in range(rounds):
        state = state_of(server)
        rule = SERVERS[row.server](state, known, options)
        for silo in sample_clients(SILOS, SILOS, round, seed=0)[::order]:
            client.load_state_dict(state)
            local_update(
                client,
                silos[silo],
                training,
                PHASES[row.phases](options),
                known,
                round=round,
                seed=derive("local", 0, round, silo),
                objective=OBJECTIVES[row.objective](options),
            )
            update = Update(silo, sum(len(y) for _, y in silos[silo]), state_of(client))
            assert problem(update, state) is None
            sent.append(update.state)
            rule.add(update)
        server.load_state_dict(rule.finish())
        accuracies.append(evaluate(server, [corners(400, seed=2)]).accuracy)
    return Outcome(server, accuracies, sent)


def test_no_linear_model_solves_the_task() -> None:
    with isolated(0):
        linear = nn.Linear(2, 2)
    assert federate("FedAvg", linear).accuracies[-1] < 0.8


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedSQ"])
def test_federation_solves_the_task(name: str) -> None:
    assert federate(name, mlp()).accuracies[-1] > 0.95


def test_fedsq_leaves_the_structural_copy_as_it_was_at_the_start() -> None:
    found = federate("FedSQ", mlp())
    assert isinstance(found.model, DualCopy)
    assert fingerprint(found.model.structural.state_dict()) == fingerprint(mlp().state_dict())
    assert fingerprint(found.model.quantitative.state_dict()) != fingerprint(mlp().state_dict())


def test_fedsq_sends_what_fedavg_sends() -> None:
    sq, avg = federate("FedSQ", mlp()), federate("FedAvg", mlp())
    assert [nbytes(state) for state in sq.sent] == [nbytes(state) for state in avg.sent]
    assert [list(state) for state in sq.sent] == [list(state) for state in avg.sent]


def test_fedsq_is_not_fedavg_under_another_name() -> None:
    sq, avg = federate("FedSQ", mlp()), federate("FedAvg", mlp())
    assert fingerprint(state_of(sq.model)) != fingerprint(state_of(avg.model))


def test_fedprox_with_mu_zero_is_fedavg() -> None:
    prox = federate("FedProx", mlp(), options=Options(epochs=2, fedprox_mu=0.0))
    assert fingerprint(state_of(prox.model)) == fingerprint(state_of(federate("FedAvg", mlp()).model))


def test_large_mu_keeps_the_model_near_its_start() -> None:
    def distance(mu: float) -> float:
        found = federate("FedProx", mlp(), rounds=1, options=Options(epochs=2, fedprox_mu=mu))
        pairs = zip(found.model.parameters(), mlp().parameters(), strict=True)
        return sum(float((p.detach() - start.detach()).square().sum()) for p, start in pairs)

    assert distance(5.0) < distance(0.5) < distance(0.0)


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedSQ"])
def test_same_seed_gives_the_same_model_bit_for_bit(name: str) -> None:
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        found.append(fingerprint(state_of(federate(name, mlp(), rounds=2).model)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ"])
def test_updates_do_not_depend_on_the_order_of_the_clients(name: str) -> None:
    forwards, backwards = (federate(name, mlp(), rounds=1, order=order).sent for order in (1, -1))
    assert [fingerprint(s) for s in forwards] == [fingerprint(s) for s in reversed(backwards)]


def test_kept_buffers_are_the_starts_after_every_round() -> None:
    found = state_of(federate("FedAvg", mlp(), options=Options(epochs=1, buffers="keep")).model)
    start = mlp().state_dict()
    kept = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert all(torch.equal(found[key], start[key]) for key in kept)


def test_core_needs_no_host() -> None:
    code = (
        "import sys, fedsq_plugin.algorithms.view, fedsq_plugin.algorithms.server,"
        "fedsq_plugin.federation.local, fedsq_plugin.federation.warm_start,"
        "fedsq_plugin.federation.partition, fedsq_plugin.federation.updates;"
        "sys.exit(' '.join({'fedml', 'torchvision', 'sklearn'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)

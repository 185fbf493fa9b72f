"""Whole federations on the core alone: no host, three clients, a task that no linear model solves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin.algorithms.registry import builtin
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation import state_files
from fedsq_plugin.federation.evaluate import pooled
from fedsq_plugin.federation.seeding import isolated, sample_clients
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint, state_of
from fedsq_plugin.federation.training import LocalTraining

from .task import SILOS, Federation, changed, mlp, silos

NAMES = sorted(builtin())
GLOBAL = [name for name in NAMES if not builtin()[name].personal]
COMPOSED = ["FedSQ+FedMR", "FedSQ+FedAdam", "FedSQ+FedProx+FedYogi", "FedSQ+LP-FT", "FedNCM+FedMR"]
EVERY = [*NAMES, *COMPOSED, "FedSQ+FedRep", "FedMR+FedBN"]


def test_no_linear_model_solves_the_task() -> None:
    with isolated(0):
        linear = nn.Linear(2, 2)
    assert Federation("FedAvg", linear, changed(head=None)).repeat(5).accuracy() < 0.8


def test_start_does_not_solve_the_task() -> None:
    assert Federation("FedAvg").accuracy() < 0.8


@pytest.mark.parametrize("name", [*GLOBAL, *COMPOSED])
def test_federation_solves_the_task(name: str) -> None:
    assert Federation(name).repeat(8).accuracy() > 0.95


@pytest.mark.parametrize(
    ("name", "still"),
    [
        ("FedRep", {"3.weight", "3.bias"}),
        ("FedBABU", {"3.weight", "3.bias"}),
        ("FedBN", {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        ("FrozenBN", {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        (
            "FrozenEarly",
            {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"} | {"1.num_batches_tracked"},
        ),
        ("FedAvg", set()),
    ],
)
def test_what_stays_in_the_global_model(name: str, still: set[str]) -> None:
    found, start = Federation(name).repeat(2).state, state_of(mlp())
    unchanged = {key for key, value in found.items() if torch.equal(value, start[key])}
    assert unchanged - {"0.bias"} == still - {"0.bias"}  # a bias before a norm has no gradient


@pytest.mark.parametrize("name", EVERY)
def test_order_in_which_clients_are_visited_changes_nothing(name: str) -> None:
    forwards, backwards = (Federation(name).repeat(3, visits) for visits in (1, -1))
    for one, other in zip(forwards.answers, backwards.answers, strict=True):
        assert {c: fingerprint(s) for c, s in one.items()} == {c: fingerprint(s) for c, s in other.items()}
    assert fingerprint(forwards.own_server.state.tensors()) == fingerprint(backwards.own_server.state.tensors())


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedSQ", "FedMR", "FedRep", "FedNCM"])
def test_same_seed_gives_the_same_model_bit_for_bit(name: str) -> None:
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        found.append(fingerprint(Federation(name).repeat(2).state))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "FedAvg"])
def test_algorithm_is_not_fedavg_under_another_name(name: str) -> None:
    options = changed(fedprox_mu=1.0)
    own, avg = (Federation(n, options=options).repeat(2) for n in (name, "FedAvg"))
    assert fingerprint(own.state) != fingerprint(avg.state)


# Algorithms that are FedAvg at the end of an option


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvgM", {"server_momentum": 0.0, "server_lr": None}),
        ("LP-FT", {"probe_rounds": 0}),
        ("FedMR", {"first_stage_bound": 9}),
    ],
)
def test_algorithm_is_fedavg_at_the_end_of_its_option(name: str, options: dict[str, Any]) -> None:
    # Of equal silos: FedMR's global model is not weighted.
    data = [silos()[0]] * 3
    own = Federation(name, options=changed(**options), data=data).repeat(3).state
    avg = Federation("FedAvg", data=data).repeat(3).state
    assert all(torch.allclose(own[key], avg[key], atol=1e-5) for key in avg)


def test_kept_buffers_are_the_starts_after_every_round() -> None:
    found = Federation("FedAvg", options=changed(epochs=1, buffers="keep")).repeat(5).state
    start = mlp().state_dict()
    kept = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert all(torch.equal(found[key], start[key]) for key in kept)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi"])
def test_variances_of_a_server_optimizer_stay_positive(name: str) -> None:
    found = Federation(name, options=changed(server_lr=3.0, server_tau=1e-3))
    for _ in range(6):
        found.repeat(1)
        assert (found.state["1.running_var"] > 0).all()


# Failures


@pytest.mark.parametrize("name", EVERY)
def test_round_goes_on_without_a_client_that_was_lost(name: str) -> None:
    found = Federation(name)
    for lost in ([], [1], [0], []):
        found.round(range(SILOS), lost=lost)
    assert found.own_server.state.round == 4
    assert all(torch.isfinite(value).all() for value in found.state.values())


@pytest.mark.parametrize("name", EVERY)
def test_round_without_any_update_is_an_error_and_changes_nothing(name: str) -> None:
    found = Federation(name).repeat(1)
    before = found.own_server.state
    with pytest.raises(UpdateError, match="no update is left to aggregate: no silo answered"):
        found.round(range(SILOS), lost=range(SILOS))
    assert fingerprint(found.own_server.state.tensors()) == fingerprint(before.tensors())
    assert found.own_server.state.round == 1


@pytest.mark.parametrize("name", ["FedAvg", "FedMR", "FedRep", "FedAdam"])
def test_clients_differ_from_round_to_round(name: str) -> None:
    found = Federation(name, data=silos(5))
    for round in range(10):
        found.round(sample_clients(5, 2, round, seed=0))
    own = pooled(found.own(client) for client in range(5)).accuracy
    assert own > 0.9


# Resume


def saved(found: Federation, folder: Path) -> None:
    state = found.own_server.state
    state_files.save(folder / "server.safetensors", state.tensors(), state.about())
    state_files.save(folder / "clients.safetensors", found.client.states.tensors(), {})


def resumed(found: Federation, folder: Path) -> None:
    """A new process: everything but the two files is as at the start."""
    state = ServerState.of(*state_files.load(folder / "server.safetensors"))
    found.own_server.state = state
    found.client.states.restore(state_files.load(folder / "clients.safetensors")[0])
    if isinstance(found.client.model, DualCopy):
        # Nobody tells clients again what they were told before.
        if state.structural is None:
            found.client.model.unfreeze()
        else:
            found.client.model.refresh(state.structural)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in EVERY},
    "FedMR by modules": ("FedMR", {"fedmr_unit": "module"}),
    "FedMR in the first stage": ("FedMR", {"first_stage_bound": 3}),
    "FedSQ refreshed": ("FedSQ", {"structural_copy": "refresh", "structural_rounds": 2}),
    "FedSQ ema": ("FedSQ", {"structural_copy": "ema", "structural_rounds": 2}),
    "FedSQ ema every round": ("FedSQ+FedMR", {"structural_copy": "ema"}),
    "FedSQ unfrozen before": ("FedSQ", {"structural_copy": "unfreeze", "structural_rounds": 1}),
    "FedSQ unfrozen after": ("FedSQ", {"structural_copy": "unfreeze", "structural_rounds": 3}),
    "FedSQ+FedRep refreshed": ("FedSQ+FedRep", {"structural_copy": "refresh", "structural_rounds": 2}),
    "buffers kept": ("FedAdam", {"buffers": "keep"}),
}
CLIENTS = [[0, 1], [1, 2], [0, 2], [0, 1, 2], [2, 1]]
"""Of five rounds."""


def run(variant: str) -> Federation:
    name, options = VARIANTS[variant]
    training = LocalTraining(learning_rate=0.1, momentum=0.9, lr_schedule="cosine", comm_round=5)
    return Federation(name, options=changed(epochs=1, **options), training=training)


@pytest.mark.parametrize(("variant", "stop"), [(v, stop) for v in VARIANTS for stop in ([2] if v in EVERY else [1, 3])])
def test_run_that_was_stopped_goes_on_bit_for_bit(variant: str, stop: int, tmp_path: Path) -> None:
    whole, first, second = (run(variant) for _ in range(3))
    for clients in CLIENTS:
        whole.round(clients)
    for clients in CLIENTS[:stop]:
        first.round(clients)
    saved(first, tmp_path)
    resumed(second, tmp_path)
    for clients in CLIENTS[stop:]:
        second.round(clients)
    assert messages(second) == messages(whole)[stop:]
    assert fingerprint(second.own_server.state.tensors()) == fingerprint(whole.own_server.state.tensors())
    assert second.own_server.state.about() == whole.own_server.state.about()
    assert by_client(second) == by_client(whole)


def messages(found: Federation) -> list[dict[int, tuple[str, str]]]:
    """What went both ways, by round and client."""
    return [
        {client: (fingerprint(message), fingerprint(answers[client])) for client, message in sent.items()}
        for sent, answers in zip(found.sent, found.answers, strict=True)
    ]


def by_client(found: Federation) -> dict[str, str]:
    return {name: fingerprint({"": value}) for name, value in found.client.states.tensors().items()}


def test_refresh_in_fedmrs_first_stage_costs_the_same_after_a_stop(tmp_path: Path) -> None:
    VARIANTS["own"] = ("FedSQ+FedMR", {"first_stage_bound": 9, "structural_copy": "refresh"})
    try:
        whole, first, second = (run("own") for _ in range(3))
    finally:
        del VARIANTS["own"]
    whole.repeat(3), first.repeat(2)
    saved(first, tmp_path)
    resumed(second, tmp_path)
    second.repeat(1)
    assert messages(second) == messages(whole)[2:]


def test_state_without_the_clients_would_not_do(tmp_path: Path) -> None:
    # The check above can fail: without what stays with the clients FedRep goes on otherwise.
    whole, second = run("FedRep"), run("FedRep")
    whole.repeat(2)
    saved(whole, tmp_path)
    resumed(second, tmp_path)
    second.client.states.restore({})
    whole.repeat(1), second.repeat(1)
    assert fingerprint(whole.state) != fingerprint(second.state)


def test_core_needs_no_host() -> None:
    """Every module of the core, in a process of its own."""
    code = (
        "import sys, pkgutil, importlib, fedsq_plugin\n"
        "for core in ('algorithms', 'dualcopy', 'federation', 'settings', 'wire'):\n"
        "    package = importlib.import_module(f'fedsq_plugin.{core}')\n"
        "    for info in pkgutil.iter_modules(package.__path__, f'{package.__name__}.'):\n"
        "        importlib.import_module(info.name)\n"
        "hosts = {'fedml', 'flamby', 'grpc', 'mpi4py', 'torchvision', 'sklearn', 'fedsq_plugin.hosts'}\n"
        "sys.exit(' '.join(hosts & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


def test_messages_are_not_shared_with_the_servers_state() -> None:
    # A client that writes into its model must not write into the server's.
    found = Federation("FedAvg")
    before = fingerprint(found.state)
    (assignment, _) = found.own_server.assign([0, 1])
    start: State = found.state
    found.client.receive(assignment)
    found.client.train(0, found.data[0], 0)
    assert fingerprint(start) == before

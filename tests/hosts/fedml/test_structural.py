"""The structural copy over the rounds, through FedML's `sp`: announced, fingerprinted, and paid for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import State, fingerprint, state_of

from .conftest import (
    HEAD,
    WHOLE,
    MakeArgs,
    args_for,
    final,
    follow,
    network,
    prepare,
    silos,
    simulate,
    watch_rounds,
    watched,
)

PRINT = 64
"""Bytes of a fingerprint: SHA-256 in hex."""


def structural(part: Any) -> State:
    """The structural copy of a trainer or aggregator."""
    assert isinstance(part.model, DualCopy)
    return state_of(part.model.structural)


@pytest.mark.parametrize("per_round", [3, 2])
@pytest.mark.parametrize("name", ["FedSQ", "FedSQ+FedMR", "FedSQ+FedRep", "FedSQ+FedAdam"])
@pytest.mark.parametrize(
    "options",
    [
        {"structural_copy": "fixed"},
        {"structural_copy": "refresh"},
        {"structural_copy": "refresh", "structural_rounds": 2, "keep_gates": True},
        {"structural_copy": "ema", "structural_decay": 0.5},
        {"structural_copy": "unfreeze", "structural_rounds": 2},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_server_and_clients_have_the_same_structural_copy_in_every_round(
    options: dict[str, Any], name: str, per_round: int, fedml: Any, make_args: MakeArgs
) -> None:
    args = args_for(make_args, name, comm_round=5, client_num_per_round=per_round, **options)
    runner = prepare(fedml, args)

    def look(run: Any) -> tuple[bool, bool, str, str]:
        parts = (run.model_trainer, run.aggregator)
        unfrozen = [part.model.unfrozen for part in parts]
        prints = ["" if part.model.unfrozen else fingerprint(structural(part)) for part in parts]
        return (*unfrozen, *prints)  # type: ignore[return-value]

    found = watch_rounds(runner.runner, look)
    runner.run()
    assert all(mine == servers for mine, servers, _, _ in found)
    assert all(mine == servers for _, _, mine, servers in found)
    changes = [one != other for one, other in pairwise(found)]
    assert (
        changes
        == {
            "fixed": [False] * 4,
            "refresh": [True] * 4 if "structural_rounds" not in options else [False, True, False, True],
            "ema": [True] * 4,
            "unfreeze": [False, True, False, False],
        }[options["structural_copy"]]
    )


def test_a_refreshed_copy_is_the_global_model_and_an_average_follows_it(fedml: Any, make_args: MakeArgs) -> None:
    """refresh: s_r = w_{r-1}; ema: s_r = .75·s_{r-1} + .25·w_{r-1}, counters those of w."""
    for options in ({"structural_copy": "refresh"}, {"structural_copy": "ema", "structural_decay": 0.75}):
        runner = prepare(fedml, args_for(make_args, "FedSQ", comm_round=4, **options))
        found = watch_rounds(runner.runner, lambda run: (final(run), structural(run.model_trainer)))
        runner.run()
        expected = dict(network().state_dict())
        for round, (_, copy) in enumerate(found):
            if round:
                model, old = found[round - 1][0], 0.75 if options["structural_copy"] == "ema" else 0.0
                expected = {
                    key: old * expected[key] + (1 - old) * value if value.is_floating_point() else value
                    for key, value in model.items()
                }
            for key, value in copy.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def down(fedml: Any, make_args: MakeArgs, name: str = "FedSQ", **options: Any) -> list[int]:
    run = simulate(fedml, args_for(make_args, name, comm_round=4, **options))
    assert [record.bytes_up for record in run.records] == [run.records[0].bytes_up] * 4
    return [record.bytes_down for record in run.records]


def test_a_refresh_costs_its_announcement(fedml: Any, make_args: MakeArgs) -> None:
    """The copy is the model that is sent anyway."""
    plain, told = 3 * WHOLE, 3 * (WHOLE + PRINT)
    assert down(fedml, make_args, "FedAvg") == [plain] * 4
    assert down(fedml, make_args) == [plain] * 4
    assert down(fedml, make_args, structural_copy="refresh") == [plain, told, told, told]
    assert down(fedml, make_args, structural_copy="refresh", structural_rounds=2) == [*(plain, plain, told, plain)]


def test_an_average_costs_one_model_more(fedml: Any, make_args: MakeArgs) -> None:
    plain, told = 3 * WHOLE, 3 * (2 * WHOLE + PRINT)
    assert down(fedml, make_args, structural_copy="ema") == [plain, told, told, told]


def test_a_refresh_is_sent_whole_where_the_model_is_not(fedml: Any, make_args: MakeArgs) -> None:
    """The head stays with the silos; slots are other models than the global one."""
    whole = 2 * WHOLE + PRINT
    assert down(fedml, make_args, "FedSQ+FedMR", structural_copy="refresh") == [3 * WHOLE] + [3 * whole] * 3
    part, whole = WHOLE - HEAD, 2 * WHOLE - HEAD + PRINT
    assert down(fedml, make_args, "FedSQ+FedRep", structural_copy="refresh") == [3 * part] + [3 * whole] * 3


@pytest.mark.parametrize("way", ["refresh", "ema"])
def test_a_copy_that_would_follow_norm_layers_that_no_silo_has_is_refused(
    way: str, fedml: Any, make_args: MakeArgs
) -> None:
    with pytest.raises(ConfigError, match=rf"FedSQ\+FedBN with structural_copy '{way}'"):
        down(fedml, make_args, "FedSQ+FedBN", structural_copy=way)


def test_unfreezing_is_announced_once_and_costs_nothing(fedml: Any, make_args: MakeArgs) -> None:
    assert down(fedml, make_args, structural_copy="unfreeze", structural_rounds=2) == [3 * WHOLE] * 4


def test_a_silo_that_was_away_is_told_when_it_comes_back(fedml: Any, make_args: MakeArgs) -> None:
    """The copy changes once, in the third round. Silo 0 comes back in the fourth, when the global model
    is another one; silo 2 has its first round in the fifth."""
    args = args_for(
        *(make_args, "FedSQ"),
        **{"comm_round": 6, "client_num_per_round": 2, "structural_copy": "refresh", "structural_rounds": 2},
    )
    runner = prepare(fedml, args, silos((16, 24, 40, 16)), network())
    runner.runner.args.client_num_in_total = 4
    follow(runner.runner, [[0, 1], [0, 1], [1, 3], [0, 1], [2, 3], [0, 2]])
    seen = watched(runner.runner)
    models = watch_rounds(runner.runner, final)
    runner.run()
    told = [
        [(b.client, any(k.startswith("fedsq:fingerprint") for k in b.received)) for b in seen if b.round == r]
        for r in range(6)
    ]
    assert told == [
        [(0, False), (1, False)],
        [(0, False), (1, False)],
        [(1, True), (3, True)],
        [(0, True), (1, False)],
        [(2, True), (3, True)],
        [(0, True), (2, False)],
    ]
    sent_whole = 2 * WHOLE + PRINT
    assert [record.bytes_down for record in runner.runner.records] == [
        *(2 * WHOLE, 2 * WHOLE, 2 * (WHOLE + PRINT), WHOLE + sent_whole),
        *(2 * (WHOLE + PRINT), WHOLE + sent_whole),
    ]
    (late,) = [b for b in seen if b.round == 3 and b.client == 0]
    copy = {key.removeprefix("fedsq:structural:"): value for key, value in late.received.items()}
    assert all(torch.equal(copy[key], value) for key, value in models[1].items())


def test_a_copy_that_is_not_the_servers_ends_the_run(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = prepare(fedml, args_for(make_args, "FedSQ", structural_copy="refresh"))
    refresh = DualCopy.refresh

    def damaged(self: DualCopy, state: Any = None) -> None:
        refresh(self, state)
        if self is runner.runner.model_trainer.model:
            with torch.no_grad():
                self.structural.get_parameter("0.weight")[0, 0] += 1e-6

    monkeypatch.setattr(DualCopy, "refresh", damaged)
    with pytest.raises(UpdateError, match=r"the structural copy is \w{12}…, the server announced \w{12}…$"):
        runner.run()


def test_unfrozen_gates_are_fedavg_from_the_same_weights(fedml: Any, make_args: MakeArgs) -> None:
    """Two rounds under gates, then a plain loop over silos from the weights that they gave."""
    options = {"structural_copy": "unfreeze", "structural_rounds": 2, "comm_round": 4}
    data = silos()
    runner = prepare(fedml, args_for(make_args, "FedSQ", **options), data)
    models = watch_rounds(runner.runner, final)
    runner.run()
    gated = simulate(fedml, args_for(make_args, "FedSQ", comm_round=2))
    assert fingerprint(models[1]) == fingerprint(final(gated))
    shared = models[1]
    for round in (2, 3):
        sums = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in shared.items()}
        for client in range(3):
            model = network()
            model.load_state_dict(shared)
            torch.manual_seed(derive("local", 0, round, client))
            optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
            for x, labels in data[5][client]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
                optimizer.step()
            for key, value in model.state_dict().items():
                sums[key] += data[4][client] * value.double()
        means = {key: value / 80 for key, value in sums.items()}
        shared = State(
            (k, (means[k] if v.is_floating_point() else means[k].round()).to(v.dtype)) for k, v in shared.items()
        )
        assert fingerprint(models[round]) == fingerprint(shared)


def test_unfrozen_from_the_start_but_one_round_differs_from_fixed(fedml: Any, make_args: MakeArgs) -> None:
    prints = {
        way: fingerprint(final(simulate(fedml, args_for(make_args, "FedSQ", structural_copy=way))))
        for way in ("fixed", "refresh", "ema", "unfreeze")
    }
    assert len(set(prints.values())) == 4


@pytest.mark.parametrize("per_round", [3, 2])
@pytest.mark.parametrize("way", ["refresh", "ema", "unfreeze"])
def test_gates_that_are_kept_follow_the_structural_copy(
    way: str, per_round: int, fedml: Any, make_args: MakeArgs
) -> None:
    options = {"structural_copy": way, "comm_round": 4, "client_num_per_round": per_round}
    states = [
        final(simulate(fedml, args_for(make_args, "FedSQ", keep_gates=keep, **options))) for keep in (False, True)
    ]
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.parametrize("way", ["refresh", "ema"])
def test_the_fingerprint_that_a_checkpoint_names_is_that_of_its_structural_copy(
    way: str, fedml: Any, make_args: MakeArgs
) -> None:
    run = simulate(fedml, args_for(make_args, "FedSQ", structural_copy=way))
    assert run.server.structural_fingerprint == fingerprint(structural(run.aggregator))

"""Rounds in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.messages import Assignment
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.federation.seeding import sample_clients
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.simulation import LocalSilos, Simulation
from fedsq_plugin.federation.simulation import test_seeded as evaluate_seeded
from fedsq_plugin.federation.state import fingerprint, nbytes, state_of
from fedsq_plugin.federation.task import CLASSIFICATION
from fedsq_plugin.federation.training import LocalTraining
from tests.algorithms.task import SILOS, Federation, changed, mlp, silos


class Watched(Federation):
    """Notes what the loop calls."""

    def __init__(self, *given: Any, rounds: int = 3, **options: Any) -> None:
        super().__init__(*given, **options)
        self.rounds = rounds
        self.calls: list[tuple[str, int]] = []
        self.records: list[RoundRecord] = []
        self.on_round = self.noted

    def noted(self, record: RoundRecord) -> None:
        self.calls.append(("on_round", record.round))
        self.records.append(record)

    def evaluate(self, record: RoundRecord) -> bool:
        self.calls.append(("evaluate", record.round))
        record.metrics = evaluate(self.model(), self.data[0]) if record.round % 2 else None
        return record.metrics is not None

    def report(self, record: RoundRecord) -> None:
        self.calls.append(("report", record.round))

    def after_round(self, record: RoundRecord) -> None:
        self.calls.append(("after_round", record.round))


ORDER = ["evaluate", "report", "on_round", "after_round"]


def test_rounds_are_run_and_told_in_their_order() -> None:
    found = Watched("FedAvg")
    found.run_rounds()
    assert found.calls == [(what, round) for round in (1, 2, 3) for what in ORDER]
    assert found.own_server.state.round == 3


def test_loop_is_the_round_repeated() -> None:
    found = Watched("FedSQ+FedMR")
    found.run_rounds()
    other = Federation("FedSQ+FedMR").repeat(3)
    assert fingerprint(found.own_server.state.tensors()) == fingerprint(other.own_server.state.tensors())


def test_record_has_seconds_and_bytes_of_every_round() -> None:
    found = Watched("FedAvg")
    found.run_rounds()
    whole = SILOS * nbytes(state_of(mlp()))
    assert [(record.bytes_up, record.bytes_down) for record in found.records] == [(whole, whole)] * 3
    assert all(record.seconds > 0 for record in found.records)
    assert [record.seconds_evaluation > 0 for record in found.records] == [True, False, True]


def test_run_goes_on_from_a_round() -> None:
    whole, second = Watched("FedRep"), Watched("FedRep")
    first = Federation("FedRep").repeat(2)
    second.own_server.state = first.own_server.state
    second.client.resume(first.own_server.state, first.client.states.tensors())
    second.run_rounds(2)
    whole.run_rounds()
    assert [record.round for record in second.records] == [3]
    assert fingerprint(second.state) == fingerprint(whole.state)


def test_silos_are_those_that_are_drawn() -> None:
    found, other = Watched("FedAvg", data=silos(5)), Federation("FedAvg", data=silos(5))
    found.draw = lambda round: sample_clients(5, 2, round, seed=4)
    found.run_rounds()
    for round in range(3):
        other.round(sample_clients(5, 2, round, seed=4))
    assert fingerprint(found.state) == fingerprint(other.state)


def test_silo_without_samples_is_skipped_and_noted() -> None:
    found, other = Watched("FedAvg", data=[*silos(), []]), Watched("FedAvg")
    found.run_rounds(), other.run_rounds()
    assert [record.notes for record in found.records] == [
        [f"round {round}: silo 3 has no samples and is skipped"] for round in (1, 2, 3)
    ]
    assert fingerprint(found.state) == fingerprint(other.state)


def broken(found: Simulation, silo: int) -> None:
    """Let a silo's answer hold a NaN."""
    train = found.silos.train

    def trained(one: int, round: int, assignment: Assignment) -> Mapping[str, Tensor]:
        answer = dict(train(one, round, assignment))
        if one == silo:
            answer["0.weight"] = answer["0.weight"] * float("nan")
        return answer

    found.silos.train = trained  # type: ignore[method-assign]


def test_refused_update_is_noted_and_the_run_goes_on() -> None:
    found = Watched("FedAvg")
    broken(found, 1)
    found.run_rounds()
    assert [record.notes for record in found.records] == [
        [f"round {round}: the update of silo 1 is refused: 0.weight has NaN or infinite values"] for round in (1, 2, 3)
    ]
    assert all(torch.isfinite(value).all() for value in found.state.values())


def test_refused_update_ends_the_run_where_it_is_fatal() -> None:
    found = Watched("FedAvg")
    found._fatal = "nonfinite: fail"
    broken(found, 1)
    with pytest.raises(UpdateError, match=r"silo 1 is refused: .* \(nonfinite: fail\)$"):
        found.run_rounds()
    assert found.records == []


def test_own_models_are_tested_after_a_fine_tuning() -> None:
    found = Federation("FedRep").repeat(2)
    shown = dict(enumerate(found.own_server.show(range(SILOS))))
    before = fingerprint(found.client.states.tensors())
    for epochs in (0, 2):
        metrics = found.test_silos(shown, epochs)
        assert metrics == {silo: found.own(silo, epochs) for silo in range(SILOS)}
    assert fingerprint(found.client.states.tensors()) == before


def test_fine_tuning_of_the_head_leaves_the_body() -> None:
    options, data = changed(), dict(enumerate(silos()))
    federation = Federation("FedAvg")
    client = Client(mlp(), federation.algorithm, options, LocalTraining(learning_rate=0.1), 0)
    found = LocalSilos(client, data, data, head_only=True)
    found.test(0, Assignment(federation.state), 2)
    moved = {key for key, value in client.model.state_dict().items() if not torch.equal(value, federation.state[key])}
    assert moved == {"3.weight", "3.bias"}


class Drawing(nn.Module):
    """Draws while it is tested."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 2)


def test_a_test_repeats_under_its_seed_and_leaves_the_generators_alone() -> None:
    def tested(seed: int | None) -> object:
        return evaluate_seeded(Drawing(), silos()[0], "cpu", CLASSIFICATION, seed)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert tested(1) == tested(1)
    assert torch.equal(torch.rand(1), expected)
    assert tested(1) != tested(2)
    assert tested(None) == tested(0)


def test_a_servers_own_class_may_stand_in_for_ours() -> None:
    """The loop asks a server only for what a round needs."""

    class Counted(Server):
        assigned = 0

        def assign(self, silos: Any) -> list[Assignment]:
            self.assigned += len(silos)
            return super().assign(silos)

    found = Watched("FedAvg")
    own = Counted(found.algorithm, changed(), found.state, found.own_server.roles, 0)
    found.server = own
    found.evaluate = lambda record: False  # type: ignore[method-assign]
    found.run_rounds()
    assert (own.assigned, own.state.round) == (3 * SILOS, 3)

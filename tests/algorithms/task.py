"""Federations on the core alone: no host, a few silos, a task that no linear model solves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import Algorithm, FederationOptions, algorithm
from fedsq_plugin.algorithms.registry import builtin, builtin_options
from fedsq_plugin.data.partition import partition
from fedsq_plugin.federation.algorithm import options_together
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.evaluate import Metrics, evaluate
from fedsq_plugin.federation.messages import Assignment, Update, packed, unpacked, update_of
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.federation.roles import roles
from fedsq_plugin.federation.round import Round
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.server_state import load_state
from fedsq_plugin.federation.simulation import LocalSilos, Simulation
from fedsq_plugin.federation.state import State, state_of
from fedsq_plugin.federation.training import LocalTraining

SILOS = 3
Batches = list[tuple[Tensor, Tensor]]
AllOptions: Any = options_together(FederationOptions, builtin_options())
"""The options of all algorithms together."""


def values(choice: str) -> dict[str, Any]:
    """All values of a choice that the algorithms of this package make, by name."""
    return {(value := getattr(one, choice)).name: value for one in builtin().values()}


def corners(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four clouds around (±1, ±1); the class is whether the signs agree."""
    with isolated(seed):
        signs = torch.randint(2, (samples, 2)) * 2 - 1
        return signs + 0.3 * torch.randn(samples, 2), (signs.prod(1) > 0).long()


def mlp() -> nn.Module:
    with isolated(0):
        return nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


OPTIONS: Any = AllOptions(epochs=2, head="3", frozen_modules=("0", "1"), server_lr=0.1)
"""For `mlp`, whatever the algorithm; 0.1 for the algorithms with a server optimizer of few rounds."""


def changed(**options: Any) -> Any:
    """`OPTIONS` with these."""
    return OPTIONS.model_copy(update=options)


@functools.cache
def silos(count: int = SILOS) -> list[Batches]:
    x, labels = corners(80 * count, seed=1)
    return [
        [(x[part[i : i + 16]], labels[part[i : i + 16]]) for i in range(0, len(part), 16)]
        for part in partition(labels.numpy(), count, "hetero", 1.0, seed=0, min_size=20)
    ]


class Federation(Simulation):
    """The loop of one process on this task, with its messages kept.

    `sent` and `answers` are the messages of all rounds, by round and silo.
    """

    def __init__(
        self,
        chosen: str | Algorithm,
        model: nn.Module | None = None,
        options: Any = OPTIONS,
        data: Sequence[Batches] | None = None,
        training: LocalTraining = LocalTraining(learning_rate=0.1, momentum=0.9),  # noqa: B008
        seed: int = 0,
    ) -> None:
        self.algorithm = algorithm(chosen) if isinstance(chosen, str) else chosen
        view = self.algorithm.view.make(model or mlp(), options)
        self.client = Client(view, self.algorithm, options, training, seed)
        self.data = silos() if data is None else data
        batches = dict(enumerate(self.data))
        samples = {silo: sum(len(labels) for _, labels in part) for silo, part in batches.items()}
        self.own_server = Server(self.algorithm, options, state_of(view), roles(view, options.head), seed)
        super().__init__(
            self.own_server,
            LocalSilos(self.client, batches, batches),
            samples,
            rounds=1,
            draw=lambda number: sorted(batches),
        )
        self.sent: list[dict[int, State]] = []
        self.answers: list[dict[int, State]] = []

    @property
    def state(self) -> State:
        return self.own_server.state.model

    def repeat(self, count: int, visits: int = 1) -> Federation:
        """So many rounds of all silos, visited forwards (1) or backwards (-1)."""
        for _ in range(count):
            self.round(range(len(self.data)), visits)
        return self

    def round(self, clients: Iterable[int], visits: int = 1, lost: Sequence[int] = ()) -> RoundRecord:
        """One round of the core; the updates of `lost` do not arrive."""
        number, record = self.own_server.state.round, RoundRecord(self.own_server.state.round + 1)
        current = Round(self.server, list(clients), self.samples, record)
        self.sent.append({silo: packed(sent) for silo, sent in current.assignments.items()})
        self.answers.append({})
        for silo in current.silos[::visits]:
            answer = self.answer(silo, self.sent[-1][silo], number)
            self.answers[-1][silo] = answer
            if silo not in lost:
                current.take(silo, answer)
        current.close()
        assert not record.notes
        return record

    def update(self, silo: int, answer: State) -> Update:
        return update_of(silo, self.samples[silo], answer)

    def answer(self, silo: int, message: Mapping[str, Tensor], round: int) -> State:
        return State(self.silos.train(silo, round, unpacked(message)))

    def model(self) -> nn.Module:
        """The global model, under the structural copy that the server means."""
        model = copy.deepcopy(self.client.model)
        load_state(model, self.own_server.state)
        return model

    def accuracy(self) -> float:
        return evaluate(self.model(), [corners(400, seed=2)]).accuracy

    def own(self, silo: int, epochs: int = 0, head_only: bool = False) -> Metrics:
        """A silo's own model on its own data."""
        self.client.receive(Assignment(self.own_server.travelling(self.state)))
        self.client.personalise(silo, self.data[silo], epochs, head_only)
        return evaluate(self.client.model, self.data[silo])

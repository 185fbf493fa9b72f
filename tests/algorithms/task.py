"""Federations on the core alone: no host, a few clients, a task that no linear model solves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import Algorithm, algorithm
from fedsq_plugin.algorithms.options import Options
from fedsq_plugin.algorithms.view import VIEWS
from fedsq_plugin.data.partition import partition
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.federation.client import Worker
from fedsq_plugin.federation.evaluate import Metrics, evaluate
from fedsq_plugin.federation.local import LocalTraining, trains
from fedsq_plugin.federation.messages import Update, packed, unpacked, update_of, with_sums
from fedsq_plugin.federation.roles import roles
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.server import Coordinator
from fedsq_plugin.federation.state import State, state_of
from fedsq_plugin.federation.updates import problem

SILOS = 3
Batches = list[tuple[Tensor, Tensor]]


def corners(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four clouds around (±1, ±1); the class is whether the signs agree."""
    with isolated(seed):
        signs = torch.randint(2, (samples, 2)) * 2 - 1
        return signs + 0.3 * torch.randn(samples, 2), (signs.prod(1) > 0).long()


def mlp() -> nn.Module:
    with isolated(0):
        return nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


OPTIONS = Options(epochs=2, head="3", frozen_modules=("0", "1"), server_lr=0.1)
"""For `mlp`, whatever the row; 0.1 for the rows with a server optimizer of few rounds."""


@functools.cache
def silos(count: int = SILOS) -> list[Batches]:
    x, labels = corners(80 * count, seed=1)
    return [
        [(x[part[i : i + 16]], labels[part[i : i + 16]]) for i in range(0, len(part), 16)]
        for part in partition(labels.numpy(), count, "hetero", 1.0, seed=0, min_size=20)
    ]


class Federation:
    """The rounds of a host: messages packed on both ways, every update checked.

    `sent` and `answers` are the messages of all rounds, by round and client.
    """

    def __init__(
        self,
        row: str | Algorithm,
        model: nn.Module | None = None,
        options: Options = OPTIONS,
        data: Sequence[Batches] | None = None,
        training: LocalTraining = LocalTraining(learning_rate=0.1, momentum=0.9),  # noqa: B008
        seed: int = 0,
    ) -> None:
        self.row = algorithm(row) if isinstance(row, str) else row
        view = VIEWS[self.row.view](model or mlp(), options)
        known, gated = roles(view, options.head), isinstance(view, DualCopy)
        self.coordinator = Coordinator(self.row, options, state_of(view), known, seed, gated)
        self.worker = Worker(view, self.row, options, training, seed)
        self.data = silos() if data is None else data
        self.sent: list[dict[int, State]] = []
        self.answers: list[dict[int, State]] = []

    @property
    def state(self) -> State:
        return self.coordinator.state.model

    def rounds(self, count: int, visits: int = 1) -> Federation:
        """So many rounds of all clients, visited forwards (1) or backwards (-1)."""
        for _ in range(count):
            self.round(range(len(self.data)), visits)
        return self

    def round(self, clients: Iterable[int], visits: int = 1, lost: Sequence[int] = ()) -> None:
        """One round; the updates of `lost` do not arrive."""
        clients, coordinator = list(clients), self.coordinator
        number = coordinator.state.round
        coordinator.next_round()
        sent = dict(zip(clients, map(packed, coordinator.assign(clients)), strict=True))
        answers = {client: self.answer(client, sent[client], number) for client in clients[::visits]}
        expected, sums = coordinator.expected, coordinator.expected_sums
        gathering = coordinator.begin(clients)
        for client in clients:
            if client in lost:
                continue
            update = self.update(client, answers[client])
            assert problem(update, expected, sums) is None
            gathering.add(update)
        coordinator.state = gathering.finish()
        self.sent.append(sent)
        self.answers.append(answers)

    def update(self, client: int, answer: State) -> Update:
        return update_of(client, sum(len(labels) for _, labels in self.data[client]), answer)

    def receive(self, message: State) -> None:
        """What a client does with what it is sent."""
        assignment = unpacked(message)
        self.worker.model.load_state_dict(assignment.state, strict=False)
        if assignment.structural is not None:
            self.worker.follow(assignment.structural)

    def answer(self, client: int, message: State, round: int) -> State:
        self.receive(message)
        result = self.worker.train(client, self.data[client], round)
        state = state_of(self.worker.model) if trains(self.worker.parts(round)) else {}
        return with_sums(self.coordinator.travelling(state), result.sums)

    def model(self) -> nn.Module:
        """The global model, under the structural copy that the server means."""
        model, state = copy.deepcopy(self.worker.model), self.coordinator.state
        model.load_state_dict(state.model)
        if isinstance(model, DualCopy) and state.structural is not None:
            model.refresh(state.structural)
        return model

    def accuracy(self) -> float:
        return evaluate(self.model(), [corners(400, seed=2)]).accuracy

    def own(self, client: int, epochs: int = 0, head_only: bool = False) -> Metrics:
        """A client's own model on its own data."""
        coordinator, worker = self.coordinator, self.worker
        worker.model.load_state_dict(coordinator.travelling(self.state), strict=False)
        worker.personalise(client, self.data[client], epochs, head_only)
        return evaluate(worker.model, self.data[client])

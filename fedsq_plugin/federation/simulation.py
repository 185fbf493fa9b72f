"""Rounds in one process: the silos train one after the other. Tests, benchmarks and FedML's `sp` run this loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .client import Client
from .evaluate import Metrics, evaluate
from .messages import Assignment
from .record import RoundRecord
from .reseeding import reseed
from .round import Round, RoundServer, skip_empty
from .seeding import derive, isolated
from .task import CLASSIFICATION, Batches, Task


class Silos(Protocol):
    """The silos that a process serves."""

    def train(self, silo: int, round: int, assignment: Assignment) -> Mapping[str, Tensor]:
        """Train a round (0-based) of a silo: its answer."""

    def test(self, silo: int, assignment: Assignment, epochs: int) -> Metrics:
        """The silo's own model on its own test data, after a fine-tuning of so many epochs."""


class LocalSilos:
    """Silos whose data are in this process, trained by one client.

    Args:
        train, test: the batches of every silo.
        head_only: the fine-tuning trains the head alone.
    """

    def __init__(
        self,
        client: Client,
        train: Mapping[int, Batches],
        test: Mapping[int, Batches],
        device: torch.device | str = "cpu",
        task: Task = CLASSIFICATION,
        head_only: bool = False,
    ) -> None:
        self.client, self._train, self._test = client, train, test
        self._device, self._task, self._head_only = device, task, head_only

    def train(self, silo: int, round: int, assignment: Assignment) -> Mapping[str, Tensor]:
        self.client.receive(assignment)
        result = self.client.train(silo, self._train[silo], round, self._device)
        return self.client.answer(round, result.sums)

    def test(self, silo: int, assignment: Assignment, epochs: int) -> Metrics:
        self.client.receive(assignment)
        self.client.personalise(silo, self._train[silo], epochs, self._head_only, self._device)
        return test_seeded(self.client.model, self._test[silo], self._device, self._task, self.client.seed)


def test_seeded(
    model: nn.Module, batches: Batches | None, device: torch.device | str, task: Task, seed: int | None
) -> Metrics:
    """Evaluate under the run's seed for tests: a loader or a model may draw while it is tested. Without test data
    (None), the metrics are NaN."""
    batches = () if batches is None else batches
    own = derive("test", 0 if seed is None else seed)
    reseed(batches, derive("loader", own))
    with isolated(own):
        return evaluate(model, batches, device, *task)


class Simulation:
    """A run in one process. A host overrides what it does in its own way.

    Args:
        samples: of every silo: its weight in the mean.
        rounds: of the run.
        draw: the silos of a round (0-based).
        fatal: see `Round`.
    """

    def __init__(
        self,
        server: RoundServer,
        silos: Silos,
        samples: Mapping[int, float],
        rounds: int,
        draw: Callable[[int], Sequence[int]],
        fatal: str | None = None,
    ) -> None:
        self.server, self.silos, self.samples = server, silos, samples
        self.rounds, self.draw, self._fatal = rounds, draw, fatal
        self.on_round: Callable[[RoundRecord], None] = lambda record: None

    def run_rounds(self, start: int = 0) -> None:
        """The rounds from `start` (0-based) to the last."""
        for number in range(start, self.rounds):
            record = RoundRecord(number + 1)
            started = time.perf_counter()
            self.run_round(number, record)
            record.seconds = time.perf_counter() - started
            started = time.perf_counter()
            if self.evaluate(record):
                record.seconds_evaluation = time.perf_counter() - started
            self.report(record)
            self.on_round(record)
            self.after_round(record)

    def run_round(self, number: int, record: RoundRecord) -> None:
        """Train the silos of a round (0-based), and let the server take its step."""
        silos = skip_empty(self.draw(number), self.samples, record)
        current = Round(self.server, silos, self.samples, record, self._fatal)
        for silo, assignment in current.assignments.items():
            current.take(silo, self.silos.train(silo, number, assignment))
        current.close()

    def evaluate(self, record: RoundRecord) -> bool:
        """Write a round's metrics into the record. Returns whether the round is one that is evaluated."""
        return False

    def report(self, record: RoundRecord) -> None:
        """Tell the host's log of a round."""

    def after_round(self, record: RoundRecord) -> None:
        """What follows when everybody has been told of a round, as a checkpoint."""

    def test_silos(self, assignments: Mapping[int, Assignment], epochs: int) -> dict[int, Metrics]:
        """Every silo's own model on its own test data, after a fine-tuning of so many epochs."""
        return {silo: self.silos.test(silo, sent, epochs) for silo, sent in assignments.items()}

"""The global model, measured and reported as FedML's users expect it, on every road."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fedml import mlops

from ...dualcopy import DualCopy
from ...federation.evaluate import Metrics, evaluate
from ...federation.messages import packed
from ...federation.record import RoundRecord
from ...federation.seeding import derive, isolated
from ...federation.state import State, fingerprint
from ...run.plan import Plan
from .adapters import FedSQAggregator

log = logging.getLogger(__name__)


def structural_fingerprint(model: Any) -> str | None:
    """Of the structural copy that a model has now; None without one."""
    if not isinstance(model, DualCopy) or model.unfrozen:
        return None
    return fingerprint(model.structural.state_dict())


class Scoring:
    """Tests the aggregator's model. A user's aggregator tests by its own measure; (accuracy, loss, …) is what
    FedML expects of it."""

    def __init__(
        self,
        plan: Plan,
        args: Any,
        device: Any,
        aggregator: Any,
        test: tuple[Any, int],
        silos: tuple[Any, Any],
    ) -> None:
        self._plan, self._args, self._device, self._aggregator = plan, args, device, aggregator
        (self._test, self._samples), self._silos = test, silos

    def is_due(self, round: int) -> bool:
        """Whether a round (1-based) is one of those that are tested."""
        args = self._args
        return bool((round - 1) % args.frequency_of_the_test == 0 or round == args.comm_round)

    def evaluate(self) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test set: as trained, and as its quantitative copy alone."""
        model, seed = self._aggregator.model, derive("test", self._plan.config.random_seed)
        if not isinstance(self._aggregator, FedSQAggregator):
            with isolated(seed):
                tested = self._aggregator.test(self._test, self._device, self._args)
            if not isinstance(tested, tuple):
                return None, None
            return Metrics(tested[1], tested[0], self._samples), None
        with isolated(seed):
            metrics = evaluate(model, self._test, self._device, *self._plan.task)
        if not isinstance(model, DualCopy):
            return metrics, metrics
        with isolated(seed):
            return metrics, evaluate(model.quantitative, self._test, self._device, *self._plan.task)

    def score(self, record: RoundRecord) -> None:
        """Let FedML's own test run, and measure the global model."""
        self._aggregator.test_all(*self._silos, self._device, self._args)
        record.metrics, record.released = self.evaluate()

    def global_messages(self, silos: Sequence[int]) -> dict[int, State]:
        """What each silo needs of the global model to have its own."""
        shown = self._aggregator.coordinator.show(silos)
        return {silo: packed(assignment) for silo, assignment in zip(silos, shown, strict=True)}

    def report(self, record: RoundRecord) -> None:
        """To FedML's log, its tracking and W&B."""
        mlops.log_round_info(self._args.comm_round, record.round - 1)
        if record.metrics is None:
            return
        loss, accuracy, _ = record.metrics
        logged = {"Test/Acc": accuracy, "Test/Loss": loss, "round": record.round - 1}
        mlops.log(logged)
        if self._args.enable_wandb:
            import wandb

            wandb.log(logged)
        silos = f", silos {record.silos.accuracy:.4f}" if record.silos else ""
        if record.by_silo:
            parts = (f"{silo}: {found.accuracy:.4f}" for silo, found in record.by_silo.items())
            silos += f" ({', '.join(parts)})"
        released = f", released {record.released.accuracy:.4f}" if record.released else ""
        log.info(
            "%s round %d/%d: test %s %.4f%s%s, loss %.4f",
            self._plan.algorithm.name, record.round, self._args.comm_round, self._plan.task.metric.name,
            accuracy, released, silos, loss,
        )  # fmt: skip

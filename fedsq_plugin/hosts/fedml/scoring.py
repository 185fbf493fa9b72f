"""The global model, tested and reported as FedML's users expect it, on one process and on several."""

from __future__ import annotations

import logging
from typing import Any

from fedml import mlops

from ...data.silos import SilosData
from ...federation.evaluate import Metrics
from ...federation.record import RoundRecord
from ...run.plan import Plan
from .sides import ServerSide

log = logging.getLogger(__name__)


class Scoring:
    """Tests the global model."""

    def __init__(self, plan: Plan, args: Any, device: Any, side: ServerSide, data: SilosData) -> None:
        self._plan, self._args, self._device, self._side, self._data = plan, args, device, side, data

    def is_due(self, round: int) -> bool:
        """Whether a round (1-based) is tested."""
        args = self._args
        return bool((round - 1) % args.frequency_of_the_test == 0 or round == args.comm_round)

    def evaluate(self) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test data: as trained, and released (the quantitative copy alone, with its own
        gates)."""
        return self._side.test(self._data.global_test, self._data.global_test_size, self._device)

    def score(self, record: RoundRecord) -> None:
        """Let FedML's own test run, and measure the global model."""
        self._side.aggregator.test_all(self._data.train, self._data.test, self._device, self._args)
        record.metrics, record.released = self.evaluate()

    def report(self, record: RoundRecord) -> None:
        """Report to FedML's log, its tracking and W&B."""
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
            found = (f"{silo}: {metrics.accuracy:.4f}" for silo, metrics in record.by_silo.items())
            silos += f" ({', '.join(found)})"
        released = f", released {record.released.accuracy:.4f}" if record.released else ""
        log.info(
            "%s round %d/%d: test %s %.4f%s%s, loss %.4f",
            self._plan.algorithm.name, record.round, self._args.comm_round, self._plan.task.metric.name,
            accuracy, released, silos, loss,
        )  # fmt: skip

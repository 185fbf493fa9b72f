"""The global model, tested and reported as FedML's users expect it, on one process and on several."""

from __future__ import annotations

import logging
from typing import Any

from fedml import mlops

from ...data.silos import SilosData
from ...dualcopy import DualCopy
from ...federation.evaluate import Metrics
from ...federation.record import RoundRecord
from ...federation.seeding import derive, isolated
from ...federation.simulation import test_seeded
from ...run.plan import Plan
from .adapters import is_ours

log = logging.getLogger(__name__)


class Scoring:
    """Tests the model of an aggregator."""

    def __init__(self, plan: Plan, args: Any, device: Any, aggregator: Any, data: SilosData) -> None:
        self._plan, self._args, self.device, self.aggregator, self.data = plan, args, device, aggregator, data

    def is_due(self, round: int) -> bool:
        """Whether a round (1-based) is tested."""
        args = self._args
        return bool((round - 1) % args.frequency_of_the_test == 0 or round == args.comm_round)

    def evaluate(self) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test data: as trained, and released (the quantitative copy alone, with its own
        gates)."""
        batches, model, seed = self.data.global_test, self.aggregator.model, self._plan.config.random_seed
        if not is_ours(self.aggregator):
            with isolated(derive("test", seed)):
                tested = self.aggregator.test(batches, self.device, self.aggregator.args)
            # (accuracy, loss, …) is what FedML expects of an aggregator.
            known = isinstance(tested, tuple)
            return (Metrics(tested[1], tested[0], self.data.global_test_size) if known else None), None
        metrics = test_seeded(model, batches, self.device, self._plan.task, seed)
        if not isinstance(model, DualCopy):
            return metrics, metrics
        return metrics, test_seeded(model.quantitative, batches, self.device, self._plan.task, seed)

    def score(self, record: RoundRecord) -> None:
        """Let FedML's own test run, and measure the global model."""
        self.aggregator.test_all(self.data.train, self.data.test, self.device, self._args)
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

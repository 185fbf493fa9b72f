"""The global model, tested and reported as FedML's users expect it, on one process and on several."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fedml import mlops
from torch import Tensor, nn

from ...data.silos import SilosData
from ...dualcopy import DualCopy
from ...errors import FedSQError, in_one_line
from ...federation.evaluate import Metrics, evaluating
from ...federation.reading import Reading, call
from ...federation.record import RoundRecord
from ...federation.seeding import derive, isolated
from ...federation.simulation import test_seeded
from ...federation.task import CLASSIFICATION, counts
from ...run.plan import Plan
from .adapters import is_ours, trains_as_ours

log = logging.getLogger(__name__)


def no_classification(model: nn.Module, data: SilosData, device: Any, reading: Reading, ignored: int) -> str | None:
    """Why cross-entropy and accuracy are not what a model's outputs on the test data are for; None where they are.

    Decided by the first batch: labels (N, …) are class numbers or `ignored`, and outputs (N, classes, …) have a column
    for each of the data set's classes.
    """
    try:
        with evaluating(model, device), torch.no_grad(), isolated(0):
            first = next(iter(data.global_test or ()), None)
            if first is None:
                return None
            inputs, labels = reading.read(first).to(device)
            return _misfit(reading.prediction(call(model, inputs)), labels, data.outputs, ignored)
    except FedSQError as error:
        return str(error)
    except Exception as error:  # whatever a model raises that only the user's trainer can call
        return f"the model cannot be called with a test batch: {in_one_line(error)}"


def _misfit(outputs: Tensor, labels: Tensor, classes: Any, ignored: int) -> str | None:
    if outputs.dim() < 2 or (len(outputs), *outputs.shape[2:]) != tuple(labels.shape):
        return f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} are not those of a classification"
    columns, known = outputs.shape[1], labels[counts(labels, ignored)].double()
    if not torch.equal(known, known.round()) or bool((known < 0).any()):
        return "labels are no class numbers"
    if bool((known >= columns).any()):
        return f"label {int(known.max())} is beyond the model's {columns} outputs"
    if columns < 2 or (isinstance(classes, int) and classes > 1 and columns != classes):
        return f"the model has {columns} outputs, and the data set {classes} classes"
    return None


class Scoring:
    """Tests the model of an aggregator.

    Args:
        trainer: the client_trainer of the run; None: ours. What a user's own trains is not known here: where the test
            data do not show that it is a classification, there are no figures, and the plan has a note of it.
    """

    def __init__(
        self, plan: Plan, args: Any, device: Any, aggregator: Any, data: SilosData, trainer: Any = None
    ) -> None:
        self._plan, self._args, self.device, self.aggregator, self.data = plan, args, device, aggregator, data
        self._unknown = None
        if is_ours(aggregator) and not trains_as_ours(trainer) and data.task is CLASSIFICATION:
            ignored = plan.config.ignore_index
            self._unknown = no_classification(aggregator.model, data, device, plan.task.reading, ignored)
        if self._unknown is not None:
            plan.note(
                f"the server reports no figures: what your client_trainer trains cannot be told ({self._unknown}); "
                "pass a server_aggregator with a test of your own"
            )

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
        if self._unknown is not None:
            return None, None
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

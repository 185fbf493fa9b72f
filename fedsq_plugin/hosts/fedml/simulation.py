"""FedML's single-process simulation (`sp`), with the whole life-cycle of trainer and aggregator.

FedML's own loop builds its trainer itself, calls no aggregator, tests every client's training data and
hands the live state of the global model to the first client. The life-cycle here is the one that FedML's
cross-silo back end follows.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

from fedml import mlops
from fedml.simulation.sp.fedavg import FedAvgAPI
from torch import Tensor, nn

from ...algorithms import ALGORITHMS
from ...errors import ConfigError
from ...federation.evaluate import Metrics, pooled
from ...federation.record import RoundRecord
from ...federation.state import clone
from ...run.plan import Plan, in_recipe_terms
from .adapters import FedSQAggregator, FedSQTrainer
from .checkpoints import ServerCheckpoints
from .names import OTHER_LOSSES
from .round import Round, drawn, with_data
from .scoring import Scoring, structural_fingerprint
from .silo import Silos

log = logging.getLogger(__name__)


class Simulation(FedAvgAPI):  # type: ignore[misc]
    """One run in one process. `on_round` is called after every round."""

    def __init__(
        self,
        args: Any,
        device: Any,
        dataset: Any,
        model: nn.Module,
        plan: Plan,
        client_trainer: Any = None,
        server_aggregator: Any = None,
        checkpoints: ServerCheckpoints | None = None,
    ) -> None:
        self.plan, self.checkpoints = plan, checkpoints or ServerCheckpoints(plan)
        self.on_round: Callable[[RoundRecord], None] = lambda record: None
        super().__init__(args, device, dataset, model)
        # The aggregator holds the global model, which the trainer's training must not touch.
        self.model_trainer = client_trainer or FedSQTrainer(model, args, plan)
        self.aggregator = server_aggregator or FedSQAggregator(copy.deepcopy(model), args, plan)
        for part, network in ((client_trainer, model), (server_aggregator, copy.deepcopy(model))):
            if part is not None:
                part.model = network
        sizes, train, test = (
            self.train_data_local_num_dict, self.train_data_local_dict, self.test_data_local_dict,
        )  # fmt: skip
        self.scoring = Scoring(
            plan,
            args,
            device,
            self.aggregator,
            (self.test_global, self.test_data_num_in_total),
            (train, test),
        )
        self.silos = Silos(plan, args, device, self.model_trainer, sizes, train, test)
        if isinstance(self.aggregator, FedSQAggregator):
            _ = self.aggregator.coordinator  # refuses what does not go together before the first round
            ours = isinstance(self.model_trainer, FedSQTrainer)
            self.checkpoints.restore(self.aggregator, self.model_trainer if ours else None)

    @property
    def structural_fingerprint(self) -> str | None:
        """Of the structural copy as it is now; None without one."""
        return structural_fingerprint(self.aggregator.model)

    @property
    def silo_parts(self) -> dict[str, Tensor]:
        """What stayed with each silo, as <silo>/<key>."""
        ours = isinstance(self.model_trainer, FedSQTrainer)
        return self.model_trainer.worker.states.tensors() if ours else {}

    def _setup_clients(self, *_: Any) -> None:
        """Clients are data, here: one trainer serves them in turn."""

    def _client_sampling(self, round_idx: int, *_: int) -> list[int]:
        return drawn(self.plan, self.args, round_idx)

    def run(self) -> None:
        """FedMLRunner's entry."""
        with in_recipe_terms():
            self.train()

    def train(self) -> None:
        args = self.args
        mlops.log_training_status(mlops.ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING)
        mlops.log_aggregation_status(mlops.ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING)
        mlops.log_round_info(args.comm_round, -1)
        self.aggregator.set_id(0)
        for round_idx in range(self.checkpoints.round, args.comm_round):
            args.round_idx = round_idx
            record = RoundRecord(round_idx + 1)
            started = time.perf_counter()
            self._round(record)
            record.seconds = time.perf_counter() - started
            if self.scoring.is_due(record.round):
                started = time.perf_counter()
                self.scoring.score(record)
                self._test_silos(record)
                record.seconds_evaluation = time.perf_counter() - started
            self.scoring.report(record)
            self.on_round(record)
            if isinstance(self.aggregator, FedSQAggregator):
                self.checkpoints.after(self.aggregator.coordinator.state, self.model_trainer)
        # The script's own model object is the trainer's: it ends as the global model.
        ours = isinstance(self.aggregator, FedSQAggregator)
        model = self.aggregator.model.state_dict() if ours else self.aggregator.get_model_params()
        self.model_trainer.set_model_params(clone(model))
        mlops.log_training_finished_status()
        mlops.log_aggregation_finished_status()

    def _round(self, record: RoundRecord) -> None:
        args, sizes = self.args, self.train_data_local_num_dict
        sampled = self._client_sampling(args.round_idx, args.client_num_in_total, args.client_num_per_round)
        silos = with_data(sampled, sizes, record)
        current = Round(self.aggregator, self.plan, silos, sizes, record)
        for silo, message in current.messages.items():
            current.take(silo, self.silos.train(silo, args.round_idx, message))
        current.close()

    def _test_silos(self, record: RoundRecord) -> None:
        plan, last = self.plan, record.round == self.args.comm_round
        if plan.silo_evaluation:
            record.by_silo = self._own_models(epochs=0)
            record.silos = pooled(record.by_silo.values())
        if plan.finetune_epochs and last:
            record.silos_tuned = pooled(self._own_models(plan.finetune_epochs).values())

    def _own_models(self, epochs: int) -> dict[int, Metrics]:
        """Every silo's own model on its own test data, after a fine-tuning of so many epochs."""
        messages = self.scoring.global_messages(list(self.test_data_local_dict))
        return {silo: self.silos.test(silo, message, epochs) for silo, message in messages.items()}


def refuse_foreign(plan: Plan, args: Any, client_trainer: Any, server_aggregator: Any) -> None:
    """Raise ConfigError when a trainer or aggregator of the user's would silently replace a choice, or is
    missing where it is needed."""
    if args.dataset in OTHER_LOSSES and (client_trainer is None or server_aggregator is None):
        raise ConfigError(
            f"{args.dataset} is no classification task; pass a client_trainer and a server_aggregator"
        )
    if getattr(args, "enable_contribution", False):
        raise ConfigError("enable_contribution: this plugin's loops do not assess contributions")
    row, structural = plan.algorithm, plan.options.structural_copy
    for name, part, kind, follows in (
        ("client_trainer", client_trainer, FedSQTrainer, ("objective", "phases", "exchange")),
        ("server_aggregator", server_aggregator, FedSQAggregator, ("phases", "exchange", "server")),
    ):
        if part is None or isinstance(part, kind):
            continue
        wanted = [(choice, getattr(row, choice)) for choice in follows]
        wanted = [found for found in wanted if found[1] != getattr(ALGORITHMS["FedAvg"], found[0])]
        if structural != "fixed" and row.view == "dualcopy":
            wanted.append(("structural_copy", structural))
        if plan.options.buffers != "average" and kind is FedSQAggregator:
            wanted.append(("buffers", plan.options.buffers))
        if wanted:
            raise ConfigError(
                f"{row.name} has {wanted[0][0]} '{wanted[0][1]}', which a {name} of your own does not "
                f"follow; pass none, or a subclass of fedsq_plugin.hosts.fedml.adapters.{kind.__name__}"
            )
        if plan.config.checkpoint_dir is not None:
            raise ConfigError(
                f"checkpoint_dir: what a {name} of your own remembers cannot be written down; pass none, or "
                f"a subclass of fedsq_plugin.hosts.fedml.adapters.{kind.__name__}"
            )
        if plan.silo_evaluation or plan.finetune_epochs:
            raise ConfigError(
                "silo_evaluation and finetune_epochs need the plugin's own trainer and aggregator; "
                f"pass no {name}"
            )

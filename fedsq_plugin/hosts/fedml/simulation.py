"""FedML's single-process simulation (`sp`), with the whole life-cycle of trainer and aggregator.

FedML's own loop builds its trainer itself, calls no aggregator, tests every silo's training data, and hands the live
state of the global model to the first silo. Here the life-cycle is that of FedML's cross-silo back end.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from fedml import mlops
from torch import Tensor, nn

from ...data.silos import SilosData
from ...errors import ConfigError, worded
from ...federation import simulation
from ...federation.checkpoints import ServerCheckpoints
from ...federation.evaluate import Metrics, pooled
from ...federation.record import RoundRecord
from ...federation.server import Server
from ...federation.state import clone, tensors_of
from ...run.plan import RECIPE, Plan
from .adapters import FedSQAggregator, FedSQTrainer, is_ours, server_of
from .aggregation import TheirServer, restore, their_weights
from .names import OTHER_LOSSES
from .scoring import Scoring
from .silo import Silos, draw_silos


class Simulation(simulation.Simulation):
    """One run in one process. `on_round` is called after every round."""

    server: Server | TheirServer
    silos: Silos

    def __init__(
        self,
        args: Any,
        device: Any,
        data: SilosData,
        model: nn.Module,
        plan: Plan,
        client_trainer: Any,
        server_aggregator: Any,
        checkpoints: ServerCheckpoints,
    ) -> None:
        data.refuse_missing(data.sizes)
        self.args, self.plan, self.data, self.checkpoints = args, plan, data, checkpoints
        # The aggregator holds the global model, which the trainer's training must not change.
        for part, network in ((client_trainer, model), (server_aggregator, copy.deepcopy(model))):
            if part is not None:
                part.model = network
        self.model_trainer = client_trainer or FedSQTrainer(model, args, plan)
        self.aggregator = server_aggregator or FedSQAggregator(copy.deepcopy(model), args, plan)
        server, silos = server_of(self.aggregator, plan), Silos(plan, args, device, self.model_trainer, data)

        draw = functools.partial(draw_silos, plan, args)
        super().__init__(server, silos, data.sizes, args.comm_round, draw, plan.fatal)
        self.scoring = Scoring(plan, args, device, self.aggregator, data, client_trainer)
        restore(checkpoints, server, plan, silos.client if checkpoints.resumes else None)

    @property
    def silo_parts(self) -> dict[str, Tensor]:
        """What stayed with each silo, as <silo>/<key>."""
        client = self.silos.client
        return {} if client is None else client.states.tensors()

    def run(self) -> None:
        """FedMLRunner calls this."""
        mlops.log_training_status(mlops.ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING)
        mlops.log_aggregation_status(mlops.ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING)
        mlops.log_round_info(self.rounds, -1)
        self.aggregator.set_id(0)
        with worded(RECIPE):
            self.run_rounds(self.checkpoints.round)
        # The script's own model object is the trainer's: it ends as the global model.
        ours = is_ours(self.aggregator)
        weights = clone(tensors_of(self.aggregator.model)) if ours else their_weights(self.aggregator)
        self.model_trainer.set_model_params(weights)
        mlops.log_training_finished_status()
        mlops.log_aggregation_finished_status()

    def run_round(self, number: int, record: RoundRecord) -> None:
        self.args.round_idx = number
        super().run_round(number, record)

    def evaluate(self, record: RoundRecord) -> bool:
        if not self.scoring.is_due(record.round):
            return False
        self.scoring.score(record)
        if self.plan.silo_evaluation:
            record.by_silo = self._own_models(epochs=0)
            record.silos = pooled(record.by_silo.values())
        if self.plan.finetune_epochs and record.round == self.rounds:
            record.silos_tuned = pooled(self._own_models(self.plan.finetune_epochs).values())
        return True

    def report(self, record: RoundRecord) -> None:
        self.scoring.report(record)

    def after_round(self, record: RoundRecord) -> None:
        self.checkpoints.save(self.server.state, self.silo_parts)

    def _own_models(self, epochs: int) -> dict[int, Metrics]:
        silos = list(self.data.test)
        return self.test_silos(dict(zip(silos, self.server.show(silos), strict=True)), epochs)


def refuse_foreign(plan: Plan, args: Any, client_trainer: Any, server_aggregator: Any) -> None:
    """Raise ConfigError when a trainer or aggregator of the user's would silently replace a choice, or is
    missing where it is needed."""
    if args.dataset in OTHER_LOSSES and (client_trainer is None or server_aggregator is None):
        raise ConfigError(f"{args.dataset} is no classification task; pass a client_trainer and a server_aggregator")
    if getattr(args, "enable_contribution", False):
        raise ConfigError("enable_contribution: this plugin's loops do not assess contributions")
    algorithm, structural = plan.algorithm, plan.config.structural_copy
    for name, part, kind, follows in (
        ("client_trainer", client_trainer, FedSQTrainer, ("objective", "phases", "exchange")),
        ("server_aggregator", server_aggregator, FedSQAggregator, ("phases", "exchange", "server")),
    ):
        if is_ours(part):
            continue
        differs = algorithm.differences()
        wanted = [(choice, differs[choice].name) for choice in follows if choice in differs]
        if structural != "fixed" and algorithm.gated:
            wanted.append(("structural_copy", structural))
        if plan.options.buffers != "average" and kind is FedSQAggregator:
            wanted.append(("buffers", plan.options.buffers))
        if wanted:
            raise ConfigError(
                f"{algorithm.name} has {wanted[0][0]} '{wanted[0][1]}', which a {name} of your own does not "
                f"follow; pass none, or a subclass of fedsq_plugin.hosts.fedml.adapters.{kind.__name__}"
            )
        if plan.config.checkpoint_dir is not None:
            raise ConfigError(
                f"checkpoint_dir: what a {name} of your own remembers cannot be written down; pass none, or "
                f"a subclass of fedsq_plugin.hosts.fedml.adapters.{kind.__name__}"
            )
        if plan.silo_evaluation or plan.finetune_epochs:
            raise ConfigError(
                f"silo_evaluation and finetune_epochs need the plugin's own trainer and aggregator; pass no {name}"
            )

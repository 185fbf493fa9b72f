"""FedML's single-process simulation (`sp`), with the whole life-cycle of trainer and aggregator.

FedML's own loop builds its trainer itself, calls no aggregator, tests every client's training data and
hands the live state of the global model to the first client. The life-cycle here is the one that FedML's
cross-silo back end follows.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedml import mlops
from fedml.simulation.sp.fedavg import FedAvgAPI
from torch import Tensor, nn

from ...dualcopy import DualCopy
from ...errors import ConfigError, UpdateError
from ...federation.evaluate import Metrics, evaluate
from ...federation.record import RoundRecord
from ...federation.seeding import derive, isolated, sample_clients
from ...federation.state import State, clone, fingerprint, nbytes
from ...federation.updates import Update, problem
from .adapters import FedSQAggregator, FedSQTrainer
from .names import OTHER_LOSSES
from .plan import Plan, in_recipe_terms

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
    ) -> None:
        self.plan = plan
        self.on_round: Callable[[RoundRecord], None] = lambda record: None
        if args.dataset in OTHER_LOSSES and (client_trainer is None or server_aggregator is None):
            raise ConfigError(
                f"{args.dataset} is no classification task; pass a client_trainer and a server_aggregator"
            )
        if getattr(args, "enable_contribution", False):
            raise ConfigError("enable_contribution: contribution assessment does not run in FedML's sp")
        super().__init__(args, device, dataset, model)
        # The aggregator holds the global model, which the trainer's training must not touch.
        self.model_trainer = client_trainer or FedSQTrainer(model, args, plan)
        self.aggregator = server_aggregator or FedSQAggregator(copy.deepcopy(model), args, plan)
        for part, network in ((client_trainer, model), (server_aggregator, copy.deepcopy(model))):
            if part is not None:
                part.model = network
        self.structural_fingerprint = (
            fingerprint(model.structural.state_dict()) if isinstance(model, DualCopy) else None
        )

    def _setup_clients(self, *_: Any) -> None:
        """Clients are data, here: one trainer serves them in turn."""

    def _client_sampling(self, round_idx: int, client_num_in_total: int, client_num_per_round: int) -> Any:
        seed = self.plan.config.seed("sampling")
        return sample_clients(client_num_in_total, client_num_per_round, round_idx, seed)

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
        for round_idx in range(args.comm_round):
            args.round_idx = round_idx
            record = RoundRecord(round_idx + 1)
            started = time.perf_counter()
            self._round(record)
            record.seconds = time.perf_counter() - started
            if round_idx % args.frequency_of_the_test == 0 or round_idx == args.comm_round - 1:
                started = time.perf_counter()
                self._evaluate(record)
                record.seconds_evaluation = time.perf_counter() - started
            mlops.log_round_info(args.comm_round, round_idx)
            self.on_round(record)
        # The script's own model object is the trainer's: it ends as the global model.
        self.model_trainer.set_model_params(clone(self.aggregator.get_model_params()))
        mlops.log_training_finished_status()
        mlops.log_aggregation_finished_status()

    def evaluate_global(self) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test set: as trained, and as its quantitative copy alone.

        A user's aggregator tests by its own measure; (accuracy, loss, …) is what FedML expects of it.
        """
        model, seed = self.aggregator.model, derive("test", self.plan.config.random_seed)
        if not isinstance(self.aggregator, FedSQAggregator):
            with isolated(seed):
                tested = self.aggregator.test(self.test_global, self.device, self.args)
            if not isinstance(tested, tuple):
                return None, None
            return Metrics(tested[1], tested[0], self.test_data_num_in_total), None
        with isolated(seed):
            metrics = evaluate(model, self.test_global, self.device)
        if not isinstance(model, DualCopy):
            return metrics, metrics
        with isolated(seed):
            return metrics, evaluate(model.quantitative, self.test_global, self.device)

    def _round(self, record: RoundRecord) -> None:
        aggregator, args = self.aggregator, self.args
        sampled = self._client_sampling(args.round_idx, args.client_num_in_total, args.client_num_per_round)
        clients = [client for client in sampled if self._has_data(client, record)]
        if not clients:
            raise UpdateError(f"round {record.round}: none of the silos {sampled} has a sample to train on")
        weights: State = aggregator.get_model_params()
        ours = isinstance(aggregator, FedSQAggregator)
        if not ours:
            weights = clone(weights)  # perhaps the live state of its model
        record.bytes_down = nbytes(weights) * len(clients)
        rule = aggregator.begin(weights) if ours and aggregator.streams else None
        together: list[tuple[float, Mapping[str, Tensor]]] = []
        accepted = 0
        for client in clients:
            update = Update(
                client, self.train_data_local_num_dict[client], self._train_client(client, weights)
            )
            record.bytes_up += nbytes(update.state)
            if not self._accepts(update, weights, record):
                continue
            accepted += 1
            if rule is None:
                together.append((update.samples, update.state))
            else:
                rule.add(update)
        if not accepted:
            raise UpdateError(f"no update is left to aggregate: {'; '.join(record.notes)}")
        mlops.event("agg", event_started=True, event_value=str(args.round_idx))
        aggregator.set_model_params(rule.finish() if rule else self._aggregate(together))
        mlops.event("agg", event_started=False, event_value=str(args.round_idx))

    def _has_data(self, client: int, record: RoundRecord) -> bool:
        if self.train_data_local_num_dict.get(client) and self.train_data_local_dict.get(client) is not None:
            return True
        self._note(record, f"round {record.round}: silo {client} has no samples and is skipped")
        return False

    def _accepts(self, update: Update, template: State, record: RoundRecord) -> bool:
        """Whether an update may reach the aggregator; if not, it is named and, as the option says, fatal."""
        reason = problem(update, template)
        if reason is None:
            return True
        line = f"round {record.round}: the update of silo {update.client} is refused: {reason}"
        if self.plan.config.nonfinite == "fail":
            raise UpdateError(f"{line} (fedsq_args.nonfinite: fail)")
        self._note(record, line)
        return False

    def _note(self, record: RoundRecord, line: str) -> None:
        record.notes.append(line)
        log.warning(line)

    def _train_client(self, client: int, weights: State) -> State:
        trainer, args = self.model_trainer, self.args
        event = f"{args.round_idx}_{client}"
        mlops.event("train", event_started=True, event_value=event)
        local = (self.train_data_local_dict[client], self.test_data_local_dict.get(client))
        # A user's own trainer draws from the global generators, too.
        with isolated(derive("client", self.plan.config.random_seed, args.round_idx, client)):
            trainer.set_id(client)
            trainer.update_dataset(*local, self.train_data_local_num_dict[client])
            # Ours copies what it is given; another trainer might go on training it.
            trainer.set_model_params(weights if isinstance(trainer, FedSQTrainer) else clone(weights))
            # A data-poisoning attack puts other data into the trainer.
            data = local[0] if trainer.local_train_dataset is None else trainer.local_train_dataset
            trainer.on_before_local_training(data, self.device, args)
            trainer.train(data, self.device, args)
            trainer.on_after_local_training(data, self.device, args)
        mlops.event("train", event_started=False, event_value=event)
        state: State = trainer.get_model_params()
        return state if isinstance(trainer, FedSQTrainer) else clone(state)

    def _aggregate(self, w_locals: Sequence[tuple[float, Mapping[str, Tensor]]]) -> State:
        try:
            accepted, _ = self.aggregator.on_before_aggregation(w_locals)
            result: State = self.aggregator.on_after_aggregation(self.aggregator.aggregate(accepted))
        except ValueError as error:  # a defence that has too few updates left, say
            raise UpdateError(
                f"round {self.args.round_idx + 1}: aggregating {len(w_locals)} updates failed: {error}"
            ) from error
        return result

    def _evaluate(self, record: RoundRecord) -> None:
        args = self.args
        self.aggregator.test_all(self.train_data_local_dict, self.test_data_local_dict, self.device, args)
        record.metrics, record.released = self.evaluate_global()
        if record.metrics is None:
            return
        loss, accuracy, _ = record.metrics
        logged = {"Test/Acc": accuracy, "Test/Loss": loss, "round": args.round_idx}
        mlops.log(logged)
        if args.enable_wandb:
            import wandb

            wandb.log(logged)
        released = f", released {record.released.accuracy:.4f}" if record.released else ""
        log.info(
            "%s round %d/%d: test accuracy %.4f%s, loss %.4f",
            self.plan.algorithm.name, record.round, args.comm_round, accuracy, released, loss,
        )  # fmt: skip

"""Our trainer and aggregator, in FedML's base classes.

Counters (BatchNorm's number of batches), masks with infinite entries and what travels beside the weights never pass
through FedML's attack, defence and privacy code: its noise and clipping break on integers, and a norm that counts
batches would clip nothing else.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedml.core import ClientTrainer, ServerAggregator
from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
from fedml.core.security.fedml_defender import FedMLDefender
from torch import Tensor, nn

from ...data.silos import SilosData
from ...errors import UpdateError
from ...federation.algorithm import AVERAGE, EVERYTHING
from ...federation.client import Client
from ...federation.evaluate import evaluate
from ...federation.mean import WeightedMean
from ...federation.messages import unpacked, update_of
from ...federation.roles import NORMALISATION, Role, with_roles
from ...federation.server import Server, add_sums
from ...federation.server_state import ServerState
from ...federation.simulation import test_seeded
from ...federation.state import State, check_finite, clone
from ...federation.task import CrossEntropy
from ...run.plan import Plan
from .aggregation import OurServer, TheirServer
from .security import security_enabled
from .weights import take_weights

log = logging.getLogger(__name__)


class FedSQTrainer(ClientTrainer):  # type: ignore[misc]
    """A silo's side, for every algorithm."""

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self.plan = plan
        self._client: Client | None = None
        self._only_floats = False
        self._sums: Mapping[str, Tensor] = {}
        self._round: int | None = None

    def follow(self, plan: Plan) -> None:
        """Train by another plan from now on."""
        self.plan, self._client = plan, None

    @property
    def client(self) -> Client:
        """Made when it is first used, and again for another model: FedML replaces a trainer's model."""
        if self._client is None or self._client.model is not self.model:
            plan, config = self.plan, self.plan.config
            self._client = Client(
                self.model,
                plan.algorithm,
                plan.options,
                plan.training,
                config.random_seed,
                config.keep_gates,
                config.compile,
                plan.task.loss,
                reading=plan.task.reading,
            )
        return self._client

    def get_model_params(self) -> State:
        """An independent copy of what travels. FedML's own trainer hands out the live state, which the training of
        the next silo would change."""
        if self._only_floats:
            return screened(self.client.travelling(), self.client.roles)
        if self._round is None:
            return self.client.travelling()
        return self.client.answer(self._round, self._sums)

    def set_model_params(self, model_parameters: Mapping[str, Tensor]) -> None:
        """Load what the server sent, or what FedML's attack and privacy code made of the update."""
        self.client.receive(unpacked(model_parameters))

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        result = self.client.train(int(self.id), train_data, args.round_idx, device)
        self._sums, self._round = result.sums, args.round_idx
        if result.lost:
            log.warning(
                "round %d: silo %s lost %d of %d steps to an overflow in fp16",
                args.round_idx + 1, self.id, result.lost, result.steps,
            )  # fmt: skip

    def on_after_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        self._only_floats = True
        try:
            super().on_after_local_training(train_data, device, args)
        finally:
            self._only_floats = False

    def test(self, test_data: Any, device: Any, args: Any) -> dict[str, float]:
        """FedML's sums over samples."""
        metrics = evaluate(self.model, test_data, device, *self.plan.task)
        return {
            "test_correct": metrics.accuracy * metrics.samples if metrics.samples else 0,
            "test_loss": metrics.loss * metrics.samples if metrics.samples else 0,
            "test_total": metrics.samples,
        }


class FedSQAggregator(ServerAggregator):  # type: ignore[misc]
    """The server's side, for every algorithm: FedML's life-cycle of an aggregator around a `Server`."""

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self.plan = plan
        self.positions: Sequence[int] | None = None
        """Positions, in the round's order, of the silos whose updates come as a list; None: all."""
        self._server: OurServer | None = None
        self._begun_with: nn.Module | None = None
        self._after: ServerState | None = None
        self._screened = False
        self._counters: Mapping[str, Tensor] = {}
        self._sums: Mapping[str, Tensor] = {}

    @property
    def server(self) -> Server:
        """Made when it is first used, and again for another model: FedML replaces an aggregator's model."""
        if self._server is None or self._begun_with is not self.model:
            self._server, self._begun_with = OurServer(self), self.model
        return self._server

    @property
    def streams(self) -> bool:
        """Whether updates may be gathered one by one, because nothing needs to see them together."""
        hooks = ("on_before_aggregation", "aggregate", "on_after_aggregation")
        ours = all(getattr(type(self), hook) is getattr(FedSQAggregator, hook) for hook in hooks)
        return ours and not security_enabled()

    def get_model_params(self) -> State:
        """What travels of the global model, without the counters while FedML's code screens it."""
        state = self.server.travelling(self.server.state.model)
        return self._floats(state) if self._screened else clone(state)

    def set_model_params(self, model_parameters: Mapping[str, Tensor]) -> None:
        """Take the result of an aggregation, which FedML's or a subclass's hooks may have changed."""
        state, before = self._after, self.server.state
        self._after = None
        if state is None:  # a subclass aggregates by itself
            if self.plan.algorithm.server is not AVERAGE or not self.server.trains:
                raise UpdateError(
                    f"{type(self).__name__}.aggregate did not call FedSQAggregator.aggregate, without which "
                    f"there is no {self.plan.algorithm.name}"
                )
            state = replace(before, round=before.round + 1)
        weights = take_weights(model_parameters, state.model, f"the hooks of {type(self).__name__}", rounded=True)
        self.server.state = replace(state, model=OrderedDict(state.model, **weights))

    def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
        received = [update_of(n, *update) for n, update in enumerate(raw_client_model_or_grad_list)]
        self._sums = add_sums(update.sums for update in received)
        if not security_enabled():
            return [(update.samples, update.state) for update in received], list(range(len(received)))
        counters = WeightedMean()
        for update in received:
            counters.add(self._only_counters(update.state), update.samples)
        self._counters = counters.result() if self._only_counters(self.server.expected) else {}
        self._screened = True
        # FedML's clipping and attacks write into the tensors that they are given.
        return super().on_before_aggregation([(u.samples, self._floats(u.state)) for u in received])

    def aggregate(self, raw_client_model_or_grad_list: Any) -> State:
        updates = raw_client_model_or_grad_list
        gathered: Any = None
        if self.server.separate:
            positions = range(len(updates)) if self.positions is None else self.positions
            gathered = {
                position: self.server.counted(state) for position, (_, state) in zip(positions, updates, strict=True)
            }
        elif self.server.trains:
            gathered = self.server.counted({**self._mean(updates), **self._counters})
        self._after = self.server.step(gathered, self._sums)
        result = self.server.travelling(self._after.model)
        return self._floats(result) if self._screened else result

    def _mean(self, updates: Any) -> State:
        defender, privacy = FedMLDefender.get_instance(), FedMLDifferentialPrivacy.get_instance()
        if defender.is_defense_enabled():
            mean: State = defender.defend_on_aggregation(
                raw_client_grad_list=updates,
                base_aggregation_func=weighted_mean,
                extra_auxiliary_info=self.get_model_params(),
            )
            return mean
        if privacy.to_compute_params_in_aggregation_enabled():
            privacy.set_params_for_dp(updates)
        return weighted_mean(self.args, updates)

    def on_after_aggregation(self, aggregated_model_or_grad: State) -> State:
        after: State = super().on_after_aggregation(aggregated_model_or_grad)
        if not self._screened:
            return after
        self._screened = False
        variances = {
            f"{path}.running_var" if path else "running_var"
            for path, module in self.model.named_modules()
            if isinstance(module, NORMALISATION)
        }
        whole: State = OrderedDict()
        for key, value in self.server.travelling((self._after or self.server.state).model).items():
            source = after.get(key, value)
            # Noise can make a variance negative; clamping what is published costs no privacy.
            source = source.clamp(min=0) if key in variances else source
            whole[key] = source.to(value.dtype)
        return whole

    def test(self, test_data: Any, device: Any, args: Any) -> tuple[float, float, None, None]:
        seed = self.plan.config.random_seed
        metrics = test_seeded(self.model, test_data, device, self.plan.task, seed)
        return metrics.accuracy, metrics.loss, None, None

    def _only_counters(self, state: Mapping[str, Tensor]) -> State:
        kept_out = self.server.expected.keys() - screened(self.server.expected, self.server.roles).keys()
        return OrderedDict((key, value) for key, value in state.items() if key in kept_out)

    def _floats(self, state: Mapping[str, Tensor]) -> State:
        known = screened(self.server.state.model, self.server.roles)
        return clone({key: value for key, value in state.items() if key in known})


def screened(state: Mapping[str, Tensor], roles: Mapping[str, Role]) -> State:
    """The entries that pass through FedML's attack, defence and privacy code: no counters, and no constant that is not
    finite, as a mask, which would make every norm infinite."""
    floats = with_roles(state, roles, EVERYTHING - {Role.COUNTER})
    return OrderedDict((key, value) for key, value in floats.items() if check_finite(value))


def weighted_mean(args: Any, raw_grad_list: Any) -> State:
    """The sample-weighted mean, with the argument names of FedML's own operator."""
    mean = WeightedMean()
    for samples, state in raw_grad_list:
        if samples:  # a defence gives no weight to what it distrusts
            mean.add(state, samples)
    return mean.result()


def is_ours(part: Any) -> bool:
    """Whether a trainer or an aggregator is the plugin's own, or derived from it; None stands for ours."""
    return part is None or isinstance(part, (FedSQTrainer, FedSQAggregator))


def trains_as_ours(trainer: Any) -> bool:
    """Whether a client_trainer trains the task's loss by our steps; None stands for ours."""
    return trainer is None or getattr(type(trainer), "train", None) is FedSQTrainer.train


def with_own_task(data: SilosData, trainer: Any) -> SilosData:
    """The data, with the task of the plan that a trainer of ours was made with, where it has a loss of its own."""
    if not isinstance(trainer, FedSQTrainer) or isinstance(trainer.plan.task.loss, CrossEntropy):
        return data
    return replace(data, task=trainer.plan.task)


def hand_over(plan: Plan, trainer: Any) -> None:
    """Let a trainer of ours, which was made before the data were seen, follow what they told."""
    if isinstance(trainer, FedSQTrainer):
        told = {"task": plan.config.task, "keep_gates": plan.config.keep_gates}
        trainer.follow(replace(trainer.plan, config=trainer.plan.config.model_copy(update=told), task=plan.task))


def server_of(aggregator: Any, plan: Plan) -> Server | TheirServer:
    """What rounds are run with. Raises ConfigError where our aggregator does not go with FedML's security code."""
    return aggregator.server if is_ours(aggregator) else TheirServer(aggregator, plan)

"""Our trainer and aggregator, in FedML's base classes.

Counters (BatchNorm's number of batches) and what travels beside the weights never pass through FedML's
attack, defence and privacy code: its noise and clipping break on integers, and a clipping norm that counts
batches clips nothing else.
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

from ...algorithms.exchange import EVERYTHING, EXCHANGES
from ...dualcopy import DualCopy
from ...errors import UpdateError
from ...federation.client import Worker
from ...federation.evaluate import evaluate
from ...federation.local import trains
from ...federation.mean import WeightedMean
from ...federation.messages import packed, unpacked, update_of, with_sums
from ...federation.roles import NORMALISATION, Role, roles, with_roles
from ...federation.seeding import derive, isolated
from ...federation.server import Coordinator, added
from ...federation.server_state import ServerState
from ...federation.state import State, clone, state_of
from ...run.plan import Plan
from .security import check_security, security_enabled

log = logging.getLogger(__name__)


class FedSQTrainer(ClientTrainer):  # type: ignore[misc]
    """A client's side, for every row of the table."""

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self.plan = plan
        self._worker: Worker | None = None
        self._travelling = EXCHANGES[plan.algorithm.exchange]
        self._only_floats = False
        self._sums: Mapping[str, Tensor] = {}
        self._trained = True

    @property
    def worker(self) -> Worker:
        """The client's side, for the model that is here now: FedML replaces what a trainer was made with."""
        if self._worker is None or self._worker.model is not self.model:
            plan = self.plan
            config, parts = plan.config, (plan.algorithm, plan.options, plan.training)
            options = (config.random_seed, config.keep_gates, config.compile)
            self._worker = Worker(self.model, *parts, *options, plan.task.loss)
        return self._worker

    def get_model_params(self) -> State:
        """An independent copy of what travels: FedML's own trainer hands out the live state, which the
        next client would go on training."""
        if self._only_floats:
            return self._state(self._travelling - {Role.COUNTER})
        return with_sums(self._state(self._travelling) if self._trained else {}, self._sums)

    def set_model_params(self, model_parameters: Mapping[str, Tensor]) -> None:
        """Load what the server sent, or what FedML's attack and privacy code made of the update."""
        worker = self.worker  # knows what stays with a client from before the first load
        assignment = unpacked(model_parameters)
        self.model.load_state_dict({**self.model.state_dict(), **assignment.state})
        if any(worker.roles[key] not in self._travelling for key in assignment.state):
            worker.states.begin(self.model)
        if assignment.structural is not None:
            worker.follow(assignment.structural)

    def resume(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        """Go on where a run was between two rounds; `silos` is what ClientStates.tensors gave."""
        _take_over(self.model, state)
        self.worker.states.begin(self.model)
        self.worker.states.restore(silos)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        result = self.worker.train(int(self.id), train_data, args.round_idx, device)
        self._sums, self._trained = result.sums, trains(self.worker.parts(args.round_idx))
        if self._trained and not result.steps:
            log.warning("round %d: silo %s has no batch to train on", args.round_idx + 1, self.id)
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

    def _state(self, kept: frozenset[Role]) -> State:
        return with_roles(state_of(self.model), self.worker.roles, kept)


class FedSQAggregator(ServerAggregator):  # type: ignore[misc]
    """The server's side, for every row of the table: FedML's life-cycle around a Coordinator.

    The model follows the coordinator's state, to be evaluated and released.
    """

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self.plan = plan
        self.slots: Sequence[int] | None = None
        """Positions, in the round's order, of the clients whose updates come as a list; None: all."""
        self._coordinator: Coordinator | None = None
        self._begun_with: nn.Module | None = None
        self._after: ServerState | None = None
        self._screened = False
        self._counters: Mapping[str, Tensor] = {}
        self._sums: Mapping[str, Tensor] = {}

    @property
    def coordinator(self) -> Coordinator:
        """The rule's side, for the model that FedML has put here: it replaces what an aggregator was made
        with.

        Raises:
            ConfigError: the row does not go with FedML's attack, defence or privacy code.
        """
        if self._coordinator is None or self._begun_with is not self.model:
            plan, model = self.plan, self.model
            known, gated = roles(model, plan.head), isinstance(model, DualCopy)
            seed = plan.config.random_seed
            begun = Coordinator(plan.algorithm, plan.options, state_of(model), known, seed, gated)
            check_security(begun, plan)
            self._coordinator, self._begun_with = begun, model
        return self._coordinator

    @property
    def streams(self) -> bool:
        """Whether updates may be gathered one by one: nothing needs to see them together."""
        hooks = ("on_before_aggregation", "aggregate", "on_after_aggregation")
        ours = all(getattr(type(self), hook) is getattr(FedSQAggregator, hook) for hook in hooks)
        return ours and not security_enabled()

    def assign(self, clients: Sequence[int]) -> list[State]:
        """What each of a round's clients is sent. The structural copy follows before, where it does."""
        if self.coordinator.next_round():
            state = self.coordinator.state
            _follow(self.model, state)
            what = "gates are unfrozen" if state.structural is None else "structural copy has changed"
            log.info("round %d: the %s", state.round + 1, what)
        return [packed(assignment) for assignment in self.coordinator.assign(clients)]

    def resume(self, state: ServerState) -> None:
        """Go on where a run was between two rounds."""
        _take_over(self.model, state)
        self.hold(state)

    def hold(self, state: ServerState) -> None:
        """The server's state after a round."""
        self.coordinator.state = state
        self.model.load_state_dict(state.model)

    def get_model_params(self) -> State:
        """What travels of the global model, without the counters while FedML's code screens it."""
        state = self.coordinator.travelling(self.coordinator.state.model)
        return self._floats(state) if self._screened else clone(state)

    def set_model_params(self, model_parameters: Mapping[str, Tensor]) -> None:
        """The result of an aggregation, perhaps changed by FedML's or a subclass's hooks."""
        state, before = self._after, self.coordinator.state
        self._after = None
        if state is None:  # a subclass aggregates by itself
            if self.plan.algorithm.server != "average" or not self.coordinator.trains:
                raise UpdateError(
                    f"{type(self).__name__}.aggregate did not call FedSQAggregator.aggregate, without which "
                    f"there is no {self.plan.algorithm.name}"
                )
            state = replace(before, round=before.round + 1)
        self.hold(replace(state, model=OrderedDict(state.model, **model_parameters)))

    def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
        received = [update_of(n, *update) for n, update in enumerate(raw_client_model_or_grad_list)]
        self._sums = added(update.sums for update in received)
        if not security_enabled():
            return [(update.samples, update.state) for update in received], list(range(len(received)))
        counters = WeightedMean()
        for update in received:
            counters.add(self._only_counters(update.state), update.samples)
        self._counters = counters.result() if self._only_counters(self.coordinator.expected) else {}
        self._screened = True
        # FedML's clipping and attacks write into the tensors that they are given.
        return super().on_before_aggregation([(u.samples, self._floats(u.state)) for u in received])

    def aggregate(self, raw_client_model_or_grad_list: Any) -> State:
        updates = raw_client_model_or_grad_list
        defender, privacy = FedMLDefender.get_instance(), FedMLDifferentialPrivacy.get_instance()
        gathered: Any = None
        if self.coordinator.separate:
            slots = range(len(updates)) if self.slots is None else self.slots
            gathered = {
                slot: self.coordinator.counted(state) for slot, (_, state) in zip(slots, updates, strict=True)
            }
        elif self.coordinator.trains:
            if defender.is_defense_enabled():
                mean = defender.defend_on_aggregation(
                    raw_client_grad_list=updates,
                    base_aggregation_func=_mean,
                    extra_auxiliary_info=self.get_model_params(),
                )
            else:
                if privacy.to_compute_params_in_aggregation_enabled():
                    privacy.set_params_for_dp(updates)
                mean = _mean(self.args, updates)
            gathered = self.coordinator.counted({**mean, **self._counters})
        self._after = self.coordinator.step(gathered, self._sums)
        result = self.coordinator.travelling(self._after.model)
        return self._floats(result) if self._screened else result

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
        for key, value in self.coordinator.travelling((self._after or self.coordinator.state).model).items():
            source = after.get(key, value)
            # Noise can make a variance negative; clamping what is published costs no privacy.
            source = source.clamp(min=0) if key in variances else source
            whole[key] = source.to(value.dtype)
        return whole

    def test(self, test_data: Any, device: Any, args: Any) -> tuple[float, float, None, None]:
        with isolated(derive("test", self.plan.config.random_seed)):
            metrics = evaluate(self.model, test_data, device, *self.plan.task)
        return metrics.accuracy, metrics.loss, None, None

    def _only_counters(self, state: Mapping[str, Tensor]) -> State:
        return with_roles(state, self.coordinator.roles, {Role.COUNTER})

    def _floats(self, state: Mapping[str, Tensor]) -> State:
        return clone(with_roles(state, self.coordinator.roles, EVERYTHING - {Role.COUNTER}))


def _take_over(model: nn.Module, state: ServerState) -> None:
    model.load_state_dict(state.model)
    _follow(model, state)


def _follow(model: nn.Module, state: ServerState) -> None:
    """Let the gates be those of the server's state."""
    if not isinstance(model, DualCopy):
        return
    if state.structural is None:
        model.unfreeze()
    else:
        model.refresh(state.structural)


def _mean(args: Any, raw_grad_list: Any) -> State:
    """The sample-weighted mean, with the argument names of FedML's own operator."""
    mean = WeightedMean()
    for samples, state in raw_grad_list:
        if samples:  # a defence gives none to what it distrusts
            mean.add(state, samples)
    return mean.result()

"""Our trainer and aggregator, in FedML's base classes.

Counters (BatchNorm's number of batches) never pass through FedML's attack, defence and privacy code:
its noise and clipping break on integers, and a clipping norm that counts batches clips nothing else.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from fedml.core import ClientTrainer, ServerAggregator
from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
from fedml.core.security.fedml_attacker import FedMLAttacker
from fedml.core.security.fedml_defender import FedMLDefender
from torch import Tensor, nn

from ...algorithms.exchange import EXCHANGES
from ...algorithms.objective import OBJECTIVES
from ...algorithms.phases import PHASES
from ...algorithms.server import SERVERS
from ...dualcopy import DualCopy, GateCache
from ...federation.evaluate import evaluate
from ...federation.local import local_update
from ...federation.mean import WeightedMean
from ...federation.roles import NORMALISATION, Role, roles
from ...federation.seeding import derive, isolated
from ...federation.state import State, clone, state_of
from ...federation.updates import Update
from .plan import Plan

log = logging.getLogger(__name__)


def security_enabled() -> bool:
    """Whether FedML's attack, defence or privacy code is on in this process."""
    parts = (FedMLAttacker, FedMLDefender, FedMLDifferentialPrivacy)
    return any(part.get_instance().is_enabled for part in parts)


class _Travelling:
    """Access to the part of a model's state that travels; without the counters while they are hidden."""

    model: nn.Module

    def _prepare(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.roles = roles(model, plan.head)
        self.hide_counters = False

    def get_model_params(self) -> State:
        """An independent copy: FedML's own trainer hands out the live state, which the next client
        would go on training."""
        travelling = EXCHANGES[self.plan.algorithm.exchange]
        return OrderedDict((k, v) for k, v in state_of(self.model).items() if self._shown(k, travelling))

    def set_model_params(self, model_parameters: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({**self.model.state_dict(), **model_parameters})

    def _shown(self, key: str, travelling: frozenset[Role]) -> bool:
        role = self.roles[key]
        return role in travelling and not (self.hide_counters and role is Role.COUNTER)


class FedSQTrainer(_Travelling, ClientTrainer):  # type: ignore[misc]
    """A client's local update, for every row of the table."""

    _cache: GateCache | None = None

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self._prepare(model, plan)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        plan, row = self.plan, self.plan.algorithm
        if plan.config.keep_gates and self._cache is None and isinstance(self.model, DualCopy):
            self._cache = GateCache(self.model)
        result = local_update(
            self.model,
            train_data,
            plan.training,
            PHASES[row.phases](plan.options),
            self.roles,
            round=args.round_idx,
            seed=derive("local", plan.config.random_seed, args.round_idx, int(self.id)),
            objective=OBJECTIVES[row.objective](plan.options),
            device=device,
            forward=self._cache,
        )
        if not result.steps:
            log.warning("round %d: silo %s has no batch to train on", args.round_idx + 1, self.id)

    def on_after_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        self.hide_counters = True
        try:
            super().on_after_local_training(train_data, device, args)
        finally:
            self.hide_counters = False

    def test(self, test_data: Any, device: Any, args: Any) -> dict[str, float]:
        """FedML's sums over samples."""
        metrics = evaluate(self.model, test_data, device)
        return {
            "test_correct": metrics.accuracy * metrics.samples if metrics.samples else 0,
            "test_loss": metrics.loss * metrics.samples if metrics.samples else 0,
            "test_total": metrics.samples,
        }


class FedSQAggregator(_Travelling, ServerAggregator):  # type: ignore[misc]
    """The server's side, for every row of the table: follows the row's rule."""

    def __init__(self, model: nn.Module, args: Any, plan: Plan) -> None:
        super().__init__(model, args)
        self._prepare(model, plan)
        self._counters: Mapping[str, Tensor] = {}
        self._variances = {
            f"{path}.running_var" if path else "running_var"
            for path, module in model.named_modules()
            if isinstance(module, NORMALISATION) and getattr(module, "running_var", None) is not None
        }

    @property
    def streams(self) -> bool:
        """Whether updates may be aggregated one by one: nothing needs to see them together."""
        hooks = ("on_before_aggregation", "aggregate", "on_after_aggregation")
        ours = all(getattr(type(self), hook) is getattr(FedSQAggregator, hook) for hook in hooks)
        return ours and not security_enabled()

    def begin(self, template: Mapping[str, Tensor]) -> Any:
        """The row's rule, at the start of a round's aggregation."""
        return SERVERS[self.plan.algorithm.server](template, self.roles, self.plan.options)

    def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
        updates = raw_client_model_or_grad_list
        if not security_enabled():
            return updates, list(range(len(updates)))
        counters = WeightedMean()
        for samples, state in updates:
            counters.add(self._only_counters(state), samples)
        self._counters = counters.result() if Role.COUNTER in self.roles.values() else {}
        self.hide_counters = True
        # FedML's clipping and attacks write into the tensors that they are given.
        floats = [(n, clone({k: v for k, v in s.items() if k not in self._counters})) for n, s in updates]
        return super().on_before_aggregation(floats)

    def aggregate(self, raw_client_model_or_grad_list: Any) -> State:
        defender, privacy = FedMLDefender.get_instance(), FedMLDifferentialPrivacy.get_instance()
        if defender.is_defense_enabled():
            result: State = defender.defend_on_aggregation(
                raw_client_grad_list=raw_client_model_or_grad_list,
                base_aggregation_func=self._by_rule,
                extra_auxiliary_info=self.get_model_params(),
            )
            return result
        if privacy.to_compute_params_in_aggregation_enabled():
            privacy.set_params_for_dp(raw_client_model_or_grad_list)
        return self._by_rule(self.args, raw_client_model_or_grad_list)

    def on_after_aggregation(self, aggregated_model_or_grad: State) -> State:
        after: State = super().on_after_aggregation(aggregated_model_or_grad)
        if not self.hide_counters:
            return after
        self.hide_counters = False
        template = self.get_model_params()
        whole: State = OrderedDict()
        for key, value in template.items():
            source = self._counters[key] if key in self._counters else after[key]
            # Noise can make a variance negative; clamping what is published costs no privacy.
            source = source.clamp(min=0) if key in self._variances else source
            whole[key] = source.to(value.dtype)
        return whole

    def test(self, test_data: Any, device: Any, args: Any) -> tuple[float, float, None, None]:
        with isolated(derive("test", self.plan.config.random_seed)):
            metrics = evaluate(self.model, test_data, device)
        return metrics.accuracy, metrics.loss, None, None

    def _only_counters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if self.roles[key] is Role.COUNTER}

    def _by_rule(self, args: Any, raw_grad_list: Any) -> State:
        """The row's rule on a list, with the argument names of FedML's own operator."""
        rule = self.begin(self.get_model_params())
        for client, (samples, state) in enumerate(raw_grad_list):
            rule.add(Update(client, samples, state))
        finished: State = rule.finish()
        return finished

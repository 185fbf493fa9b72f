"""The server's side of one round, the same on every road: what silos are sent, and what they answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedml import mlops
from torch import Tensor

from ...errors import UpdateError
from ...federation.messages import update_of
from ...federation.record import RoundRecord
from ...federation.seeding import derive, isolated, sample_clients
from ...federation.server_state import ServerState
from ...federation.state import State, clone, nbytes
from ...federation.updates import problem
from ...run.plan import Plan
from .adapters import FedSQAggregator
from .security import security_enabled

log = logging.getLogger(__name__)


def drawn(plan: Plan, args: Any, round_idx: int) -> list[int]:
    """The silos that a round (0-based) is for."""
    seed = plan.config.seed("sampling")
    return sample_clients(args.client_num_in_total, args.client_num_per_round, round_idx, seed)


def with_data(sampled: Sequence[int], samples: Mapping[int, float], record: RoundRecord) -> list[int]:
    """Those that have a sample to train on. Raises UpdateError when none has."""
    silos = []
    for silo in sampled:
        if samples.get(silo):
            silos.append(silo)
        else:
            note(record, f"round {record.round}: silo {silo} has no samples and is skipped")
    if not silos:
        raise UpdateError(f"round {record.round}: none of the silos {sampled} has a sample to train on")
    return silos


def note(record: RoundRecord, line: str) -> None:
    """Tell the user, now in the log and at the end of the run."""
    record.notes.append(line)
    log.warning(line)


class Round:
    """Answers reach the aggregator in the order of the silos, so that the sums are the same whatever the
    order in which they arrive; one that comes early waits.

    Args:
        silos: those of the round, in order.
        samples: of every silo.
        record: takes bytes and notes.
    """

    def __init__(
        self,
        aggregator: Any,
        plan: Plan,
        silos: Sequence[int],
        samples: Mapping[int, float],
        record: RoundRecord,
    ) -> None:
        self._aggregator, self._plan, self._samples, self.record = aggregator, plan, samples, record
        ours = isinstance(aggregator, FedSQAggregator)
        self._expected_sums: Mapping[str, Tensor] = {}
        if ours:
            sent = aggregator.assign(silos)
            self._template: State = aggregator.coordinator.expected
            self._expected_sums = aggregator.coordinator.expected_sums
        else:
            self._template = clone(aggregator.get_model_params())  # perhaps its model's live state
            sent = [self._template] * len(silos)
        self.silos = list(silos)
        self.messages = dict(zip(silos, sent, strict=True))
        """What each silo is sent."""
        record.bytes_down += sum(map(nbytes, sent))
        if ours:
            self._before: ServerState = aggregator.coordinator.state
        gathering = aggregator.coordinator.begin(silos) if ours else None
        self._gathering = gathering if ours and aggregator.streams else None
        self._together: list[tuple[float, State]] = []
        self._accepted: list[int] = []
        self._early: dict[int, tuple[State, str | None]] = {}
        self._turn = 0
        self.missing = list(silos)
        """Silos that have not answered."""

    def take(self, silo: int, answer: State, objection: str | None = None) -> None:
        """An answer, and why it is to be refused all the same, where the road knows. Raises UpdateError
        where the option `nonfinite` makes a refused one fatal."""
        if silo not in self.missing:
            again = "has answered already" if silo in self.silos else "is not in this round"
            self._refuse(silo, f"it {again}")
            return
        self.missing.remove(silo)
        self.record.bytes_up += nbytes(answer)
        if objection is None and isinstance(self._aggregator, FedSQAggregator):
            self._aggregator.coordinator.confirm(silo)  # now: when its turn comes, it may be a new process
        self._early[self.silos.index(silo)] = answer, objection
        while self._turn in self._early:
            self._gather(self._turn)
            self._turn += 1

    def close(self) -> None:
        """Let the aggregator have the result. Raises UpdateError when no update was accepted."""
        for position in sorted(self._early):
            self._gather(position)
        if not self._accepted:
            raise UpdateError(f"no update is left to aggregate: {'; '.join(self.record.notes)}")
        event = str(self.record.round - 1)
        mlops.event("agg", event_started=True, event_value=event)
        if self._gathering is not None:
            self._aggregator.hold(self._gathering.finish())
        else:
            if isinstance(self._aggregator, FedSQAggregator):
                self._aggregator.slots = self._accepted
            self._aggregator.set_model_params(self._aggregate())
        mlops.event("agg", event_started=False, event_value=event)

    def pass_over(self) -> None:
        """Leave the model as it was before the round."""
        if isinstance(self._aggregator, FedSQAggregator):
            # A client that was started anew meanwhile has nothing of what it was told.
            told = self._aggregator.coordinator.state.told
            self._aggregator.hold(replace(self._before, round=self._before.round + 1, told=told))

    def _gather(self, position: int) -> None:
        silo, (answer, reason) = self.silos[position], self._early.pop(position)
        try:
            update = update_of(silo, self._samples[silo], answer)
            reason = reason or problem(update, self._template, self._expected_sums)
        except UpdateError as error:
            reason = str(error)
        if reason is not None:
            self._refuse(silo, reason)
            return
        self._accepted.append(position)
        if self._gathering is None:
            self._together.append((update.samples, answer))
        else:
            self._gathering.add(update)

    def _refuse(self, silo: int, reason: str) -> None:
        """Name an update that must not reach the aggregator; as the option says, that ends the run."""
        line = f"round {self.record.round}: the update of silo {silo} is refused: {reason}"
        if self._plan.config.nonfinite == "fail":
            raise UpdateError(f"{line} (fedsq_args.nonfinite: fail)")
        note(self.record, line)

    def _aggregate(self) -> State:
        try:
            # Attacks, noise and a user's own code draw from the global generators.
            with isolated(derive("server", self._plan.config.random_seed, self.record.round)):
                accepted, _ = self._aggregator.on_before_aggregation(self._together)
                result: State = self._aggregator.on_after_aggregation(self._aggregator.aggregate(accepted))
        except Exception as error:  # a defence that has too few updates left, say
            if not isinstance(error, ValueError) and not security_enabled():
                raise
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise UpdateError(
                f"round {self.record.round}: aggregating {len(self._together)} updates failed: {said}"
            ) from error
        return result

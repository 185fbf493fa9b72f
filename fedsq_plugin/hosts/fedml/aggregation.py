"""How accepted updates reach an aggregator under FedML: one by one, or together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedml import mlops

from ...errors import UpdateError
from ...federation.messages import Update, with_sums
from ...federation.seeding import derive, isolated
from ...federation.server import Gathering, Server
from ...federation.server_state import ServerState, load_structural
from ...federation.state import State
from ...run.plan import Plan
from .security import security_enabled


class HostedServer(Server):
    """The server of an aggregator of ours, whose model follows the server's state."""

    aggregator: Any

    def follow_structural(self) -> bool:
        changed = super().follow_structural()
        if changed:
            load_structural(self.aggregator.model, self.state)
        return changed

    def begin(self, silos: Sequence[int]) -> Any:
        gathering = super().begin(silos)
        if self.aggregator.streams:
            return OneByOne(self.aggregator, gathering)
        return Together(self.aggregator, self.aggregator.plan, silos)

    def pass_over(self, before: ServerState) -> None:
        super().pass_over(before)
        self.aggregator.hold(self.state)


class OneByOne:
    """Updates are added as they come."""

    def __init__(self, aggregator: Any, gathering: Gathering) -> None:
        self._aggregator, self._gathering = aggregator, gathering
        self._event = str(aggregator.server.state.round)

    def add(self, update: Update) -> None:
        self._gathering.add(update)

    def finish(self) -> None:
        mlops.event("agg", event_started=True, event_value=self._event)
        self._gathering.finish()
        self._aggregator.hold(self._aggregator.server.state)
        mlops.event("agg", event_started=False, event_value=self._event)


class Together:
    """Updates are kept, for an aggregator whose hooks, or FedML's security code, must see them together."""

    def __init__(self, aggregator: Any, plan: Plan, silos: Sequence[int]) -> None:
        self._aggregator, self._plan = aggregator, plan
        self._silos, self._round = list(silos), aggregator.args.round_idx + 1
        self._updates: list[tuple[float, State]] = []
        self._positions: list[int] = []

    def add(self, update: Update) -> None:
        self._updates.append((update.samples, with_sums(update.state, update.sums)))
        self._positions.append(self._silos.index(update.silo))

    def finish(self) -> None:
        event = str(self._round - 1)
        mlops.event("agg", event_started=True, event_value=event)
        self._aggregator.positions = self._positions
        self._aggregator.set_model_params(self._aggregate())
        mlops.event("agg", event_started=False, event_value=event)

    def _aggregate(self) -> State:
        try:
            # Attacks, noise and a user's own code draw from the global generators.
            with isolated(derive("server", self._plan.config.random_seed, self._round)):
                accepted, _ = self._aggregator.on_before_aggregation(self._updates)
                result: State = self._aggregator.on_after_aggregation(self._aggregator.aggregate(accepted))
        except Exception as error:  # as of a defence that has too few updates left
            if not isinstance(error, ValueError) and not security_enabled():
                raise
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise UpdateError(
                f"round {self._round}: aggregating {len(self._updates)} updates failed: {said}"
            ) from error
        return result

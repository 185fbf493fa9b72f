"""The two sides of a run in FedML, whoever wrote the trainer and the aggregator: ours, or a user's own.

Nothing else asks whether a trainer or an aggregator is ours.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedml import mlops
from torch import Tensor

from ...dualcopy import DualCopy
from ...errors import ConfigError, UpdateError, WeightsError
from ...federation.checkpoints import ServerCheckpoints
from ...federation.client_states import ClientStates
from ...federation.evaluate import Metrics
from ...federation.messages import Assignment, Update, packed, with_sums
from ...federation.round import Gathers, RoundServer
from ...federation.seeding import derive, isolated
from ...federation.server import Gathering
from ...federation.server_state import ServerState, load_structural
from ...federation.simulation import test_seeded
from ...federation.state import State, clone
from ...run.plan import Plan
from .adapters import FedSQAggregator, FedSQTrainer
from .security import security_enabled

log = logging.getLogger(__name__)


def is_ours(part: Any) -> bool:
    """Whether a trainer or an aggregator is the plugin's own, or derived from it; None stands for ours."""
    return part is None or isinstance(part, (FedSQTrainer, FedSQAggregator))


class ServerSide(RoundServer):
    """What rounds, tests and checkpoints need of an aggregator."""

    def __init__(self, aggregator: Any, plan: Plan) -> None:
        self.aggregator, self.plan = aggregator, plan

    @property
    def structural_fingerprint(self) -> str | None:
        """SHA-256 of the structural copy of the next round; None without one."""
        return None

    def forget(self, silos: Iterable[int]) -> None:
        """Take silos for new ones, that have nothing."""

    def show(self, silos: Sequence[int]) -> list[Assignment]:
        """The global model for each of the silos, to make their own model from it."""
        raise ConfigError("an aggregator of your own has no models of its silos")

    def test(self, batches: Any, samples: int, device: Any) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test data: as trained, and released (the quantitative copy alone, with its own
        gates)."""
        raise NotImplementedError

    def restore(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        """Go on from a checkpoint, where there is one; the silos too, where they are in this process."""

    def save(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        """Save a checkpoint after a round."""

    def weights(self) -> State:
        """The weights of the global model."""
        raise NotImplementedError


class OurServerSide(ServerSide):
    def __init__(self, aggregator: FedSQAggregator, plan: Plan) -> None:
        super().__init__(aggregator, plan)
        _ = aggregator.server  # refuses what does not go together, before the first round

    @property
    def state(self) -> ServerState:
        return self.aggregator.server.state  # type: ignore[no-any-return]

    @property
    def expected(self) -> State:
        return self.aggregator.server.expected  # type: ignore[no-any-return]

    @property
    def expected_sums(self) -> Mapping[str, Tensor]:
        return self.aggregator.server.expected_sums  # type: ignore[no-any-return]

    @property
    def structural_fingerprint(self) -> str | None:
        return self.aggregator.server.structural_fingerprint  # type: ignore[no-any-return]

    def follow_structural(self) -> bool:
        changed: bool = self.aggregator.server.follow_structural()
        if changed:
            load_structural(self.aggregator.model, self.state)
        return changed

    def assign(self, silos: Sequence[int]) -> list[Assignment]:
        return self.aggregator.server.assign(silos)  # type: ignore[no-any-return]

    def show(self, silos: Sequence[int]) -> list[Assignment]:
        return self.aggregator.server.show(silos)  # type: ignore[no-any-return]

    def confirm(self, silo: int) -> None:
        self.aggregator.server.confirm(silo)

    def forget(self, silos: Iterable[int]) -> None:
        self.aggregator.server.forget(silos)

    def begin(self, silos: Sequence[int]) -> Gathers:
        gathering = self.aggregator.server.begin(silos)
        if self.aggregator.streams:
            return _OneByOne(self.aggregator, gathering)
        return _Together(self.aggregator, self.plan, silos)

    def pass_over(self, before: ServerState) -> None:
        self.aggregator.server.pass_over(before)
        self.aggregator.hold(self.state)

    def test(self, batches: Any, samples: int, device: Any) -> tuple[Metrics | None, Metrics | None]:
        model, seed = self.aggregator.model, self.plan.config.random_seed
        metrics = test_seeded(model, batches, device, self.plan.task, seed)
        if not isinstance(model, DualCopy):
            return metrics, metrics
        return metrics, test_seeded(model.quantitative, batches, device, self.plan.task, seed)

    def restore(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        newest = checkpoints.take_newest()
        if newest is None:
            return
        state, silos = newest
        try:
            self.aggregator.resume(state)
            if client is not None:
                client.resume(state, silos)
        except (RuntimeError, KeyError) as error:  # torch names every key and shape
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(f"{checkpoints.folder}: not of this model: {reason}") from None
        if security_enabled():
            log.warning("what FedML's defences and privacy accounts remember of those rounds is lost")

    def save(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        states = None if client is None else client.states
        checkpoints.save(self.state, {} if states is None else states.tensors())

    def weights(self) -> State:
        return self.aggregator.model.state_dict()  # type: ignore[no-any-return]


class TheirServerSide(ServerSide):
    """An aggregator of a user's own: it is sent weights, and tests by its own measure."""

    def __init__(self, aggregator: Any, plan: Plan) -> None:
        super().__init__(aggregator, plan)
        self._sent: State = OrderedDict()

    @property
    def state(self) -> ServerState:
        return ServerState(self._sent)

    @property
    def expected(self) -> State:
        return self._sent

    @property
    def expected_sums(self) -> Mapping[str, Tensor]:
        return {}

    def follow_structural(self) -> bool:
        return False

    def assign(self, silos: Sequence[int]) -> list[Assignment]:
        self._sent = clone(self.aggregator.get_model_params())  # it may be its model's live state
        return [Assignment(self._sent)] * len(silos)

    def confirm(self, silo: int) -> None:
        pass

    def begin(self, silos: Sequence[int]) -> Gathers:
        return _Together(self.aggregator, self.plan, silos)

    def pass_over(self, before: ServerState) -> None:
        pass

    def test(self, batches: Any, samples: int, device: Any) -> tuple[Metrics | None, Metrics | None]:
        with isolated(derive("test", self.plan.config.random_seed)):
            tested = self.aggregator.test(batches, device, self.aggregator.args)
        # (accuracy, loss, …) is what FedML expects of an aggregator.
        return (Metrics(tested[1], tested[0], samples) if isinstance(tested, tuple) else None), None

    def weights(self) -> State:
        return self.aggregator.get_model_params()  # type: ignore[no-any-return]


def server_side(aggregator: Any, plan: Plan) -> ServerSide:
    """The side of an aggregator."""
    return (OurServerSide if is_ours(aggregator) else TheirServerSide)(aggregator, plan)


class _OneByOne:
    """Updates are added as they come."""

    def __init__(self, aggregator: FedSQAggregator, gathering: Gathering) -> None:
        self._aggregator, self._gathering = aggregator, gathering
        self._event = str(aggregator.server.state.round)

    def add(self, update: Update) -> None:
        self._gathering.add(update)

    def finish(self) -> None:
        mlops.event("agg", event_started=True, event_value=self._event)
        self._gathering.finish()
        self._aggregator.hold(self._aggregator.server.state)
        mlops.event("agg", event_started=False, event_value=self._event)


class _Together:
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


class ClientSide:
    """What silos need of a trainer: a user's own, which is sent weights alone."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def structural_fingerprint(self) -> str | None:
        """SHA-256 of the structural copy under which the trainer trains; None without one."""
        return None

    @property
    def states(self) -> ClientStates | None:
        """What stays with the silos; None: nothing does."""
        return None

    def receive(self, message: State) -> None:
        # It may go on training what it is given.
        self.trainer.set_model_params(clone(message))

    def answer(self) -> State:
        return clone(self.trainer.get_model_params())

    def personalise(self, silo: int, batches: Any, epochs: int, head_only: bool, device: Any) -> None:
        """Make the model the silo's own."""
        raise ConfigError("a trainer of your own has no models of its silos")

    def resume(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        """Go on where a run was between two rounds."""


class OurClientSide(ClientSide):
    @property
    def structural_fingerprint(self) -> str | None:
        return self.trainer.client.structural_fingerprint  # type: ignore[no-any-return]

    @property
    def states(self) -> ClientStates | None:
        return self.trainer.client.states  # type: ignore[no-any-return]

    def receive(self, message: State) -> None:
        self.trainer.set_model_params(message)

    def answer(self) -> State:
        return self.trainer.get_model_params()  # type: ignore[no-any-return]

    def personalise(self, silo: int, batches: Any, epochs: int, head_only: bool, device: Any) -> None:
        self.trainer.client.personalise(silo, batches, epochs, head_only, device)

    def resume(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        self.trainer.client.resume(state, silos)


def client_side(trainer: Any) -> ClientSide:
    """The side of a trainer."""
    return (OurClientSide if is_ours(trainer) else ClientSide)(trainer)


def pack_each(silos: Sequence[int], assignments: Sequence[Assignment]) -> dict[int, State]:
    """Assignments as messages, by silo."""
    return {silo: packed(sent) for silo, sent in zip(silos, assignments, strict=True)}

"""The server's side under FedML, around an aggregator of ours or a user's own: how accepted updates reach it, one by
one or together."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedml import mlops
from torch import Tensor, nn

from ...errors import ConfigError, UpdateError, WeightsError
from ...federation.checkpoints import ServerCheckpoints
from ...federation.client import Client
from ...federation.messages import Assignment, Update, with_sums
from ...federation.roles import roles
from ...federation.seeding import derive, isolated
from ...federation.server import Gathering, Server
from ...federation.server_state import ServerState, load_structural
from ...federation.state import State, state_of, tensors_of, with_extras
from ...run.plan import Plan
from .security import check_security, security_enabled
from .weights import take_weights


@contextlib.contextmanager
def event(name: str, value: str) -> Iterator[None]:
    """An event in FedML's log, which has no end where the block fails."""
    mlops.event(name, event_started=True, event_value=value)
    yield
    mlops.event(name, event_started=False, event_value=value)


class OurServer(Server):
    """The server of a `FedSQAggregator`, whose model follows `state`: it is what is tested and released.

    Raises:
        ConfigError: the algorithm does not go with FedML's attack, defence or privacy code.
    """

    def __init__(self, aggregator: Any) -> None:
        self._aggregator = aggregator
        plan, model = aggregator.plan, aggregator.model
        known = roles(model, plan.head)
        super().__init__(plan.algorithm, plan.options, state_of(model), known, plan.config.random_seed)
        check_security(self, plan)

    @property
    def state(self) -> ServerState:
        return self._state

    @state.setter
    def state(self, state: ServerState) -> None:
        before = getattr(self, "_state", state)  # the first state is the model's own
        if state.model is not before.model:
            model = self._aggregator.model
            model.load_state_dict(with_extras(model, state.model))
        if state.structural is not before.structural:
            load_structural(self._aggregator.model, state)
        self._state = state

    def begin(self, silos: Sequence[int]) -> Any:
        super().begin(silos)
        if self._aggregator.streams:
            return OneByOne(self, silos)
        return Together(self._aggregator, self._aggregator.plan, silos)


class TheirServer:
    """Rounds with an aggregator of a user's own: silos are sent its weights alone, and send weights alone."""

    structural_fingerprint = None
    expected_sums: Mapping[str, Tensor] = {}

    def __init__(self, aggregator: Any, plan: Plan) -> None:
        self._aggregator, self._plan = aggregator, plan
        self.expected: State = OrderedDict()

    @property
    def state(self) -> ServerState:
        return ServerState(self.expected)

    def follow_structural(self) -> bool:
        return False

    def assign(self, silos: Sequence[int]) -> list[Assignment]:
        self.expected = their_weights(self._aggregator)
        return [Assignment(self.expected)] * len(silos)

    def show(self, silos: Sequence[int]) -> list[Assignment]:
        raise ConfigError("an aggregator of your own has no models of its silos")

    def confirm(self, silo: int) -> None:
        pass

    def forget(self, silos: Iterable[int]) -> None:
        pass

    def begin(self, silos: Sequence[int]) -> Together:
        return Together(self._aggregator, self._plan, silos)

    def pass_over(self, before: ServerState) -> None:
        pass


def their_weights(aggregator: Any) -> State:
    """An independent copy of the weights of an aggregator of a user's own, which may give its model's live state, or
    arrays. Raises UpdateError."""
    like = tensors_of(aggregator.model) if isinstance(aggregator.model, nn.Module) else {}
    return take_weights(aggregator.get_model_params(), like, "get_model_params of your server_aggregator", rounded=True)


class OneByOne(Gathering):
    """Updates are added as they come."""

    def finish(self) -> None:
        with event("agg", str(self._server.state.round)):
            super().finish()


class Together:
    """Updates are kept, for an aggregator whose hooks, or FedML's security code, must see them together."""

    def __init__(self, aggregator: Any, plan: Plan, silos: Sequence[int]) -> None:
        self._aggregator, self._seed, self._round = aggregator, plan.config.random_seed, aggregator.args.round_idx + 1
        self._silos = list(silos)
        self._updates: list[tuple[float, State]] = []
        self._positions: list[int] = []

    def add(self, update: Update) -> None:
        self._updates.append((update.samples, with_sums(update.state, update.sums)))
        self._positions.append(self._silos.index(update.silo))

    def finish(self) -> None:
        with event("agg", str(self._round - 1)):
            self._aggregator.positions = self._positions
            self._aggregator.set_model_params(self._aggregate())

    def _aggregate(self) -> State:
        try:
            # Attacks, noise and a user's own code draw from the global generators.
            with isolated(derive("server", self._seed, self._round)):
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


def restore(checkpoints: ServerCheckpoints, server: Server | TheirServer, plan: Plan, client: Client | None) -> None:
    """Let the server go on from the newest checkpoint, where there is one, and with it the client of this process.

    Raises:
        WeightsError: the checkpoint is of another model.
    """
    newest = checkpoints.take_newest()
    if newest is None:
        return
    assert isinstance(server, Server)  # checkpoints are refused for parts of a user's own
    state, silos = newest
    try:
        server.state = state
        if client is not None:
            client.resume(state, silos)
    except (RuntimeError, KeyError) as error:  # torch names every key and shape
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{checkpoints.folder}: not of this model: {reason}") from None
    if security_enabled():
        plan.note("what FedML's defences and privacy accounts remember of those rounds is lost")

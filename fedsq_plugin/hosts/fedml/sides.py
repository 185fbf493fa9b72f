"""The two sides of a run in FedML, whoever wrote the trainer and the aggregator: ours, or a user's own.

Nothing else asks whether a trainer or an aggregator is ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...dualcopy import DualCopy
from ...errors import ConfigError, WeightsError
from ...federation.checkpoints import ServerCheckpoints
from ...federation.client_states import ClientStates
from ...federation.evaluate import Metrics
from ...federation.messages import Assignment
from ...federation.seeding import derive, isolated
from ...federation.server import Server
from ...federation.server_state import ServerState
from ...federation.simulation import test_seeded
from ...federation.state import State, clone
from ...run.plan import Plan
from .adapters import FedSQAggregator, FedSQTrainer
from .aggregation import Together
from .security import security_enabled


def is_ours(part: Any) -> bool:
    """Whether a trainer or an aggregator is the plugin's own, or derived from it; None stands for ours."""
    return part is None or isinstance(part, (FedSQTrainer, FedSQAggregator))


class ServerSide:
    """What rounds, tests and checkpoints need of an aggregator. `server` is what rounds are run with."""

    def __init__(self, aggregator: Any, plan: Plan, server: Server | TheirServer) -> None:
        self.aggregator, self.plan, self.server = aggregator, plan, server

    def test(self, batches: Any, samples: int, device: Any) -> tuple[Metrics | None, Metrics | None]:
        """The global model on the global test data: as trained, and released (the quantitative copy alone, with its
        own gates)."""
        with isolated(derive("test", self.plan.config.random_seed)):
            tested = self.aggregator.test(batches, device, self.aggregator.args)
        # (accuracy, loss, …) is what FedML expects of an aggregator.
        return (Metrics(tested[1], tested[0], samples) if isinstance(tested, tuple) else None), None

    def restore(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        """Go on from a checkpoint, where there is one; the silos too, where they are in this process."""

    def save(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        """Save a checkpoint after a round."""

    def weights(self) -> State:
        """The weights of the global model."""
        return self.aggregator.get_model_params()  # type: ignore[no-any-return]


class OurServerSide(ServerSide):
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
            self.plan.note("what FedML's defences and privacy accounts remember of those rounds is lost")

    def save(self, checkpoints: ServerCheckpoints, client: ClientSide | None = None) -> None:
        states = None if client is None else client.states
        checkpoints.save(self.server.state, {} if states is None else states.tensors())

    def weights(self) -> State:
        return self.aggregator.model.state_dict()  # type: ignore[no-any-return]


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
        self.expected = clone(self._aggregator.get_model_params())  # it may be its model's live state
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


def server_side(aggregator: Any, plan: Plan) -> ServerSide:
    """The side of an aggregator. Raises ConfigError where our aggregator does not go with FedML's security code."""
    if is_ours(aggregator):
        return OurServerSide(aggregator, plan, aggregator.server)
    return ServerSide(aggregator, plan, TheirServer(aggregator, plan))


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

"""The server's side of a row, for every host: what clients begin with, and what becomes of their updates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms.exchange import EVERYTHING, EXCHANGES
from ..algorithms.options import Options
from ..algorithms.phases import PHASES
from ..algorithms.server import SERVERS
from ..algorithms.structural import next_structural
from ..algorithms.table import Algorithm
from ..errors import UpdateError
from .local import Part, Statistics, trains
from .mean import Mean, WeightedMean
from .messages import Announcement, Assignment, Update
from .roles import Role, with_roles
from .server_state import ServerState
from .state import State, fingerprint

NOT_AVERAGED = frozenset({Role.NORM_BUFFER, Role.COUNTER})
"""What `buffers: keep` leaves as the server has it."""


class Coordinator:
    """A run of one algorithm at the server. `state` is all that it remembers.

    Args:
        model: the state of the warm-started model, whole.
        structural: whether it is also a structural copy.
        seed: the run's.
        mean: makes the mean of a round's updates, from the server's model.
    """

    def __init__(
        self,
        row: Algorithm,
        options: Options,
        model: State,
        roles: Mapping[str, Role],
        seed: int,
        structural: bool,
        mean: Callable[[State], Mean] = lambda model: WeightedMean(),
    ) -> None:
        self.mean = mean
        self.row, self.options, self.roles, self.seed = row, options, roles, seed
        self.state = ServerState(model, structural=model if structural else None)
        self._gated, self._rule = structural, SERVERS[row.server]
        self._hashed: tuple[State | None, str | None] | None = None
        """A structural copy and its fingerprint: states are never written into."""

    @property
    def parts(self) -> Sequence[Part]:
        """What happens at the clients in the round that is next."""
        return PHASES[self.row.phases].parts(self.options, self.state.round)

    @property
    def trains(self) -> bool:
        """Whether the weights change in the round that is next."""
        return trains(self.parts)

    def travelling(self, state: Mapping[str, Tensor]) -> State:
        """The part of a state that travels."""
        return with_roles(state, self.roles, EXCHANGES[self.row.exchange])

    @property
    def expected(self) -> State:
        """A state like those that the updates of the next round must have."""
        return self.travelling(self.state.model) if self.trains else OrderedDict()

    @property
    def expected_sums(self) -> dict[str, Tensor]:
        """Sums like those that the updates of the next round must have."""
        parts = (part for part in self.parts if isinstance(part, Statistics))
        return {name: value for part in parts for name, value in part.expected(self.state.model).items()}

    def next_round(self) -> bool:
        """Let the structural copy follow, before a round's assignments. Whether it changed."""
        before = self.state.structural
        if before is None:
            return False
        after = next_structural(before, self.state.model, self.state.round, self.options)
        if after is before:
            return False
        version = self.state.structural_version + 1
        self.state = replace(self.state, structural=after, structural_version=version)
        return True

    def assign(self, clients: Sequence[int]) -> list[Assignment]:
        """What each of the round's clients begins with, in their order."""
        return self._assigned({client: self.state.begins(n) for n, client in enumerate(clients)})

    def show(self, clients: Sequence[int]) -> list[Assignment]:
        """The global model for each of the clients, to have its own from, in their order."""
        return self._assigned(dict.fromkeys(clients, self.state.model))

    def _assigned(self, models: Mapping[int, State]) -> list[Assignment]:
        version = self.state.structural_version
        behind = [client for client in models if self.state.told.get(client, 0) < version]
        new = [client for client in models if self.state.told.get(client, 0) < 0]
        print_of = self.structural_fingerprint if behind else None
        assignments = []
        for client, model in models.items():
            sent = model if client in new else self.travelling(model)
            announced = self._announcement(sent, print_of) if self._gated and client in behind else None
            assignments.append(Assignment(sent, announced))
        return assignments

    def confirm(self, client: int) -> None:
        """A client answered, so it has what it was told."""
        version = self.state.structural_version
        if self.state.told.get(client, 0) != version:
            self.state = replace(self.state, told={**self.state.told, client: version})

    def forget(self, clients: Iterable[int]) -> None:
        """Take clients for new ones, that have nothing: what they are sent next is the whole model, which is
        the structural copy as well where both are equal, as in the first round."""
        self.state = replace(self.state, told={**self.state.told, **dict.fromkeys(clients, -1)})

    def begin(self, clients: Sequence[int]) -> Gathering:
        """Gather the updates of the round's clients."""
        self.state = replace(self.state, clients=len(clients))
        return Gathering(self, clients)

    def step(self, gathered: object, sums: Mapping[str, Tensor]) -> ServerState:
        """The state after the round, from what its clients sent; `self.state` stays until it is set.

        Args:
            gathered: their mean, or {slot: state}, as the row's server wants it; None in a round that
                trains nothing.
        """
        after = self.state
        if gathered is not None:
            after = self._rule.step(after, gathered, self.roles, self.options, self.seed)
        for part in self.parts:
            if isinstance(part, Statistics):
                slots = tuple(part.apply(slot, sums) for slot in after.slots)
                after = replace(after, model=part.apply(after.model, sums), slots=slots)
        return replace(after, round=after.round + 1)

    @property
    def separate(self) -> bool:
        """Whether the row's server takes the updates one by one rather than their mean."""
        return self._rule.separate

    def counted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The part of an update that reaches the row's server."""
        if self.options.buffers == "average":
            return state
        return with_roles(state, self.roles, EVERYTHING - NOT_AVERAGED)

    @property
    def structural_fingerprint(self) -> str | None:
        """Of the structural copy of the round that is next; None where there is none."""
        structural = self.state.structural
        if self._hashed is None or self._hashed[0] is not structural:
            self._hashed = structural, None if structural is None else fingerprint(structural)
        return self._hashed[1]

    def _announcement(self, sent: State, print_of: str | None) -> Announcement:
        """The structural copy costs nothing where it is what the client is sent anyway."""
        structural = self.state.structural
        if structural is None:
            return Announcement(None)
        same = sent.keys() == structural.keys() and all(
            torch.equal(sent[key], value) for key, value in structural.items()
        )
        return Announcement(print_of, None if same else structural)


class Gathering:
    """Takes the updates of one round one by one, so that they need not be held together."""

    def __init__(self, coordinator: Coordinator, clients: Sequence[int]) -> None:
        self._coordinator = coordinator
        self._slot = {client: position for position, client in enumerate(clients)}
        self._mean = coordinator.mean(coordinator.state.model)
        self._slots: dict[int, Mapping[str, Tensor]] = {}
        self._sums: Mapping[str, Tensor] = {}

    def add(self, update: Update) -> None:
        self._sums = added((self._sums, update.sums))
        state = self._coordinator.counted(update.state)
        if not state:
            return
        if self._coordinator.separate:
            self._slots[self._slot[update.client]] = state
        else:
            self._mean.add(state, update.samples)

    def finish(self) -> ServerState:
        """The server's state after the round. Raises UpdateError when no update was added."""
        gathered: object = None
        if self._coordinator.trains:
            gathered = self._slots if self._coordinator.separate else self._mean.result()
            if not gathered:
                raise UpdateError("there is no update to recombine: every client was skipped or refused")
        elif not self._sums:
            raise UpdateError("there are no sums to add up: every client was skipped or refused")
        return self._coordinator.step(gathered, self._sums)


def added(sums: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Totals by name."""
    totals: dict[str, Tensor] = {}
    for one in sums:
        for name, value in one.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals

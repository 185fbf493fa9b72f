"""The server's side of an algorithm, on every host: what silos begin a round with, and what their updates become."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import UpdateError
from .algorithm import EVERYTHING, Algorithm
from .local import Part, Statistics, trains
from .mean import Mean, WeightedMean
from .messages import Announcement, Assignment, Update
from .roles import Role, Roles, with_roles
from .server_state import ServerState
from .state import State, fingerprint, same_values

NOT_AVERAGED = frozenset({Role.NORM_BUFFER, Role.COUNTER})
"""What `buffers: keep` leaves as the server has it."""


class Server:
    """One run of one algorithm at the server. `state` is all that it remembers between rounds.

    Args:
        options: what the algorithm reads.
        model: the whole state of the warm-started model.
        roles: of the model's entries.
        seed: the run's.
        mean: makes the mean of a round's updates; it is given the server's model.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        options: Any,
        model: State,
        roles: Mapping[str, Role],
        seed: int,
        mean: Callable[[State], Mean] = lambda model: WeightedMean(),
    ) -> None:
        self.algorithm, self.options, self.roles, self.seed = algorithm, options, roles, seed
        self.mean = mean
        self.state = ServerState(model, structural=model if algorithm.gated else None)
        self._hashed: tuple[State | None, str | None] | None = None
        """A structural copy and its fingerprint. States are never written into."""

    @property
    def parts(self) -> Sequence[Part]:
        """What the silos do in the next round."""
        return self.algorithm.phases.parts(self.options, self.state.round)

    @property
    def trains(self) -> bool:
        """Whether the next round changes weights."""
        return trains(self.parts)

    @property
    def separate(self) -> bool:
        """Whether the server rule takes the updates one by one rather than their mean."""
        return self.algorithm.server.separate

    def travelling(self, state: Mapping[str, Tensor]) -> State:
        """The part of a state that travels."""
        return with_roles(state, self.roles, self.algorithm.exchange.travels)

    @property
    def expected(self) -> State:
        """A state with the keys, shapes and dtypes that an update of the next round must have."""
        return self.travelling(self.state.model) if self.trains else OrderedDict()

    @property
    def expected_sums(self) -> dict[str, Tensor]:
        """Sums with the names, shapes and dtypes that an update of the next round must have."""
        parts = (part for part in self.parts if isinstance(part, Statistics))
        return {name: value for part in parts for name, value in part.expected(self.state.model).items()}

    def follow_structural(self) -> bool:
        """Before a round's assignments, let the structural copy follow the global model. Returns whether it
        changed."""
        now = self.state
        if now.structural is None:
            return False
        after = self.algorithm.view.next_structural(now.structural, now.model, now.round, self.options)
        if after is now.structural:
            return False
        self.state = replace(now, structural=after, structural_version=now.structural_version + 1)
        return True

    def assign(self, silos: Sequence[int]) -> list[Assignment]:
        """What each of the round's silos begins with, in their order."""
        return self._assign({silo: self.state.begins(n) for n, silo in enumerate(silos)})

    def show(self, silos: Sequence[int]) -> list[Assignment]:
        """The global model for each of the silos, in their order: they make their own model from it."""
        return self._assign(dict.fromkeys(silos, self.state.model))

    def _assign(self, models: Mapping[int, State]) -> list[Assignment]:
        assignments = []
        for silo, model in models.items():
            told = self.state.told.get(silo, 0)
            # A silo that has nothing is sent the whole model.
            sent = model if told < 0 else self.travelling(model)
            behind = self.algorithm.gated and told < self.state.structural_version
            assignments.append(Assignment(sent, self._announcement(sent) if behind else None))
        return assignments

    def confirm(self, silo: int) -> None:
        """A silo answered, so it has the structural copy that it was told of."""
        version = self.state.structural_version
        if self.state.told.get(silo, 0) != version:
            self.state = replace(self.state, told={**self.state.told, silo: version})

    def forget(self, silos: Iterable[int]) -> None:
        """Take silos for new ones, that have nothing. They are sent the whole model next; where it equals the
        structural copy, as in the first round, it serves as both."""
        self.state = replace(self.state, told={**self.state.told, **dict.fromkeys(silos, -1)})

    def begin(self, silos: Sequence[int]) -> Gathering:
        """Gather the updates of the round's silos."""
        self.state = replace(self.state, clients=len(silos))
        return Gathering(self, silos)

    def step(self, gathered: Any, sums: Mapping[str, Tensor]) -> ServerState:
        """The state after the round, from what its silos sent. `self.state` does not change.

        Args:
            gathered: the updates' mean, or {position: state}, as the server rule wants it; None in a round that
                trains nothing.
        """
        after = self.state
        if gathered is not None:
            after = self.algorithm.server.step(after, gathered, self.roles, self.options, self.seed)
        for part in self.parts:
            if isinstance(part, Statistics):
                slots = tuple(part.apply(slot, sums) for slot in after.slots)
                after = replace(after, model=part.apply(after.model, sums), slots=slots)
        return replace(self._tie(after), round=after.round + 1)

    def _tie(self, state: ServerState) -> ServerState:
        """Give keys of one tensor one value: a rule may treat every key by itself, as FedMR does."""
        tied = self.roles.tied if isinstance(self.roles, Roles) else {}
        if not tied:
            return state
        model, *slots = (OrderedDict(one, **_of_first(one, tied)) for one in (state.model, *state.slots))
        return replace(state, model=model, slots=tuple(slots))

    def pass_over(self, before: ServerState) -> None:
        """End a round that no silo answered: the model stays as it was `before`."""
        # A silo that was started anew meanwhile has nothing of what it was told.
        self.state = replace(before, round=before.round + 1, told=self.state.told)

    def counted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The part of an update that reaches the server rule."""
        if self.options.buffers == "average":
            return state
        return with_roles(state, self.roles, EVERYTHING - NOT_AVERAGED)

    @property
    def structural_fingerprint(self) -> str | None:
        """SHA-256 of the structural copy of the next round; None where there is none."""
        structural = self.state.structural
        if self._hashed is None or self._hashed[0] is not structural:
            self._hashed = structural, None if structural is None else fingerprint(structural)
        return self._hashed[1]

    def _announcement(self, sent: State) -> Announcement:
        """The structural copy is not sent where it equals the weights that are sent anyway."""
        structural = self.state.structural
        if structural is None:
            return Announcement(None)
        same = sent.keys() == structural.keys() and all(same_values(sent[k], v) for k, v in structural.items())
        return Announcement(self.structural_fingerprint, None if same else structural)


class Gathering:
    """Takes the updates of one round one by one, so that they need not be held together."""

    def __init__(self, server: Server, silos: Sequence[int]) -> None:
        self._server = server
        self._position = {silo: position for position, silo in enumerate(silos)}
        self._mean = server.mean(server.state.model)
        self._separate: dict[int, Mapping[str, Tensor]] = {}
        self._sums: Mapping[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Add one update; it must fit what the server expects."""
        self._sums = add_sums((self._sums, update.sums))
        state = self._server.counted(update.state)
        if not state:
            return
        if self._server.separate:
            self._separate[self._position[update.silo]] = state
        else:
            self._mean.add(state, update.samples)

    def finish(self) -> None:
        """Give the server the state after the round. Raises UpdateError when no update was added."""
        gathered: Any = None
        if self._server.trains:
            gathered = self._separate if self._server.separate else self._mean.result()
            if not gathered:
                raise UpdateError("there is no update to recombine: every client was skipped or refused")
        elif not self._sums:
            raise UpdateError("there are no sums to add up: every client was skipped or refused")
        self._server.state = self._server.step(gathered, self._sums)


def _of_first(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> State:
    """The entries of tied keys as the first key of their tensor has them; a view of another shape stays."""
    pairs = ((key, state[key], state[first]) for key, first in tied.items() if {key, first} <= state.keys())
    return OrderedDict((key, theirs) for key, own, theirs in pairs if own.shape == theirs.shape)


def add_sums(sums: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Totals by name."""
    totals: dict[str, Tensor] = {}
    for one in sums:
        for name, value in one.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals

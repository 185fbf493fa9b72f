"""One federated round at the server, on every host: assignments, answers, refusals, the server's step, the record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..errors import UpdateError
from .messages import Assignment, Update, is_idle, packed, update_of
from .record import RoundRecord
from .server_state import ServerState
from .state import State, nbytes
from .updates import problem

log = logging.getLogger(__name__)


class Gathers(Protocol):
    """Takes the accepted updates of a round, in the order of its silos."""

    def add(self, update: Update) -> None: ...

    def finish(self) -> None:
        """Give the server what became of the updates."""


class RoundServer(Protocol):
    """What a round needs of a server: `Server` is one, and a host may put its own aggregation around it."""

    @property
    def state(self) -> ServerState: ...

    @property
    def expected(self) -> State: ...

    @property
    def expected_sums(self) -> Mapping[str, Tensor]: ...

    def follow_structural(self) -> bool: ...

    def assign(self, silos: Sequence[int]) -> list[Assignment]: ...

    def confirm(self, silo: int) -> None: ...

    def begin(self, silos: Sequence[int]) -> Gathers: ...

    def pass_over(self, before: ServerState) -> None: ...


class Round:
    """Updates are added in the order of the silos, whatever the order in which they arrive; so the sums are the same.
    An answer that comes early waits.

    Args:
        silos: those of the round, in order.
        samples: of every silo: its weight in the mean.
        record: takes bytes and notes.
        fatal: the option that makes a refused update end the run, in the host's words; None: the round goes on
            without the update.
    """

    def __init__(
        self,
        server: RoundServer,
        silos: Sequence[int],
        samples: Mapping[int, float],
        record: RoundRecord,
        fatal: str | None = None,
    ) -> None:
        self._server, self._samples, self._fatal = server, samples, fatal
        self.record, self.silos = record, list(silos)
        if server.follow_structural():
            what = "gates are unfrozen" if server.state.structural is None else "structural copy has changed"
            log.info("round %d: the %s", record.round, what)
        self.assignments = dict(zip(self.silos, server.assign(self.silos), strict=True))
        """What each silo is sent."""
        self._expected, self._expected_sums = server.expected, server.expected_sums
        record.bytes_down += sum(nbytes(packed(sent)) for sent in self.assignments.values())
        self._before = server.state
        self._gathering = server.begin(self.silos)
        self._early: dict[int, tuple[Mapping[str, Tensor], str | None]] = {}
        self._turn = self._accepted = 0
        self.missing = list(silos)
        """Silos that have not answered."""
        self.refused: list[int] = []
        """Silos whose update was refused."""

    def take(self, silo: int, answer: Mapping[str, Tensor], objection: str | None = None) -> None:
        """Take a silo's answer: the state and sums of its update as one mapping (`messages.with_sums`).

        Args:
            objection: why the host refuses it, whatever its values are.

        Raises:
            UpdateError: it is refused, and `fatal` says that this ends the run.
        """
        if silo not in self.missing:
            again = "has answered already" if silo in self.silos else "is not in this round"
            self._refuse(silo, f"it {again}")
            return
        self.missing.remove(silo)
        self.record.bytes_up += nbytes(answer)
        if objection is None:
            # Now: when its turn comes, a new process may serve the silo.
            self._server.confirm(silo)
        self._early[self.silos.index(silo)] = answer, objection
        while self._turn in self._early:
            self._gather(self._turn)
            self._turn += 1

    def close(self) -> None:
        """Let the server take the step. Raises UpdateError when no update was accepted."""
        for position in sorted(self._early):
            self._gather(position)
        if not self._accepted:
            why = "; ".join(self.record.notes) or "no silo answered"
            raise UpdateError(f"no update is left to aggregate: {why}")
        self._gathering.finish()

    def pass_over(self) -> None:
        """End the round without an update: the model stays as it was."""
        self._server.pass_over(self._before)

    def _gather(self, position: int) -> None:
        silo, (answer, reason) = self.silos[position], self._early.pop(position)
        if reason is None and is_idle(answer):
            line = f"round {self.record.round}: silo {silo} has no batch to train on and is left out of the mean"
            note(self.record, f"{line}: its loader gives none (drop_last with fewer samples than batch_size?)")
            return
        try:
            update = update_of(silo, self._samples[silo], answer)
            reason = reason or problem(update, self._expected, self._expected_sums)
        except UpdateError as error:
            reason = str(error)
        if reason is not None:
            self._refuse(silo, reason)
            return
        self._accepted += 1
        self._gathering.add(update)

    def _refuse(self, silo: int, reason: str) -> None:
        self.refused.append(silo)
        line = f"round {self.record.round}: the update of silo {silo} is refused: {reason}"
        if self._fatal is not None:
            raise UpdateError(f"{line} ({self._fatal})")
        note(self.record, line)


def skip_empty(silos: Sequence[int], samples: Mapping[int, float], record: RoundRecord) -> list[int]:
    """The silos that have a sample to train on; the others are noted. Raises UpdateError when none has."""
    found = []
    for silo in silos:
        if samples.get(silo):
            found.append(silo)
        else:
            note(record, f"round {record.round}: silo {silo} has no samples and is skipped")
    if not found:
        raise UpdateError(f"round {record.round}: none of the silos {list(silos)} has a sample to train on")
    return found


def note(record: RoundRecord, line: str) -> None:
    """Tell the user: now in the log, and at the end of the run."""
    record.notes.append(line)
    log.warning(line)

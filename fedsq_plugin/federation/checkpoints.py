"""How a run goes on that was cut off: what its processes save after a round, and read when they start anew.

No random generator is saved: everything that is drawn is drawn from a seed of the recipe and the round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .client_states import ClientStates
from .server_state import ServerState
from .snapshots import ServerSnapshots, SiloSnapshots, refuse_started

log = logging.getLogger(__name__)


class ServerCheckpoints:
    """The server's checkpoints in a folder. `round` is the round of the newest; `oldest` is the earliest round to which
    the run can go back. `notes` has lines for the user.

    Args:
        folder: None: nothing is saved.
        run: the options that a resumed run must have as it had them.
        every: rounds from one checkpoint to the next.
        rounds: of the run; the last one is always saved.
        resume: go on from the newest checkpoint, where there is one.

    Raises:
        ConfigError: the folder holds another run, or the same one, which is not to be resumed.
        WeightsError: the newest checkpoint is damaged, or is from another recipe.
    """

    def __init__(self, folder: str | None, run: Mapping[str, Any], every: int, rounds: int, resume: bool) -> None:
        self.folder, self._every, self._rounds = folder, every, rounds
        self._store: ServerSnapshots | None = None
        self._newest: tuple[ServerState, dict[str, Tensor]] | None = None
        self.round = self.oldest = 0
        self.notes: list[str] = []
        if folder is None:
            return
        path = Path(folder).expanduser()
        self._store = ServerSnapshots(path, run)
        refuse_started(path, self._store.rounds(), resume)
        self._newest = self._store.newest()
        self.oldest = min(self._store.rounds(), default=0)
        if self._newest is None and resume:
            self._note(f"there is no checkpoint in {path} yet: the run begins with round 1")

    def _note(self, line: str) -> None:
        log.warning(line)
        self.notes.append(line)

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint, and so needs no warm start."""
        return self._newest is not None

    def take_newest(self) -> tuple[ServerState, dict[str, Tensor]] | None:
        """The state to go on from, and what stays with the silos of this process; None where the run begins. It is
        given once."""
        newest, self._newest = self._newest, None
        if newest is not None:
            self.round = newest[0].round
            self._note(f"the run goes on after round {self.round}")
        return newest

    def save(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        """A round is over. Raises ConfigError where its checkpoint cannot be written."""
        if self._store is None or not (state.round % self._every == 0 or state.round == self._rounds):
            return
        self._store.save(state, silos)
        self.round = state.round
        self.oldest = min(self._store.rounds())


class SiloCheckpoints:
    """The checkpoints of a client process: what stays with its silos. Nothing is written where everything travels.

    Raises:
        ConfigError: as ServerCheckpoints.
    """

    def __init__(
        self, folder: str | None, run: Mapping[str, Any], states: ClientStates, silos: Sequence[int], resume: bool
    ) -> None:
        self._states, self._silos, self._resume = states, silos, resume
        self._store: SiloSnapshots | None = None
        if folder is not None and states.kept:
            path = Path(folder).expanduser()
            self._store = SiloSnapshots(path, run)
            refuse_started(path, self._store.rounds(), resume)

    def rewind(self) -> None:
        """The server was started anew: the next task may come after fewer finished rounds than the last one.

        Raises:
            ConfigError: something stays with the silos, and none of it was saved.
        """
        if self._store is None and self._states.kept:
            raise ConfigError(
                "the server was started anew, and what stays with the silos was not written down here: set "
                "fedsq_args.checkpoint_dir at the clients, too"
            )
        self._resume = True

    def restore(self, finished: int) -> None:
        """Before the first task of a resumed run, which comes after so many finished rounds: restore what stayed with
        the silos then. Raises WeightsError."""
        if self._store is None or not self._resume:
            return
        self._resume = False
        parts = {silo: self._store.load(silo, finished) for silo in self._silos}
        if finished and not any(parts.values()):
            log.warning("what stays with silos %s is not here: they begin with the server's", self._silos)
        self._states.restore({f"{silo}/{key}": value for silo, part in parts.items() for key, value in part.items()})

    def save(self, silo: int, finished: int, server_at: int) -> None:
        """A silo has trained in the round after so many. The server has a checkpoint of round `server_at`."""
        if self._store is not None and (part := self._states.of(silo)):
            self._store.save(silo, finished + 1, part, server_at)

"""How a run goes on that was cut off: what its processes save after a round, and read when they start anew.

A state is valid once its JSON file is there, which is written last. The newest one is used; the one before it stays
until the next is whole. No random generator is saved: everything that is drawn is drawn from a seed of the recipe and
the round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, WeightsError
from . import state_files
from .client_states import ClientStates
from .server_state import ServerState
from .state import fingerprint
from .state_files import FORMAT, Versions

log = logging.getLogger(__name__)
_STRUCTURAL, _SILOS = "structural/", "silos/"


class ServerCheckpoints:
    """The server's state in a folder, and what stays with the silos where they are in its process. `round` is the round
    of the newest checkpoint; `oldest` is the earliest round to which the run can go back. `notes` has lines for the
    user.

    The structural copy is in a file of its own, named by its fingerprint, because it seldom changes.

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
        self._newest: tuple[ServerState, dict[str, Tensor]] | None = None
        self._structural: tuple[int, str] | None = None
        """Version and fingerprint of the structural copy that was saved last."""
        self.round = self.oldest = 0
        self.notes: list[str] = []
        if folder is None:
            return
        self._path = Path(folder).expanduser()
        self._versions = Versions(self._path, "server", run)
        found = self._versions.rounds()
        _refuse_started(self._path, found, resume)
        if found:
            self._newest, self.oldest = self._load(found), found[0]
        elif resume:
            self._note(f"there is no checkpoint in {self._path} yet: the run begins with round 1")

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
        """A round is over. Raises ConfigError where its checkpoint cannot be written; older ones stay whole."""
        if self.folder is None or not (state.round % self._every == 0 or state.round == self._rounds):
            return
        print_of = self._save_structural(state)
        tensors = {key: value for key, value in state.tensors().items() if not key.startswith(_STRUCTURAL)}
        tensors |= {f"{_SILOS}{key}": value for key, value in silos.items()}
        self._versions.save(state.round, tensors, {"server": state.about(), "structural": print_of})
        self._versions.drop(before=([0, *self._versions.rounds()])[-2])
        kept = self._versions.rounds()
        self.round, self.oldest = state.round, kept[0]
        named = (self._versions.described(round).get("structural") for round in kept)
        stems = {self._structural_path(one).stem for one in named if one is not None}
        for path in self._path.glob("structural-*.*"):
            if path.stem not in stems:  # no checkpoint names it any more
                path.unlink(missing_ok=True)

    def _load(self, rounds: Sequence[int]) -> tuple[ServerState, dict[str, Tensor]]:
        try:
            tensors, about = self._versions.load(rounds[-1])
            silos = {k[len(_SILOS) :]: v for k, v in tensors.items() if k.startswith(_SILOS)}
            server = {k: v for k, v in tensors.items() if not k.startswith(_SILOS)}
            state = ServerState.of({**server, **self._load_structural(about)}, about.get("server") or {})
            if state.round != rounds[-1]:
                raise WeightsError(f"{self._path}: the snapshot of round {rounds[-1]} is of another one")
        except WeightsError as error:
            older = f" or remove it to go on from round {rounds[-2]}" if rounds[1:] else ""
            raise WeightsError(f"{error}; start anew in another folder{older}") from None
        return state, silos

    def _save_structural(self, state: ServerState) -> str | None:
        if state.structural is None:
            return None
        if self._structural is None or self._structural[0] != state.structural_version:
            self._structural = state.structural_version, fingerprint(state.structural)
        path = self._structural_path(self._structural[1])
        if not path.with_suffix(".json").exists():
            state_files.save(path, state.structural, {"format": FORMAT})
        return self._structural[1]

    def _load_structural(self, about: Mapping[str, Any]) -> dict[str, Tensor]:
        print_of = about.get("structural")
        if print_of is None:
            return {}
        path = self._structural_path(str(print_of))
        tensors, _ = state_files.load(path)
        if fingerprint(tensors) != print_of:
            raise WeightsError(f"{path}: not the structural copy {str(print_of)[:12]}… of the snapshot")
        return {f"{_STRUCTURAL}{key}": value for key, value in tensors.items()}

    def _structural_path(self, print_of: str) -> Path:
        return self._path / f"structural-{print_of[:16]}.safetensors"


class SiloCheckpoints:
    """The checkpoints of a client process: what stays with its silos, for every round to which the server may go back.
    Nothing is written where everything travels.

    Raises:
        ConfigError: as ServerCheckpoints.
    """

    def __init__(
        self, folder: str | None, run: Mapping[str, Any], states: ClientStates, silos: Sequence[int], resume: bool
    ) -> None:
        self._states, self._silos, self._run, self._resume = states, silos, run, resume
        self._path = Path(folder).expanduser() if folder is not None and states.kept else None
        if self._path is not None:
            names = {path.name.partition("-round")[0] for path in self._path.glob("silo-*-round*.json")}
            rounds = {round for name in names for round in Versions(self._path, name, run).rounds()}
            _refuse_started(self._path, sorted(rounds), resume)

    def rewind(self) -> None:
        """The server was started anew: the next task may come after fewer finished rounds than the last one.

        Raises:
            ConfigError: something stays with the silos, and none of it was saved.
        """
        if self._path is None and self._states.kept:
            raise ConfigError(
                "the server was started anew, and what stays with the silos was not written down here: set "
                "fedsq_args.checkpoint_dir at the clients, too"
            )
        self._resume = True

    def restore(self, finished: int) -> None:
        """Before the first task of a resumed run, which comes after so many finished rounds: restore what stayed with
        the silos then. What was saved later is removed. Raises WeightsError."""
        if self._path is None or not self._resume:
            return
        self._resume = False
        parts: dict[str, Tensor] = {}
        for silo in self._silos:
            versions = Versions(self._path, f"silo-{silo}", self._run)
            versions.drop(after=finished)  # the run goes another way from here
            if rounds := versions.rounds():
                parts |= {f"{silo}/{key}": value for key, value in versions.load(rounds[-1])[0].items()}
        if finished and not parts:
            log.warning("what stays with silos %s is not here: they begin with the server's", self._silos)
        self._states.restore(parts)

    def save(self, silo: int, finished: int, server_at: int) -> None:
        """A silo has trained in the round after so many. The server has a checkpoint of round `server_at`."""
        if self._path is not None and (part := self._states.of(silo)):
            versions = Versions(self._path, f"silo-{silo}", self._run)
            versions.save(finished + 1, part, {})
            versions.drop(before=max((r for r in versions.rounds() if r <= server_at), default=0))


def _refuse_started(folder: Path, rounds: Sequence[int], resume: bool) -> None:
    """Raise ConfigError where a run would overwrite another run's checkpoints, and is not told to go on with it."""
    if rounds and not resume:
        raise ConfigError(
            f"checkpoint_dir {folder} holds round {rounds[-1]} of a run: set fedsq_args.resume: true to go "
            "on with it, or name another folder"
        )

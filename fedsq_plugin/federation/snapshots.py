"""Saved states between two rounds, from which a run goes on after it was cut off.

A snapshot is valid once its JSON file is there, which is written last. The newest one is used; the one before it stays
until the next is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, WeightsError
from . import checkpoint
from .server_state import ServerState
from .state import fingerprint

FORMAT = 2
"""Version 0.1.0 wrote format 1."""
_STRUCTURAL, _SILOS = "structural/", "silos/"


class Versions:
    """The states of one name after several rounds, in files <name>-round<n>.safetensors and .json.

    Args:
        run: describes the run. A state of another run is refused.
    """

    def __init__(self, folder: Path, name: str, run: Mapping[str, Any]) -> None:
        self._folder, self._name, self._run = folder, name, dict(run)

    def rounds(self) -> list[int]:
        """The rounds of the states that are whole, ascending."""
        pattern = re.compile(rf"{re.escape(self._name)}-round(\d+)\.json")
        found = (pattern.fullmatch(path.name) for path in self._folder.glob(f"{self._name}-round*.json"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, round: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Save a state. Raises ConfigError where it cannot be written; older states stay whole."""
        whole = {"format": FORMAT, "run": self._run, **about}
        checkpoint.save(self._path(round), tensors, {**whole, "about_sha256": _digest(whole)})

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a state and its metadata. Raises WeightsError for one that is damaged, or of another run."""
        path = self._path(round)
        tensors, about = checkpoint.load(path)
        if about.get("format") != FORMAT:
            raise WeightsError(
                f"{path}: a checkpoint of format {about.get('format')}, and this version reads format {FORMAT}: end "
                "the run with the version that wrote it"
            )
        if about.pop("about_sha256", None) != _digest(about):
            raise WeightsError(f"{path}: {path.stem}.json was changed after it was written")
        if about["run"] != self._run:
            raise WeightsError(f"{path}: {_difference(self._run, about['run'])}")
        return tensors, about

    def described(self, round: int) -> dict[str, Any]:
        """The metadata of a state, without its tensors."""
        return checkpoint.described(self._path(round))

    def drop(self, before: int = 0, after: int | None = None) -> None:
        """Remove the states of rounds before `before` and after `after`."""
        for round in self.rounds():
            if round < before or (after is not None and round > after):
                # Without its JSON file a state is no longer valid, so that file goes first.
                self._path(round).with_suffix(".json").unlink(missing_ok=True)
                self._path(round).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"{self._name}-round{round:05d}.safetensors"


class ServerSnapshots:
    """The server's state, and what stays with the silos where they are in its process.

    The structural copy is in a file of its own, named by its fingerprint, because it seldom changes.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder, self._versions = folder, Versions(folder, "server", run)
        self._structural: tuple[int, str] | None = None

    def rounds(self) -> list[int]:
        """The rounds after which there is a snapshot, ascending."""
        return self._versions.rounds()

    def save(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        """Save the state after a round. Raises ConfigError where it cannot be written."""
        print_of = self._save_structural(state)
        tensors = {key: value for key, value in state.tensors().items() if not key.startswith(_STRUCTURAL)}
        tensors |= {f"{_SILOS}{key}": value for key, value in silos.items()}
        about = {"server": state.about(), "structural": print_of}
        self._versions.save(state.round, tensors, about)
        self._versions.drop(before=([0, *self.rounds()])[-2])
        self._drop_structural()

    def newest(self) -> tuple[ServerState, dict[str, Tensor]] | None:
        """The state to go on from, and what stays with the silos; None where there is none.

        Raises:
            WeightsError: it is damaged, or of another run.
        """
        rounds = self.rounds()
        if not rounds:
            return None
        try:
            tensors, about = self._versions.load(rounds[-1])
            silos = {k[len(_SILOS) :]: v for k, v in tensors.items() if k.startswith(_SILOS)}
            server = {k: v for k, v in tensors.items() if not k.startswith(_SILOS)}
            state = ServerState.of({**server, **self._load_structural(about)}, about.get("server") or {})
            if state.round != rounds[-1]:
                raise WeightsError(f"{self._folder}: the snapshot of round {rounds[-1]} is of another one")
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
            checkpoint.save(path, state.structural, {"format": FORMAT})
        return self._structural[1]

    def _load_structural(self, about: Mapping[str, Any]) -> dict[str, Tensor]:
        print_of = about.get("structural")
        if print_of is None:
            return {}
        path = self._structural_path(str(print_of))
        tensors, _ = checkpoint.load(path)
        if fingerprint(tensors) != print_of:
            raise WeightsError(f"{path}: not the structural copy {str(print_of)[:12]}… of the snapshot")
        return {f"{_STRUCTURAL}{key}": value for key, value in tensors.items()}

    def _drop_structural(self) -> None:
        """Remove structural copies that no snapshot names."""
        named = (self._versions.described(round).get("structural") for round in self.rounds())
        kept = {self._structural_path(one).stem for one in named if one is not None}
        for path in self._folder.glob("structural-*.*"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    def _structural_path(self, print_of: str) -> Path:
        return self._folder / f"structural-{print_of[:16]}.safetensors"


class SiloSnapshots:
    """What stays with the silos of a client process, for every round to which the server may go back."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder, self._run = folder, run

    def rounds(self) -> list[int]:
        """The rounds after which a silo has a snapshot, ascending."""
        silos = {path.name.partition("-round")[0] for path in self._folder.glob("silo-*-round*.json")}
        return sorted({round for name in silos for round in self._of(name).rounds()})

    def save(self, silo: int, round: int, part: Mapping[str, Tensor], server_at: int) -> None:
        """Save what stays with a silo after so many rounds. The server has a snapshot of round `server_at`."""
        versions = self._of(f"silo-{silo}")
        versions.save(round, part, {})
        versions.drop(before=max((r for r in versions.rounds() if r <= server_at), default=0))

    def load(self, silo: int, round: int) -> dict[str, Tensor]:
        """What stayed with a silo after so many rounds; empty where it had not trained. Newer states are removed."""
        versions = self._of(f"silo-{silo}")
        until = [one for one in versions.rounds() if one <= round]
        versions.drop(after=round)  # the run goes another way from here
        return versions.load(until[-1])[0] if until else {}

    def _of(self, name: str) -> Versions:
        return Versions(self._folder, name, self._run)


def refuse_started(folder: Path, rounds: list[int], resume: bool) -> None:
    """Raise ConfigError where a run would overwrite another run's checkpoints, and is not told to go on with it."""
    if rounds and not resume:
        raise ConfigError(
            f"checkpoint_dir {folder} holds round {rounds[-1]} of a run: set fedsq_args.resume: true to go "
            "on with it, or name another folder"
        )


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    said = (f"{key} {theirs.get(key)!r} (here {ours.get(key)!r})" for key in keys[:3])
    return f"it is of a run with {', '.join(said)}{' and more' if keys[3:] else ''}"

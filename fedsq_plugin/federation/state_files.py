"""States on disk: safetensors for the tensors, JSON beside them for everything else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from .files import atomic_write
from .state import fingerprint

FORMAT = 2
"""Of the files of `Versions`. Version 0.1.0 wrote format 1."""


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `path` (.safetensors) and, last, `path` with the suffix .json, which names the content."""
    from safetensors.torch import save as encode

    with contextlib.suppress(OSError):  # atomic_write says what is wrong with the place
        path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    atomic_write(path, encode(contiguous))
    # safetensors keeps no order of its own, and a fingerprint depends on it.
    described = {**about, "keys": list(contiguous), "sha256": fingerprint(contiguous)}
    atomic_write(path.with_suffix(".json"), (json.dumps(described, indent=1) + "\n").encode())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote. Raises WeightsError when a file is missing, damaged or foreign."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = described(path)
    try:
        tensors = load_file(path)
        ordered = {key: tensors[key] for key in about.pop("keys")}
        expected = about.pop("sha256")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint ({error})") from None
    if len(ordered) != len(tensors) or fingerprint(ordered) != expected:
        raise WeightsError(f"{path}: its content is not what {path.stem}.json says")
    return ordered, about


def described(path: Path) -> dict[str, Any]:
    """The JSON beside a state: `about`, keys and content. Raises WeightsError as `load` does."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint ({error})") from None
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: not a whole checkpoint ({path.stem}.json holds no object)")
    return about


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
        save(self._path(round), tensors, {**whole, "about_sha256": _digest(whole)})

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a state and its metadata. Raises WeightsError for one that is damaged, or of another run."""
        path = self._path(round)
        tensors, about = load(path)
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
        return described(self._path(round))

    def drop(self, before: int = 0, after: int | None = None) -> None:
        """Remove the states of rounds before `before` and after `after`."""
        for round in self.rounds():
            if round < before or (after is not None and round > after):
                # Without its JSON file a state is no longer valid, so that file goes first.
                self._path(round).with_suffix(".json").unlink(missing_ok=True)
                self._path(round).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"{self._name}-round{round:05d}.safetensors"


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    said = (f"{key} {theirs.get(key)!r} (here {ours.get(key)!r})" for key in keys[:3])
    return f"it is of a run with {', '.join(said)}{' and more' if keys[3:] else ''}"

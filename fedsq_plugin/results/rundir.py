"""The files of a run. Each file is either complete or does not exist.

A file is written under a temporary name, flushed to the disk and then renamed. If a run is killed, no file
under a final name is incomplete.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..errors import ConfigError
from ..federation.files import atomic_write
from .metrics import METRICS, Row, checked, frame, parse, refuse_repeats, render

__all__ = ["METRICS", "RunDirectory", "atomic_write"]


class RunDirectory:
    """config.yaml, environment.json, metrics.csv, summary.json, plots and checkpoints of one run."""

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        """Use `create`, `resume` or `open`: they check the folder."""
        self.path = path
        self._rows = list(rows)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Create the folder `path`, with its parents, for a new run.

        Raises:
            ConfigError: the path exists and is not an empty folder, or cannot be written.
        """
        folder = Path(path)
        try:
            if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
                raise ConfigError(f"output folder {folder} exists and is not an empty folder; name a new one")
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits can be wrong on network and read-only file systems, so a test file is written.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"output folder {folder} cannot be written: {_describe(error)}; name another one"
            ) from error
        return cls(folder)

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Like `open`, but also for a run that ended before its first row."""
        folder = Path(path)
        if (folder / "config.yaml").is_file() and not (folder / "metrics.csv").exists():
            return cls(folder)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open the run in the folder `path`, to report on it or to continue it.

        Raises:
            ConfigError: there is no such folder, or its metrics.csv is missing or malformed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"no run folder {folder}; name one that `fedsq run --out` made")
        file = folder / "metrics.csv"
        return cls(folder, parse(_read(file), str(file)))

    def path_for(self, name: str) -> Path:
        """Return the path for a plot or checkpoint called `name`, and create its folder.

        Raises:
            ValueError: the path is outside the run's folder.
        """
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name!r} leads out of the run folder {self.path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @property
    def metrics(self) -> pd.DataFrame:
        """A copy of the rows so far, with the columns of METRICS."""
        return frame(self._rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and rewrite metrics.csv. After an error no row is added.

        Raises:
            ValueError: a row does not fit METRICS, or exists already. This is an error of the caller.
        """
        table = [*self._rows, *(checked(row) for row in rows)]
        refuse_repeats(table)
        atomic_write(self.path / "metrics.csv", render(table))
        self._rows = table

    def forget(self, algorithm: str, seed: int, after: int) -> None:
        """Remove the rows of a run after round `after`; the run will repeat these rounds."""
        kept = [
            row for row in self._rows if (row["algorithm"], row["seed"]) != (algorithm, seed) or row["round"] <= after
        ]
        if len(kept) < len(self._rows):
            atomic_write(self.path / "metrics.csv", render(kept))
            self._rows = kept

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, with the keys in the given order. From then on the folder is this run's.

        Raises:
            ConfigError: another run has written its own there, perhaps since `create`.
        """
        text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        try:
            atomic_write(self.path / "config.yaml", text.encode(), new=True)
        except FileExistsError:
            raise ConfigError(f"output folder {self.path} is another run's by now; name a new one") from None

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json; NaN and infinity become null."""
        atomic_write(self.path / "environment.json", _to_json(environment))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; NaN and infinity become null."""
        atomic_write(self.path / "summary.json", _to_json(summary))

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml. ConfigError if it is missing or not a mapping."""
        return self._load("config.yaml", yaml.safe_load)

    @property
    def environment(self) -> dict[str, Any]:
        """The content of environment.json. ConfigError if it is missing or not an object."""
        return self._load("environment.json", json.loads)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json, empty if it is missing. ConfigError if it is not an object."""
        return self._load("summary.json", json.loads) if (self.path / "summary.json").exists() else {}

    def _load(self, name: str, load: Callable[[str], Any]) -> dict[str, Any]:
        file = self.path / name
        try:
            content = load(_read(file))
        except ConfigError:
            raise
        except (ValueError, yaml.YAMLError) as error:
            detail = " ".join(str(error).split())
            raise ConfigError(f"{file} cannot be read: {detail}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds {type(content).__name__}; expected keys and values")
        return content


def _read(file: Path) -> str:
    try:
        # Not read_text: it changes a carriage return inside a name into a line break.
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise ConfigError(f"no {file.name} in {file.parent}; name the folder of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _to_json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(_to_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # values of numpy and torch, without an import of them
        return _to_plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value

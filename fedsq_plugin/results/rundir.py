"""A run's results on disk, each file either absent or whole.

Every file is written under a temporary name beside its own, flushed to the disk and renamed, so a
killed run never leaves half a file under a final name.
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
        """Use `create` or `open`, which look at the disk."""
        self.path = path
        self._rows = list(rows)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """A new run in the folder `path`, made with its parents.

        ConfigError if it exists and is not an empty folder, or cannot be written.
        """
        folder = Path(path)
        try:
            if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
                raise ConfigError(f"output folder {folder} exists and is not an empty folder; name a new one")
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits lie on network and read-only file systems; a first file does not.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"output folder {folder} cannot be written: {_reason(error)}; name another one"
            ) from error
        return cls(folder)

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """As `open`, also for a run that was cut off before its first row."""
        folder = Path(path)
        if (folder / "config.yaml").is_file() and not (folder / "metrics.csv").exists():
            return cls(folder)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The run in the folder `path`, to report on it or to go on with it.

        ConfigError without such a folder, or where its metrics.csv is missing or malformed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"no run folder {folder}; name one that `fedsq run --out` made")
        file = folder / "metrics.csv"
        return cls(folder, parse(_read(file), str(file)))

    def path_for(self, name: str) -> Path:
        """Where a plot or checkpoint called `name` belongs; its folder exists afterwards.

        ValueError for a name that leads out of the run's folder.
        """
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name!r} leads out of the run folder {self.path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @property
    def metrics(self) -> pd.DataFrame:
        """A copy of the rows so far, columns as METRICS says."""
        return frame(self._rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and rewrite metrics.csv. All of them are kept, or none.

        ValueError for a row that does not fit METRICS or is there already: that is the caller's
        mistake, not the user's.
        """
        table = [*self._rows, *(checked(row) for row in rows)]
        refuse_repeats(table)
        atomic_write(self.path / "metrics.csv", render(table))
        self._rows = table

    def forget(self, algorithm: str, seed: int, after: int) -> None:
        """Remove the rows of a run's rounds after this one, which it makes anew."""
        kept = [
            row for row in self._rows if (row["algorithm"], row["seed"]) != (algorithm, seed) or row["round"] <= after
        ]
        if len(kept) < len(self._rows):
            atomic_write(self.path / "metrics.csv", render(kept))
            self._rows = kept

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml, keys in the order given."""
        text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        atomic_write(self.path / "config.yaml", text.encode())

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """environment.json; numbers that JSON lacks become null."""
        atomic_write(self.path / "environment.json", _json(environment))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json; numbers that JSON lacks, as NaN, become null."""
        atomic_write(self.path / "summary.json", _json(summary))

    @property
    def config(self) -> dict[str, Any]:
        """What `write_config` wrote. ConfigError if it is not there or not a YAML mapping."""
        return self._mapping("config.yaml", yaml.safe_load)

    @property
    def environment(self) -> dict[str, Any]:
        """What `write_environment` wrote. ConfigError if it is not there or no JSON object."""
        return self._mapping("environment.json", json.loads)

    @property
    def summary(self) -> dict[str, Any]:
        """What `write_summary` wrote, empty before it did. ConfigError if it is no JSON object."""
        if not (self.path / "summary.json").exists():
            return {}
        return self._mapping("summary.json", json.loads)

    def _mapping(self, name: str, load: Callable[[str], Any]) -> dict[str, Any]:
        file = self.path / name
        try:
            content = load(_read(file))
        except (ValueError, yaml.YAMLError) as error:
            if isinstance(error, ConfigError):
                raise
            detail = " ".join(str(error).split())
            raise ConfigError(f"{file} cannot be read: {detail}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds {type(content).__name__}; expected keys and values")
        return content


def _read(file: Path) -> str:
    try:
        # Not read_text: it would turn a carriage return inside a name into a line end.
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise ConfigError(f"no {file.name} in {file.parent}; name the folder of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value

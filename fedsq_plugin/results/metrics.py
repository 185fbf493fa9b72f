"""The table of metrics.csv: its columns, what may stand in them, and its text form."""

from __future__ import annotations

import csv
import io
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ..errors import ConfigError

Row = dict[str, Any]

_TYPES: dict[str, type] = {
    "algorithm": str,
    "seed": int,
    "round": int,
    "split": str,
    "loss": float,
    "accuracy": float,
    "accuracy_released": float,
    "seconds": float,
    "seconds_evaluation": float,
    "bytes_up": int,
    "bytes_down": int,
}
METRICS = tuple(_TYPES)
"""Columns, one row per algorithm, seed, round (from 1) and split. `seconds` is the wall clock of the
round's training and aggregation, `seconds_evaluation` that of its evaluation; accuracies lie in
[0, 1]; bytes are summed over the clients. A number that does not exist, as after divergence, is
NaN. Source: design, section 4."""

SPLITS = {
    "test": "the global model on the global test data",
    "silos": "each silo's own model on its own test data",
    "silos_tuned": "each silo's own model on its own test data, after the final fine-tuning",
}
"""What is evaluated in the rows of a split; over silos accuracies are means over samples. "test" has
a row for every round, "silos" for every evaluated round, "silos_tuned" for the last one."""

KEY = ("algorithm", "seed", "round", "split")
"""The columns that name a row; no two rows share them."""

_EXPECTED = {str: "a printable name", int: "a 64-bit integer", float: "a number"}


def checked(row: Mapping[str, Any]) -> Row:
    """`row` with the columns of METRICS in order and plain Python values; None becomes NaN.

    Tensors and numpy scalars are accepted. ValueError, one line, for a missing, unknown or
    impossible value.
    """
    odd = sorted(set(METRICS) ^ set(row))
    if odd:
        raise ValueError(f"columns {', '.join(odd)} are missing or unknown; expected {_HEADER}")
    exact: dict[type, Callable[[Any], Any]] = {
        str: str,
        int: operator.index,
        float: lambda value: float("nan") if value is None else float(value),
    }
    return _converted(row, exact)


def parse(text: str, where: str) -> list[Row]:
    """The rows of a metrics.csv. `where` names the file in the errors.

    ConfigError, one line, for anything that `render` does not write, a file cut off included.
    """
    # A last field cut short may still be a number: only the missing line end gives it away.
    if not text.endswith("\n"):
        raise ConfigError(f"{where} is cut off in its last line; use a complete file")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(lines)
        if tuple(header) != METRICS:
            raise ValueError(f"the columns are {','.join(header)}; expected {_HEADER}")
        for fields in lines:
            if len(fields) != len(METRICS):
                raise ValueError(f"{len(fields)} fields; expected {len(METRICS)}")
            rows.append(_converted(dict(zip(METRICS, fields, strict=True)), {}))
        refuse_repeats(rows)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{where}, line {lines.line_num}: {error}") from None
    return rows


def render(rows: Sequence[Row]) -> bytes:
    """The metrics.csv of `rows`: floats in repr precision, so `parse` gives the same bits back."""
    text: str = frame(rows).to_csv(index=False, lineterminator="\n", na_rep="nan")
    return text.encode()


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a DataFrame with the columns of METRICS, typed even where there is no row."""
    names = {str: "object", int: "int64", float: "float64"}
    table = pd.DataFrame(rows, columns=list(METRICS))
    typed: pd.DataFrame = table.astype({column: names[kind] for column, kind in _TYPES.items()})
    return typed


def refuse_repeats(rows: Iterable[Row]) -> None:
    """ValueError, one line, if two rows have the same algorithm, seed, round and split."""
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        key = tuple(row[column] for column in KEY)
        if key in seen:
            named = ", ".join(f"{column} {value}" for column, value in zip(KEY, key, strict=True))
            raise ValueError(f"a second row for {named}; expected one")
        seen.add(key)


_HEADER = ",".join(METRICS)


def _converted(row: Mapping[str, Any], by: Mapping[type, Callable[[Any], Any]]) -> Row:
    values: Row = {}
    for column, kind in _TYPES.items():
        given = row[column]
        try:
            value = by.get(kind, kind)(given)
            # A line end in a name would break the file, the tables and the one-line errors.
            if kind is str and not (value and value.isprintable()):
                raise ValueError
            if kind is int and not -(2**63) <= value < 2**63:
                raise OverflowError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{column} is {given!r}; expected {_EXPECTED[kind]}") from None
        low, high = _LIMITS.get(column, (-float("inf"), float("inf")))
        if kind is not str and (value < low or value > high):
            raise ValueError(f"{column} is {value}; expected {low:g} to {high:g}")
        values[column] = value
    return values


_LIMITS: dict[str, tuple[float, float]] = {
    "round": (1, float("inf")),
    "accuracy": (0, 1),
    "accuracy_released": (0, 1),
    "seconds": (0, float("inf")),
    "seconds_evaluation": (0, float("inf")),
    "bytes_up": (0, float("inf")),
    "bytes_down": (0, float("inf")),
}

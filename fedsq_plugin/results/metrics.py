"""The table of metrics.csv: its columns, their allowed values, reading and writing."""

from __future__ import annotations

import csv
import io
import math
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
"""Columns of the table. It has one row per algorithm, seed, round (from 1) and split. `seconds` is the wall-clock
time of training and aggregation, `seconds_evaluation` that of the evaluation. Accuracies are in [0, 1]; bytes
are sums over the clients. A number that does not exist, for example after divergence, is NaN. Source: design,
section 4."""

SPLITS = {
    "test": "the global model on the global test data",
    "silos": "each silo's own model on its own test data",
    "silos_tuned": "each silo's own model on its own test data, after the final fine-tuning",
}
"""Split -> what is evaluated. Accuracies over silos are means over samples. "test" has rows for every round,
"silos" for every evaluated round, "silos_tuned" only for the last round."""

KEY = ("algorithm", "seed", "round", "split")
"""The columns that identify a row. No two rows have the same values in them."""

_EXPECTED = {str: "a printable name", int: "a 64-bit integer", float: "a number"}


def checked(row: Mapping[str, Any]) -> Row:
    """Return `row` with the columns in the order of METRICS and plain Python values; None becomes NaN.

    Tensors and numpy scalars are allowed.

    Raises:
        ValueError: a column is missing or unknown, or a value is not allowed.
    """
    odd = sorted(set(METRICS) ^ set(row))
    if odd:
        raise ValueError(f"columns {', '.join(odd)} are missing or unknown; expected {_HEADER}")
    exact: dict[type, Callable[[Any], Any]] = {
        int: operator.index,
        float: lambda value: math.nan if value is None else float(value),
    }
    return _convert(row, exact)


def parse(text: str, where: str) -> list[Row]:
    """Read the rows of a metrics.csv. `where` is the name of the file for errors.

    Raises:
        ConfigError: the text is not what `render` writes, or it is cut off.
    """
    # If the last field is cut off, the rest can still be a number. Only the missing line end shows it.
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
            rows.append(_convert(dict(zip(METRICS, fields, strict=True)), {}))
        refuse_repeats(rows)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{where}, line {lines.line_num}: {error}") from None
    return rows


def render(rows: Sequence[Row]) -> bytes:
    """Write `rows` as metrics.csv. Floats have all digits, so `parse` returns the same bits."""
    text: str = frame(rows).to_csv(index=False, lineterminator="\n", na_rep="nan")
    return text.encode()


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows as a DataFrame with the columns of METRICS. Without rows the columns have types, too."""
    names = {str: "object", int: "int64", float: "float64"}
    table = pd.DataFrame(rows, columns=list(METRICS))
    typed: pd.DataFrame = table.astype({column: names[kind] for column, kind in _TYPES.items()})
    return typed


def refuse_repeats(rows: Iterable[Row]) -> None:
    """Raise ValueError if two rows have the same algorithm, seed, round and split."""
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        key = tuple(row[column] for column in KEY)
        if key in seen:
            named = ", ".join(f"{column} {value}" for column, value in zip(KEY, key, strict=True))
            raise ValueError(f"a second row for {named}; expected one")
        seen.add(key)


_HEADER = ",".join(METRICS)


def _convert(row: Mapping[str, Any], by: Mapping[type, Callable[[Any], Any]]) -> Row:
    values: Row = {}
    for column, kind in _TYPES.items():
        given = row[column]
        try:
            value = by.get(kind, kind)(given)
            # A line break in a name would break the file, the tables and the one-line errors.
            if kind is str and not (value and value.isprintable()):
                raise ValueError
            if kind is int and not -(2**63) <= value < 2**63:
                raise OverflowError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{column} is {given!r}; expected {_EXPECTED[kind]}") from None
        low, high = _LIMITS.get(column, (-math.inf, math.inf))
        if kind is not str and (value < low or value > high):
            raise ValueError(f"{column} is {value}; expected {low:g} to {high:g}")
        values[column] = value
    return values


_LIMITS: dict[str, tuple[float, float]] = {
    "round": (1, math.inf),
    **dict.fromkeys(("accuracy", "accuracy_released"), (0, 1)),
    **dict.fromkeys(("seconds", "seconds_evaluation", "bytes_up", "bytes_down"), (0, math.inf)),
}

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.metrics import METRICS, checked, frame, parse, render

from .rows import row

HEADER = ",".join(METRICS)
LINE = "FedSQ,0,1,test,1.0,0.5,0.25,2.0,1.0,3000000,4000000"


def test_the_text_form() -> None:
    assert render([checked(row())]).decode() == f"{HEADER}\n{LINE}\n"


@given(
    loss=st.floats(),
    accuracy=st.floats(0, 1) | st.just(math.nan),
    seed=st.integers(-(2**63), 2**63 - 1),
    name=st.text(min_size=1).filter(str.isprintable),
)
def test_reading_gives_every_bit_back(loss: float, accuracy: float, seed: int, name: str) -> None:
    given_row = checked(row(loss=loss, accuracy=accuracy, seed=seed, algorithm=name))
    text = render([given_row]).decode()
    (read,) = parse(text, "metrics.csv")
    for column, value in given_row.items():
        if isinstance(value, float) and not math.isnan(value):
            assert struct.pack("d", read[column]) == struct.pack("d", value)
        else:
            assert read[column] == value or (value != value and math.isnan(read[column]))
    assert render([read]).decode() == text


def test_numpy_and_missing_values_become_plain_ones() -> None:
    plain = checked(row(seed=np.int64(3), accuracy=np.float64(0.1), loss=None))
    assert type(plain["seed"]) is int and type(plain["accuracy"]) is float
    assert math.isnan(plain["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "Fed\rSQ"}, r"algorithm is 'Fed\\rSQ'; expected a printable name"),
        ({"split": ""}, "split is ''"),
        ({"extra": 1}, "columns extra"),
        ({"round": 0}, "round is 0"),
        ({"round": 1.5}, "round is 1.5; expected a 64-bit integer"),
        ({"seed": 2**63}, "expected a 64-bit integer"),
        ({"accuracy": 57.9}, "accuracy is 57.9; expected 0 to 1"),
        ({"loss": "low"}, "loss is 'low'; expected a number"),
        ({"bytes_up": -1}, "bytes_up is -1"),
    ],
)
def test_impossible_rows_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(row(**change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"),
        (HEADER, "cut off"),
        (f"{HEADER}\n{LINE}", "cut off"),
        (f"{HEADER}\n{LINE[:30]}\n", "line 2: 8 fields; expected 11"),
        ("\n", "line 1: the columns are"),
        (f"a,b\n{LINE}\n", "line 1: the columns are a,b; expected algorithm,seed"),
        (f"{HEADER}\n{LINE.replace('0.5', 'half')}\n", "line 2: accuracy is 'half'"),
        (f"{HEADER}\n{LINE.replace('0.5', '')}\n", "line 2: accuracy is ''"),
        (f"{HEADER}\n{LINE.replace('0.5', '1.5')}\n", "line 2: accuracy is 1.5"),
        (f"{HEADER}\n{LINE}\n{LINE}\n", "a second row for algorithm FedSQ, seed 0, round 1"),
        (f'{HEADER}\n"FedSQ,0\n', "line 2: "),
    ],
)
def test_malformed_files_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text, "out/metrics.csv")
    assert str(caught.value).startswith("out/metrics.csv") and "\n" not in str(caught.value)


@given(cut=st.integers(0, 2 * len(LINE) + len(HEADER) + 1))
def test_a_file_cut_anywhere_inside_a_line_is_refused(cut: int) -> None:
    text = f"{HEADER}\n{LINE}\n{LINE.replace('0,1', '0,2')}\n"[:cut]
    if text.endswith("\n"):
        assert len(parse(text, "metrics.csv")) == text.count("\n") - 1
    else:
        with pytest.raises(ConfigError):
            parse(text, "metrics.csv")


def test_an_empty_table_is_typed() -> None:
    kinds = frame([]).dtypes
    assert list(kinds.index) == list(METRICS)
    assert kinds["seed"] == "int64" and kinds["accuracy"] == "float64"

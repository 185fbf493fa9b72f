"""Rows of metrics.csv for the tests, everything but what a test is about at a fixed value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsq_plugin.results.metrics import checked, frame

NAN = float("nan")


def row(**values: Any) -> dict[str, Any]:
    return {
        "algorithm": "FedSQ",
        "seed": 0,
        "round": 1,
        "split": "test",
        "loss": 1.0,
        "accuracy": 0.5,
        "accuracy_released": 0.25,
        "seconds": 2.0,
        "seconds_evaluation": 1.0,
        "bytes_up": 3_000_000,
        "bytes_down": 4_000_000,
        **values,
    }


def table(accuracies: Mapping[tuple[str, int], Sequence[float]], split: str = "test", **values: Any) -> pd.DataFrame:
    """Metrics of `split` with these accuracies per round, given per algorithm and seed."""
    rows = [
        row(algorithm=algorithm, seed=seed, round=number, accuracy=accuracy, split=split, **values)
        for (algorithm, seed), run in accuracies.items()
        for number, accuracy in enumerate(run, start=1)
    ]
    return frame([checked(row) for row in rows])

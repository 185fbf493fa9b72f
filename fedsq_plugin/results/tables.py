"""The frames of `statistics` as tables to read: in a terminal of 100 columns, or in a README.

Names of up to nine characters fit into 80 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from .statistics import measured, over_seeds, paired

ABSENT = "–"
"""Stands for a number that does not exist."""

_MEASURES = {
    "best_accuracy": "best\naccuracy %",
    "rounds_to_best": "rounds\nto best",
    "final_accuracy": "final\naccuracy %",
    "final_accuracy_released": "released\naccuracy %",
    "seconds_per_round": "seconds\n/round",
    "bytes_per_round": "MB\n/round",
}

_COMPARED = {"best accuracy": ("best_accuracy", 100, "points"), "rounds to best": ("rounds_to_best", 1, "rounds")}
"""The differences that are shown: per title the measure, a factor and its unit."""

_COMPARED_OF_ONE_ROUND = {"accuracy": ("final_accuracy", 100, "points")}


def run_table(runs: pd.DataFrame, metric: str = "accuracy") -> Table:
    """One row per run of `statistics.runs`; the seed only where there are several.

    Accuracies in percent of the split's samples, seconds of training and aggregation, MB = 10^6
    bytes over all clients, up and down. Columns that the runs lack are left out, and the released
    accuracy where no run has one. `metric` is what the accuracy of these runs measures.
    """
    titles = _titles(runs, metric)
    several = runs["seed"].nunique() > 1
    keys = ["algorithm", "seed"] if several else ["algorithm"]
    cells = [
        [str(run[key]) for key in keys] + [_with_deviation(column, float(run[column])) for column in titles]
        for run in runs.to_dict("records")
    ]
    return _table([*keys, *titles.values()], cells)


def compare_table(runs: pd.DataFrame, reference: str, metric: str = "accuracy") -> Table:
    """Mean ± sample deviation over seeds of each algorithm and, below, the paired differences.

    Two tables in one grid, since 100 columns do not hold them side by side. Units as in
    `run_table`; differences of accuracies in percentage points, as "+1.5 ± 0.8 points (3/3 seeds)",
    the brackets counting the seeds where the algorithm is strictly better. ConfigError for an
    unknown reference.
    """
    grid = Table.grid()
    titles = ["algorithm", "seeds", *_titles(runs, metric).values()]
    grid.add_row(_table(titles, [[name, *cells] for name, cells in _means(runs).items()]))
    differences = _differences(runs, reference)
    if differences:
        title = Text(f"difference to {reference}, paired by seed (seeds won)")
        titles = ["algorithm", *(_said(title, metric) for title in _compared(runs))]
        grid.add_row("")
        grid.add_row(title)
        grid.add_row(_table(titles, [[name, *cells] for name, cells in differences.items()]))
    return grid


def _titles(runs: pd.DataFrame, metric: str = "accuracy") -> dict[str, str]:
    """The measures to show of these runs, with their titles."""
    shown = measured(runs)
    if shown == ["final_accuracy"]:
        return {"final_accuracy": _said("accuracy %", metric)}
    if "final_accuracy_released" in shown and runs["final_accuracy_released"].isna().all():
        shown.remove("final_accuracy_released")
    return {measure: _said(_MEASURES[measure], metric) for measure in shown}


def _said(title: str, metric: str) -> str:
    """A title with the name of what was measured in place of accuracy."""
    return title.replace("accuracy", metric)


def _compared(runs: pd.DataFrame) -> dict[str, tuple[str, int, str]]:
    return _COMPARED if "best_accuracy" in runs else _COMPARED_OF_ONE_ROUND


def _means(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Per algorithm: number of seeds, then a cell per measure of `_titles`."""
    titles = _titles(runs)
    return {
        row["algorithm"]: [str(row["seeds"]), *(_with_deviation(m, row[f"{m}_mean"], row[f"{m}_std"]) for m in titles)]
        for row in over_seeds(runs).to_dict("records")
    }


def _differences(runs: pd.DataFrame, reference: str) -> dict[str, list[str]]:
    """Per algorithm other than the reference: a cell per difference of `_compared`."""
    cells: dict[str, list[str]] = {}
    for column, scale, unit in _compared(runs).values():
        for row in paired(runs, reference, column).to_dict("records"):
            mean, deviation, seeds = scale * row["mean"], scale * row["std"], row["n"]
            cell = ABSENT
            if not math.isnan(mean):
                spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
                cell = f"{round(mean, 1) + 0.0:+.1f}{spread} {unit}"  # + 0.0: no "-0.0"
            won = f" ({row['wins']}/{seeds} seed{'' if seeds == 1 else 's'})" if seeds else ""
            cells.setdefault(row["algorithm"], []).append(cell + won)
    return cells


def _with_deviation(measure: str, mean: float, deviation: float = math.nan) -> str:
    """A cell. Seconds and bytes go without deviation: there it tells of the machine's other work."""
    if math.isnan(mean):
        return ABSENT
    spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
    if "accuracy" in measure:
        spread = "" if math.isnan(deviation) else f" ± {100 * deviation:.1f}"
        return f"{100 * mean:.1f}{spread}"
    if measure == "rounds_to_best":
        return f"{mean:.1f}{spread}" if spread else f"{mean:.4g}"
    return _short(mean if measure == "seconds_per_round" else mean / 1e6)


def _short(value: float) -> str:
    """At least two significant digits, and no exponent: a table of 1e-05 and 2e+03 reads badly."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    decimals = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:.{min(max(decimals, 1), 6)}f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        # Where space is short the names fold; a number cut short would be another number.
        table.add_column(Text(title), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for cells in rows:
        # Text, so that rich does not take an algorithm's [brackets] for markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table

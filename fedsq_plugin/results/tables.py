"""Tables of the statistics for a terminal with 100 columns, or for a README.

With algorithm names of up to nine characters, 80 columns are enough.
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
"""Text for a number that does not exist."""

_MEASURES = {
    "best_accuracy": "best\naccuracy %",
    "rounds_to_best": "rounds\nto best",
    "final_accuracy": "final\naccuracy %",
    "final_accuracy_released": "released\naccuracy %",
    "seconds_per_round": "seconds\n/round",
    "bytes_per_round": "MB\n/round",
}

_COMPARED = {"best accuracy": ("best_accuracy", 100, "points"), "rounds to best": ("rounds_to_best", 1, "rounds")}
"""The differences to show: title -> (statistic, factor, unit)."""

_COMPARED_OF_ONE_ROUND = {"accuracy": ("final_accuracy", 100, "points")}


def run_table(runs: pd.DataFrame, metric: str = "accuracy") -> Table:
    """Make a table with one row per run of `statistics.runs`. It shows the seed only if there are several.

    Accuracies are in percent of the split's samples; seconds are of training and aggregation; MB are 10^6 bytes
    up and down over all clients. Statistics that the runs lack are left out, and so is the released accuracy if
    no run has one. `metric` is the name to show in place of accuracy.
    """
    titles = _list_titles(runs, metric)
    several = runs["seed"].nunique() > 1
    keys = ["algorithm", "seed"] if several else ["algorithm"]
    cells = [
        [str(run[key]) for key in keys] + [_format(column, float(run[column])) for column in titles]
        for run in runs.to_dict("records")
    ]
    return _make_table([*keys, *titles.values()], cells)


def compare_table(runs: pd.DataFrame, reference: str, metric: str = "accuracy") -> Table:
    """Make a table of mean ± sample deviation over seeds per algorithm, and below it the paired differences.

    The two tables are in one grid, because 100 columns are too few for both side by side. Units are as in
    `run_table`. Differences of accuracies are in percentage points, for example "+1.5 ± 0.8 points (3/3 seeds)":
    the algorithm is strictly better for 3 of 3 seeds.

    Raises:
        ConfigError: the reference is unknown.
    """
    grid = Table.grid()
    titles = _list_titles(runs, metric)
    means = [
        [row["algorithm"], str(row["seeds"]), *(_format(m, row[f"{m}_mean"], row[f"{m}_std"]) for m in titles)]
        for row in over_seeds(runs).to_dict("records")
    ]
    grid.add_row(_make_table(["algorithm", "seeds", *titles.values()], means))
    compared = _COMPARED if "best_accuracy" in runs else _COMPARED_OF_ONE_ROUND
    differences = _format_differences(runs, reference, compared.values())
    if differences:
        grid.add_row("")
        grid.add_row(Text(f"difference to {reference}, paired by seed (seeds won)"))
        names = ["algorithm", *(_insert_metric(title, metric) for title in compared)]
        grid.add_row(_make_table(names, [[name, *cells] for name, cells in differences.items()]))
    return grid


def _list_titles(runs: pd.DataFrame, metric: str) -> dict[str, str]:
    """Return the statistics to show of these runs, with their titles."""
    shown = measured(runs)
    if shown == ["final_accuracy"]:
        return {"final_accuracy": _insert_metric("accuracy %", metric)}
    if "final_accuracy_released" in shown and runs["final_accuracy_released"].isna().all():
        shown.remove("final_accuracy_released")
    return {measure: _insert_metric(_MEASURES[measure], metric) for measure in shown}


def _insert_metric(title: str, metric: str) -> str:
    return title.replace("accuracy", metric)


def _format_differences(
    runs: pd.DataFrame, reference: str, compared: Iterable[tuple[str, int, str]]
) -> dict[str, list[str]]:
    """Return for each algorithm except the reference one cell per difference."""
    cells: dict[str, list[str]] = {}
    for column, scale, unit in compared:
        for row in paired(runs, reference, column).to_dict("records"):
            mean, deviation, seeds = scale * row["mean"], scale * row["std"], row["n"]
            cell = ABSENT
            if not math.isnan(mean):
                spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
                cell = f"{round(mean, 1) + 0.0:+.1f}{spread} {unit}"  # + 0.0: no "-0.0"
            won = f" ({row['wins']}/{seeds} seed{'' if seeds == 1 else 's'})" if seeds else ""
            cells.setdefault(row["algorithm"], []).append(cell + won)
    return cells


def _format(measure: str, mean: float, deviation: float = math.nan) -> str:
    """Make a cell. Seconds and bytes have no deviation: it would show other work on the machine."""
    if math.isnan(mean):
        return ABSENT
    spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
    if "accuracy" in measure:
        spread = "" if math.isnan(deviation) else f" ± {100 * deviation:.1f}"
        return f"{100 * mean:.1f}{spread}"
    if measure == "rounds_to_best":
        return f"{mean:.1f}{spread}" if spread else f"{mean:.4g}"
    return _shorten(mean if measure == "seconds_per_round" else mean / 1e6)


def _shorten(value: float) -> str:
    """Give at least two significant digits and no exponent, which is hard to read in a table."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    decimals = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:.{min(max(decimals, 1), 6)}f}"


def _make_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        # If the table is too wide, names are folded. Numbers are not cut: they would be wrong.
        table.add_column(Text(title), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for cells in rows:
        # Text: in a plain string, rich would read [brackets] in a name as markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table

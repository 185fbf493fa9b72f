"""Plots as PNG files at 150 dpi: accuracy over rounds, and what each silo holds.

They use matplotlib's object interface: no display is needed and no global state is left behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import ConfigError
from .metrics import SPLITS
from .rundir import atomic_write
from .statistics import of_split

_DPI = 150

# Okabe and Ito's palette, whose colours the colour-blind tell apart, without its yellow, too pale
# for a line. Colours, dashes and markers come in 7, 4 and 9, which share no divisor, so that no two
# of the first 252 lines look alike, in grey no two of the first 36.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

_SHADED = 6
"""Up to this many lines have their ranges shaded; more shades would hide each other."""

_ENTRY = 0.42
"""Height in inches of a legend's entry of two lines, as one whose seeds diverged has."""

# From light blue on: in white, one sample would look like none.
_SHADES = LinearSegmentedColormap.from_list("", colormaps["Blues"](np.linspace(0.13, 1, 256)))

_NUMBERED = 20
"""Up to this many classes a heat map's cells hold numbers; more would not be legible."""

_CELL = {"numbered": 0.52, "named": 0.16, "plain": 0.1}
_LETTER = 0.1
"""Widths of a heat map's cell and, at most, of a letter in inches."""


def accuracy_over_rounds(
    metrics: pd.DataFrame,
    path: str | os.PathLike[str],
    split: str = "test",
    warm_start: float | None = None,
    metric: str = "accuracy",
) -> None:
    """Accuracy (percent of the split's samples), or what `metric` names, over rounds, a line per algorithm.

    The line is the mean over seeds; the shade reaches from the worst seed to the best, and is left
    out where the metrics are of more than 6 algorithms. Both end where a seed has no accuracy.
    `warm_start`, in [0, 1], is drawn as a reference. ConfigError if the metrics have no such split,
    or the file cannot be written.
    """
    rows = of_split(metrics, split)
    # A round that was not evaluated is no gap in the curve, as one that diverged is.
    rows = rows[rows["accuracy"].notna() | (rows["seconds_evaluation"] > 0)]
    # All of the metrics, so that an algorithm looks the same in the pictures of every split.
    algorithms = list(metrics["algorithm"].unique())
    height = max(4.8, _ENTRY * len(algorithms))
    figure = Figure(figsize=(9, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, algorithm in enumerate(algorithms):
        of = rows[rows["algorithm"] == algorithm]
        if not of.empty:
            _line(axes, of, number, len(algorithms))
    if warm_start is not None:
        axes.axhline(100 * warm_start, color="0.35", linestyle=":", linewidth=1.8, zorder=1)
        # In the margin at the line's own height, where no curve can cross it.
        axes.annotate(
            f"warm start\n{100 * warm_start:.1f}%",
            xy=(1, 100 * warm_start),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color="0.35",
            fontsize=9,
        )
    seeds = rows["seed"].nunique()
    drawn = "mean and range" if len(algorithms) <= _SHADED else "mean"
    over = f"\n{drawn} over {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"{metric[0].upper()}{metric[1:]} of {SPLITS.get(split, f'split {split}')}{over}", loc="left")
    axes.set_xlabel("round")
    axes.set_ylabel(f"{metric} (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    first, last = rows["round"].min(), rows["round"].max()
    margin = max(0.03 * (last - first), 0.3)
    axes.set_xlim(first - min(margin, 0.9), last + margin)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    _save(figure, path)


def label_distribution(
    counts: Sequence[Sequence[int]],
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    silos: Sequence[str] | None = None,
) -> None:
    """Samples of each class at each silo as a heat map, beside it the size of each silo.

    `counts[silo][class]`; names are numbers from 0 by default. Up to 20 classes each cell holds its
    number; a class that a silo lacks stays white. ConfigError if the counts are no full table of
    numbers from 0, the names do not fit it, or the file cannot be written.
    """
    table = _checked(counts, classes, silos)
    rows, columns = table.shape
    numbered = columns <= _NUMBERED
    cell = _CELL["numbered" if numbered else "plain" if classes is None else "named"]
    width = max(4.2, cell * columns)
    size = (width + 3.2, max(2.8, 0.3 * rows + 1.8))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    heat, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(width, 1.7))
    # The root: a Dirichlet split has classes of five samples beside classes of thousands.
    most = max(1, int(table.max()))
    scale = PowerNorm(0.5, vmin=0, vmax=most)
    shown = np.where(table > 0, table, np.nan)
    image = heat.imshow(shown, cmap=_SHADES, norm=scale, aspect="auto", interpolation="nearest")
    if numbered:
        for (silo, label), count in np.ndenumerate(table):
            if count:
                ink = "white" if count > 0.28 * most else "black"
                points = 9 if count < 10_000 else 7
                heat.text(label, silo, f"{count:,}", color=ink, size=points, ha="center", va="center")
    else:
        figure.colorbar(image, ax=sizes, label="samples", fraction=0.12, pad=0.02)
    _name(heat.xaxis, columns, classes, every=numbered)
    _name(heat.yaxis, rows, silos, every=True)
    if classes is not None and _LETTER * max(map(len, classes)) > width / columns:
        heat.tick_params(axis="x", rotation=90, labelsize=9 if numbered else 7.5)
    _edges(heat, rows, columns)
    heat.set_xlabel("class")
    heat.set_ylabel("silo")
    heat.set_title(f"Samples of each class: {table.sum():,} in {rows} silos", loc="left")
    totals = table.sum(axis=1)
    bars = sizes.barh(np.arange(rows), totals, height=0.7, color="0.75")
    sizes.bar_label(bars, labels=[f"{total:,}" for total in totals], padding=3, size=9)
    sizes.set_xlim(0, 1.6 * max(1, totals.max()))
    sizes.set_title("silo's total", loc="left", size=10)
    sizes.set_axis_off()
    _save(figure, path)


def _line(axes: Any, rows: pd.DataFrame, number: int, lines: int) -> None:
    """One algorithm's mean and range over its seeds."""
    table = 100 * rows.pivot(index="round", columns="seed", values="accuracy").sort_index()
    rounds = table.index.to_numpy()
    colour = _COLOURS[number % len(_COLOURS)]
    lost = int(rows.loc[rows["accuracy"].isna(), "seed"].nunique())
    label = rows["algorithm"].iloc[0]
    if lost:
        seeds = table.shape[1]
        label += f"\n({lost} of {seeds} seeds diverged)" if seeds > 1 else " (diverged)"
    # Markers of neighbouring lines at different rounds, or they would cover each other.
    step = max(1, len(rounds) // 10)
    axes.plot(
        rounds,
        table.mean(axis=1, skipna=False),
        color=colour,
        linestyle=_DASHES[number % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markevery=(number * step // max(1, lines), step),
        markersize=5,
        linewidth=1.8,
        label=label,
    )
    if table.shape[1] > 1 and lines <= _SHADED:
        low, high = table.min(axis=1, skipna=False), table.max(axis=1, skipna=False)
        axes.fill_between(rounds, low, high, color=colour, alpha=0.13, linewidth=0)


def _checked(
    counts: Sequence[Sequence[int]], classes: Sequence[str] | None, silos: Sequence[str] | None
) -> npt.NDArray[np.int64]:
    expected = "expected one list per silo, each with a number from 0 for every class"
    if not len(counts) or len({len(row) for row in counts}) != 1 or not len(counts[0]):
        raise ConfigError(f"label counts are no full table; {expected}")
    if not all(isinstance(count, Integral) and int(count) >= 0 for row in counts for count in row):
        raise ConfigError(f"label counts hold something else than sample counts; {expected}")
    table = np.array(counts, dtype=np.int64)
    for what, names, number in (("classes", classes, table.shape[1]), ("silos", silos, len(table))):
        if names is not None and len(names) != number:
            raise ConfigError(f"{len(names)} names for the {number} {what} of the label counts; expected {number}")
    return table


def _name(axis: Any, number: int, names: Sequence[str] | None, every: bool) -> None:
    if names is not None or every:
        labels = [str(place) for place in range(number)] if names is None else list(names)
        axis.set_ticks(range(number), labels)
    else:
        axis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 5, 10]))


def _edges(heat: Any, rows: int, columns: int) -> None:
    """Thin lines between the cells, so that white ones can be counted."""
    heat.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="0.88", linewidth=0.6)
    heat.tick_params(which="minor", length=0)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI))

"""Plots as PNG files at 150 dpi: accuracy over rounds, and samples of each class at each silo.

The plots use matplotlib's object interface, so they need no display and change no global state.
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

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its pale yellow. There are 7
# colours, 4 dashes and 9 markers. These numbers share no divisor, so the first 252 lines all look different;
# in print without colours, the first 36.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

_SHADED = 6
"""Maximum number of lines with a shaded range; more shades would hide each other."""

_ENTRY = 0.42
"""Height in inches of a legend entry with two lines of text (an algorithm with diverged seeds)."""

# The scale starts at light blue: white is for a class without samples.
_SHADES = LinearSegmentedColormap.from_list("", colormaps["Blues"](np.linspace(0.13, 1, 256)))

_NUMBERED = 20
"""Maximum number of classes for which the cells of a heat map show numbers."""

_CELL = {"numbered": 0.52, "named": 0.16, "plain": 0.1}
_LETTER = 0.1
"""Width of a heat map's cell, and maximum width of a letter, in inches."""


def accuracy_over_rounds(
    metrics: pd.DataFrame,
    path: str | os.PathLike[str],
    split: str = "test",
    warm_start: float | None = None,
    metric: str = "accuracy",
) -> None:
    """Draw accuracy (percent of the split's samples) over rounds, with one line per algorithm.

    The line is the mean over seeds. The shade goes from the worst seed to the best; with more than 6 algorithms
    there is no shade. Both end where a seed has no accuracy. `warm_start`, in [0, 1], is drawn as a reference.
    `metric` is the name to show in place of accuracy.

    Raises:
        ConfigError: the metrics have no such split, or the file cannot be written.
    """
    rows = of_split(metrics, split)
    # A round without evaluation is left out. A round that diverged stays, as a gap in the curve.
    rows = rows[rows["accuracy"].notna() | (rows["seconds_evaluation"] > 0)]
    # All algorithms, not only those of this split: then an algorithm has the same colour in every plot.
    algorithms = list(metrics["algorithm"].unique())
    figure, axes = make_axes(9, max(4.8, _ENTRY * len(algorithms)))
    for number, algorithm in enumerate(algorithms):
        of = rows[rows["algorithm"] == algorithm]
        if not of.empty:
            _draw_line(axes, of, number, len(algorithms))
    if warm_start is not None:
        axes.axhline(100 * warm_start, color="0.35", linestyle=":", linewidth=1.8, zorder=1)
        # The text is in the margin at the height of the line, so no curve crosses it.
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
    finish_plot(figure, axes, path)


def label_distribution(
    counts: Sequence[Sequence[int]],
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    silos: Sequence[str] | None = None,
) -> None:
    """Draw the samples of each class at each silo as a heat map, and next to it the size of each silo.

    `counts[silo][class]` are the samples. `classes` and `silos` are names; by default they are numbers from 0.
    With up to 20 classes each cell shows its number. A cell without samples is white.

    Raises:
        ConfigError: the counts are not a full table of numbers from 0, the names do not fit it, or the file
            cannot be written.
    """
    table = _check_counts(counts, classes, silos)
    rows, columns = table.shape
    numbered = columns <= _NUMBERED
    cell = _CELL["numbered" if numbered else "plain" if classes is None else "named"]
    width = max(4.2, cell * columns)
    figure = Figure(figsize=(width + 3.2, max(2.8, 0.3 * rows + 1.8)), dpi=_DPI, layout="constrained")
    heat, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(width, 1.7))
    # A square-root scale: in a Dirichlet split some cells have five samples and others thousands.
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
    _label_axis(heat.xaxis, columns, classes, every=numbered)
    _label_axis(heat.yaxis, rows, silos, every=True)
    if classes is not None and _LETTER * max(map(len, classes)) > width / columns:
        heat.tick_params(axis="x", rotation=90, labelsize=9 if numbered else 7.5)
    # Thin lines between the cells, so that the reader can count white cells.
    heat.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="0.88", linewidth=0.6)
    heat.tick_params(which="minor", length=0)
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


def make_axes(width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure of this size in inches, with one plot."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.add_subplot()


def style_line(number: int) -> dict[str, Any]:
    """Give line `number` its own colour, dashes and marker."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.8,
    }


def finish_plot(figure: Figure, axes: Any, path: str | os.PathLike[str], grid: str = "both") -> None:
    """Add the grid and the legend, and write the file."""
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    _save(figure, path)


def _draw_line(axes: Any, rows: pd.DataFrame, number: int, lines: int) -> None:
    """Draw one algorithm's mean and range over its seeds."""
    table = 100 * rows.pivot(index="round", columns="seed", values="accuracy").sort_index()
    rounds = table.index.to_numpy()
    style = style_line(number)
    lost = int(rows.loc[rows["accuracy"].isna(), "seed"].nunique())
    label = rows["algorithm"].iloc[0]
    if lost:
        seeds = table.shape[1]
        label += f"\n({lost} of {seeds} seeds diverged)" if seeds > 1 else " (diverged)"
    # Neighbouring lines have their markers at different rounds, so that they do not cover each other.
    step = max(1, len(rounds) // 10)
    markevery = (number * step // max(1, lines), step)
    axes.plot(rounds, table.mean(axis=1, skipna=False), label=label, markevery=markevery, **style)
    if table.shape[1] > 1 and lines <= _SHADED:
        low, high = table.min(axis=1, skipna=False), table.max(axis=1, skipna=False)
        axes.fill_between(rounds, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _check_counts(
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


def _label_axis(axis: Any, number: int, names: Sequence[str] | None, every: bool) -> None:
    if names is not None or every:
        labels = [str(place) for place in range(number)] if names is None else list(names)
        axis.set_ticks(range(number), labels)
    else:
        axis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 5, 10]))


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI))

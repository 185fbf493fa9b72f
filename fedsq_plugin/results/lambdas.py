"""A plot of ReLU-isation: λ of every activation at the start, as learned, and as hardened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ..errors import ConfigError
from .plots import _COLOURS, _DASHES, _DPI, _MARKERS, _save

_TARGET: dict[str, Any] = {
    "color": "0.75", "linestyle": "none", "marker": "_", "markersize": 15, "markeredgewidth": 6,
}  # fmt: skip
_LAYER = 0.19
"""Width of a layer in inches, at least: what a rotated name takes."""
_LETTER = 0.075
"""Width of a letter of a layer's name in inches, at most."""
_BESIDE = 2.8
"""Width of the scale and the legend in inches, at most."""


def lambda_profile(
    history: Sequence[Mapping[str, float]],
    learned_epochs: int,
    target: Mapping[str, float],
    path: str | os.PathLike[str],
) -> None:
    """λ on a logarithmic scale against the layers, in the network's order, as a PNG file.

    Args:
        history: λ by layer: at the start, then after each epoch, as `Reluised.history`.
        learned_epochs: how many of these epochs learned λ; its values after them are drawn as learned, and
            the last ones as hardened, where there were epochs after those.
        target: λ at which each layer is replaced, drawn as a reference.

    Raises:
        ConfigError: entries of the history or the target name other layers than its first, or none; λ is not
            a number above 0; there are fewer epochs than were learned in; or the file cannot be written.
    """
    layers = _checked(history, learned_epochs, target)
    longest = max(map(len, layers))
    width = max(7.5, _LAYER * len(layers) + _BESIDE)
    upright = _LETTER * (longest + 2) > (width - _BESIDE) / len(layers)
    size = (width, 4.2 + (_LETTER * longest if upright else 0))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(layers))
    axes.plot(places, [target[layer] for layer in layers], label="target", **_TARGET)
    for number, label, epoch in _lines(len(history) - 1, learned_epochs):
        axes.plot(
            places,
            [history[epoch][layer] for layer in layers],
            color=_COLOURS[number],
            linestyle=_DASHES[number],
            marker=_MARKERS[number],
            markersize=5,
            linewidth=1.8,
            label=label,
        )
    axes.set_title("λ of each activation, from smooth (1) to ReLU (∞)", loc="left")
    axes.set_xlabel("layer, from input to output")
    axes.set_ylabel("λ", rotation=0, labelpad=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xticks(places, layers, rotation=90 if upright else 0, fontsize=8)
    axes.margins(y=0.08)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    _save(figure, path)


def _lines(epochs: int, learned: int) -> list[tuple[int, str, int]]:
    """What is drawn: number of the line's look, label, place in the history."""
    found = [(0, "initial", 0)]
    if learned:
        found.append((1, f"learned\n(epoch {learned})", learned))
    if epochs > learned:
        found.append((2, f"hardened\n(epoch {epochs})", epochs))
    return found


def _checked(history: Sequence[Mapping[str, float]], learned_epochs: int, target: Mapping[str, float]) -> list[str]:
    """The layers, in order."""
    layers = list(history[0]) if history else []
    if not layers:
        raise ConfigError("the history of λ is empty; expected λ by layer at the start and after each epoch")
    if not 0 <= learned_epochs < len(history):
        raise ConfigError(
            f"λ was learned in {learned_epochs} epochs, yet the history has {len(history) - 1}; "
            "expected no more than that"
        )
    for what, values in [*((f"history[{i}]", entry) for i, entry in enumerate(history)), ("target", target)]:
        if set(values) != set(layers):
            raise ConfigError(f"{what} of λ names other layers than history[0]; expected the same ones")
        for layer, value in values.items():
            if not value > 0:
                raise ConfigError(f"{what} gives λ = {value} for layer '{layer}'; expected a number above 0")
    return layers

"""A plot of ReLU-isation: λ of every activation at the start, after learning and after hardening."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ..errors import ConfigError
from .plots import finish_plot, make_axes, style_line

_TARGET: dict[str, Any] = {"color": "0.75", "linestyle": "none", "marker": "_", "markersize": 15, "markeredgewidth": 6}
_LAYER = 0.19
"""Minimum width of a layer in inches: a rotated name needs it."""
_LETTER = 0.075
"""Maximum width of a letter of a layer's name in inches."""
_BESIDE = 2.8
"""Maximum width of the scale and the legend together in inches."""


def lambda_profile(
    history: Sequence[Mapping[str, float]],
    learned_epochs: int,
    target: Mapping[str, float],
    path: str | os.PathLike[str],
) -> None:
    """Draw λ on a logarithmic scale for each layer, in the order of the network, to a PNG file.

    Args:
        history: λ by layer at the start and after each epoch, as in `Reluised.history`.
        learned_epochs: number of epochs that learned λ. λ after them is drawn as "learned"; λ after the last
            epoch is drawn as "hardened", if more epochs followed.
        target: λ at which each layer is replaced. It is drawn as a reference.

    Raises:
        ConfigError: the history is empty; an entry or the target has other layers than the first entry; a λ is
            not above 0; the history has fewer epochs than `learned_epochs`; or the file cannot be written.
    """
    layers = _check(history, learned_epochs, target)
    longest = max(map(len, layers))
    width = max(7.5, _LAYER * len(layers) + _BESIDE)
    upright = _LETTER * (longest + 2) > (width - _BESIDE) / len(layers)
    figure, axes = make_axes(width, 4.2 + (_LETTER * longest if upright else 0))
    places = range(len(layers))
    axes.plot(places, [target[layer] for layer in layers], label="target", **_TARGET)
    for number, label, epoch in _list_lines(len(history) - 1, learned_epochs):
        axes.plot(places, [history[epoch][layer] for layer in layers], label=label, **style_line(number))
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
    finish_plot(figure, axes, path, grid="y")


def _list_lines(epochs: int, learned: int) -> list[tuple[int, str, int]]:
    """List the lines to draw: number of the style, label, index in the history."""
    found = [(0, "initial", 0)]
    if learned:
        found.append((1, f"learned\n(epoch {learned})", learned))
    if epochs > learned:
        found.append((2, f"hardened\n(epoch {epochs})", epochs))
    return found


def _check(history: Sequence[Mapping[str, float]], learned_epochs: int, target: Mapping[str, float]) -> list[str]:
    """Raise ConfigError if the arguments do not fit together. Return the layers in order."""
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

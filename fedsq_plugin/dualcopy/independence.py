"""Finds out whether the gates of a sample depend on the sample alone. Only such gates can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .copies import copy_model, without_global_hooks
from .passes import Watch
from .places import Place, Places

_SAMPLES = 4
_TOLERANCE = 1e-4
"""Relative difference of pre-activations that is more than rounding. A sample's own batch changes them by 1e-15."""


class _Inputs(Watch):
    """Records the inputs of the gated calls: they differ wherever gates could."""

    def __init__(self, own_pooling: bool, places: Places) -> None:
        super().__init__(own_pooling, places)
        self.found: list[tuple[str, Tensor]] = []

    def on_gated(self, call: Any, place: Place | None, run: Any) -> Any:
        self.found.append((place[0] if place else "", call.input.detach().clone()))
        return run()


def find_dependent(model: nn.Module, x: Tensor, own_pooling: bool) -> str | None:
    """Return the path of the first gated call whose gates depend on other samples of the batch; None: there is none.

    Args:
        model: the structural copy. A copy in float64 runs on a few samples, each in several batches.
        x: a batch (N, ...).
    """
    runner = copy_model(model, hooks=False)
    try:
        runner, x = runner.double(), x.double() if x.is_floating_point() else x
        first = _run(runner, x[:_SAMPLES], own_pooling)
    except RuntimeError:  # a model that casts by itself
        runner, x = copy_model(model, hooks=False), x.to(next((p.dtype for p in model.parameters()), x.dtype))
        first = _run(runner, x[:_SAMPLES], own_pooling)
    for other in _make_batches(x):
        try:
            found = _run(runner, other, own_pooling)
        except (RuntimeError, ValueError):
            if len(other) > 1:
                raise
            return first[0][0] if first else ""  # a model that does not take one sample alone compares samples
        path = _find_difference(first, found)
        if path is not None:
            return path
    return None


def _make_batches(x: Tensor) -> list[Tensor]:
    """Return batches that begin with the first sample of `x`: alone, and among other samples."""
    others = x[1:_SAMPLES] if len(x) > 1 else x.flip(-1)
    changed = x[_SAMPLES : 2 * _SAMPLES - 1] if len(x) > _SAMPLES else others.flip(-1)
    if x.is_floating_point():
        changed = 2 * changed + 0.5
    return [x[:1], torch.cat([x[:1], changed])]


def _run(model: nn.Module, x: Tensor, own_pooling: bool) -> list[tuple[str, Tensor]]:
    watch = _Inputs(own_pooling, Places(model))
    with torch.inference_mode(False), torch.no_grad(), without_global_hooks():
        x = x.clone()
        with watch:
            model(x)
    return watch.found


def _find_difference(first: Sequence[tuple[str, Tensor]], other: Sequence[tuple[str, Tensor]]) -> str | None:
    """Return the path of the first call whose input for the first sample differs."""
    if len(first) != len(other):
        return first[0][0] if first else ""
    for (path, one), (_, two) in zip(first, other, strict=True):
        if not one.dim() or not len(one) or one[0].shape != two[0].shape:
            return path
        gap = (one[0] - two[0]).abs().nan_to_num()
        if gap.numel() and gap.max() > _TOLERANCE * one[0].abs().nan_to_num().max().clamp(min=1e-30):
            return path
    return None

"""The weighted mean of updates, which are added one at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UpdateError
from .state import State


class Mean(Protocol):
    """Takes a round's updates one at a time, and gives their mean."""

    def add(self, state: Mapping[str, Tensor], weight: float) -> None: ...

    def result(self) -> State: ...


class WeightedMean:
    """A mean in float64 that holds only the sum: as much memory as two float32 models, whatever the number of silos.

    Entries keep their dtype. Integers (counters) are rounded, and stay integers.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    @property
    def weight(self) -> float:
        """Sum of the weights added so far."""
        return self._weight

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add one state. Its weight is a sample count, above zero."""
        if not 0 < weight < float("inf"):
            raise UpdateError(f"the weight of a state in a mean is {weight}; it must be above 0 and finite")
        if not self._sums:
            self._dtypes = {key: value.dtype for key, value in state.items()}
            self._sums = {k: v.detach().to(_wide(v), copy=True).mul_(weight) for k, v in state.items()}
        else:
            for key, total in self._sums.items():
                total.add_(state[key].detach().to(total.device, total.dtype), alpha=weight)
        self._weight += weight

    def result(self) -> State:
        """The mean. The sums are used up. Raises UpdateError when nothing was added."""
        if not self._sums:
            raise UpdateError("there is no update to average: every client was skipped or refused")
        mean: State = OrderedDict()
        for key in list(self._sums):
            value, dtype = self._sums.pop(key).div_(self._weight), self._dtypes[key]
            exact = dtype.is_floating_point or dtype.is_complex
            mean[key] = (value if exact else value.round()).to(dtype)
        return mean


class MeanOfDifferences:
    """The weighted mean as the start of the round plus the mean of the differences from it, in each entry's own
    precision: FLamby's order of operations (strategies/fed_avg.py), so that results are equal bit for bit. Integers
    are averaged as in WeightedMean.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self._start, self._exact = start, WeightedMean()
        self._sums: dict[str, Tensor] = {}
        self._order: list[str] = []
        self._weight = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add one state. Its weight is a sample count, above zero."""
        floating = {k: v for k, v in state.items() if v.is_floating_point()}
        self._exact.add({k: v for k, v in state.items() if k not in floating}, weight)
        for key, value in floating.items():
            part = (value.detach() - self._start[key]) * weight
            self._sums[key] = self._sums[key] + part if key in self._sums else part
        self._order = list(state)
        self._weight += weight

    def result(self) -> State:
        """The mean. Raises UpdateError when nothing was added."""
        if not self._order:
            raise UpdateError("there is no update to average: every client was skipped or refused")
        exact = self._exact.result() if len(self._sums) < len(self._order) else {}
        moved = {key: self._start[key] + total / self._weight for key, total in self._sums.items()}
        return OrderedDict((key, moved[key] if key in moved else exact[key]) for key in self._order)


def _wide(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64

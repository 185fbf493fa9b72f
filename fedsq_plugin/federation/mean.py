"""The weighted mean of updates, which are added one at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UpdateError
from .state import State, check_finite


class Mean(Protocol):
    """Takes a round's updates one at a time, and gives their mean."""

    def add(self, state: Mapping[str, Tensor], weight: float) -> None: ...

    def result(self) -> State: ...


class WeightedMean:
    """A mean in float64 that holds only the sum: as much memory as two float32 models, whatever the number of silos.

    Entries keep their dtype. The mean of integers is that of `IntegerMean`, which no float passes. An infinite or NaN
    entry stays where all silos have the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | IntegerMean] = {}
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
            self._sums = {key: self._begin(value.detach(), weight) for key, value in state.items()}
        else:
            for key, total in self._sums.items():
                value = state[key].detach()
                if isinstance(total, IntegerMean):
                    total.add(value, weight)
                else:
                    total.add_(_parts(value).to(total.device, total.dtype), alpha=weight)
        self._weight += weight

    def _begin(self, value: Tensor, weight: float) -> Tensor | IntegerMean:
        if not (value.is_floating_point() or value.is_complex()):
            return IntegerMean(value, weight)
        return _parts(value).to(torch.float64, copy=True).mul_(weight)

    def result(self) -> State:
        """The mean. The sums are used up. Raises UpdateError when nothing was added."""
        if not self._sums:
            raise UpdateError("there is no update to average: every client was skipped or refused")
        mean: State = OrderedDict()
        for key in list(self._sums):
            total, dtype = self._sums.pop(key), self._dtypes[key]
            if isinstance(total, IntegerMean):
                mean[key] = total.result()
                continue
            value = total.div_(self._weight)
            mean[key] = (torch.view_as_complex(value) if dtype.is_complex else value).to(dtype)
        return mean


def _parts(value: Tensor) -> Tensor:
    """A tensor of floats; of complex numbers, their parts: the product of an infinite one with a weight is NaN."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


class IntegerMean:
    """The weighted mean of integers or truth values, computed exactly and then rounded: half to even, as `round`.

    Beyond 2^53 a float64 does not hold every integer. What is equal at all silos is what it was, bit for bit.
    """

    def __init__(self, value: Tensor, weight: float) -> None:
        self._device, self._first = value.device, _array(value)
        self._total = _exact(weight)
        self._moved: np.ndarray[Any, Any] | None = None
        """Sum of weight · (value - first), of Python's numbers in a row; None while all values are equal."""

    def add(self, value: Tensor, weight: float) -> None:
        """Add one value."""
        other = _array(value)
        self._total += _exact(weight)
        if np.array_equal(other, self._first):
            return
        part = (_objects(other) - _objects(self._first)) * _exact(weight)
        self._moved = part if self._moved is None else self._moved + part

    def result(self) -> Tensor:
        """The mean, on the device and in the dtype of the first value."""
        mean = self._first
        if self._moved is not None:
            sums = _objects(self._first) * self._total + self._moved
            rounded = [round(Fraction(one) / self._total) for one in sums]
            mean = np.array(rounded, dtype=object).astype(self._first.dtype).reshape(self._first.shape)
        return torch.from_numpy(mean).to(self._device)


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    """An independent copy as an array, on the CPU."""
    return np.array(value.detach().cpu().numpy())


def _objects(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The entries in a row, as Python's integers."""
    return value.astype(object).ravel() * 1  # truth values become integers


def _exact(weight: float) -> int | Fraction:
    return int(weight) if weight == int(weight) else Fraction(weight)


class MeanOfDifferences:
    """The weighted mean as the start of the round plus the mean of the differences from it, in each entry's own
    precision: FLamby's order of operations (strategies/fed_avg.py), so that results are equal bit for bit. Integers,
    and tensors with an entry that is infinite or NaN at the start, are averaged as in WeightedMean.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self._start, self._exact = start, WeightedMean()
        self._differ = {k for k, v in start.items() if v.is_floating_point() and check_finite(v)}
        self._sums: dict[str, Tensor] = {}
        self._order: list[str] = []
        self._weight = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add one state. Its weight is a sample count, above zero."""
        floating = {k: v for k, v in state.items() if k in self._differ}
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

"""Finds smooth activations that are built from gated functions, such as hardswish = x·relu6(x + 3)/6.

relu6 alone is piecewise linear and can be gated. The product is quadratic in x inside a region, so it has no
fixed linear gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PRODUCT = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__imul__", "__rmul__"}
_AFFINE = {
    *("add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__", "__rsub__", "rsub"),
    *("div", "div_", "true_divide", "__truediv__", "__itruediv__", "neg", "neg_", "__neg__"),
    *("clone", "contiguous"),
    *_PRODUCT,
}
"""Names of torch functions that are affine in one tensor if all other arguments are numbers."""


class Products:
    """Follow the tensors of one forward, to find a gated call's result that is multiplied by the call's input.

    Tensors that differ only by a scale and an offset count as one value. Each value has a number.

    >>> import torch
    >>> x, seen = torch.ones(2), Products()
    >>> ramp = torch.relu(x)
    >>> seen.record_gate(x, ramp, call=7)
    >>> seen.find_product(torch.mul, (ramp, x))
    7
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._values: Any = WeakTensorKeyDictionary()  # tensor -> number of its value
        self._made: dict[int, tuple[int, int]] = {}  # value of a result -> (value of the input, gated call)

    def record_gate(self, source: Tensor, result: Tensor, call: int) -> None:
        """Record that the gated call computed `result` from `source`, possibly in place."""
        origin = self._number(source)
        self._values[result] = made = next(self._numbers)
        self._made[made] = (origin, call)

    def record_call(self, func: Any, args: Sequence[Any], value: int | None, result: Any) -> None:
        """Record the result of another function. `value` is what `find_scaled` returned before the call."""
        if not isinstance(result, Tensor):
            return
        if value is not None:
            self._values[result] = value
        elif any(result is arg for arg in args) and getattr(func, "__name__", "").endswith("_"):
            self._values[result] = next(self._numbers)  # the call wrote into this tensor

    def find_scaled(self, func: Any, args: Sequence[Any]) -> int | None:
        """Return the value that a call only scales and shifts; None for other calls."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        large = [tensor for tensor in tensors if tensor.numel() != 1] or tensors
        if getattr(func, "__name__", "") not in _AFFINE or len(large) != 1:
            return None
        return self._number(large[0])

    def find_product(self, func: Any, args: Sequence[Any]) -> int | None:
        """Return the gated call whose result is here multiplied by its own input; None for other calls."""
        if getattr(func, "__name__", "") not in _PRODUCT or len(args) < 2:
            return None
        for factor, other in (args[:2], args[1::-1]):
            if isinstance(factor, Tensor) and isinstance(other, Tensor):
                origin, call = self._made.get(self._number(factor), (None, None))
                if origin is not None and origin == self._number(other):
                    return call
        return None

    def _number(self, tensor: Tensor) -> int:
        value = self._values.get(tensor)
        if value is None:
            self._values[tensor] = value = next(self._numbers)
        return int(value)

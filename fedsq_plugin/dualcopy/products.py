"""Smooth activations made of gated functions: x·relu6(x + 3)/6, which is hardswish.

The function that makes the factor is piecewise linear, and would be gated by itself. Their product is not:
with its region given it is quadratic in x, so that it has no fixed linear gate.
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
"""Names of torch functions that are affine in one tensor where everything else is a number."""


class Products:
    """Follows, through one forward, which tensors are one value up to scale and offset, and which of these a
    gated call has made of which.

    >>> import torch
    >>> x, seen = torch.ones(2), Products()
    >>> ramp = torch.relu(x)
    >>> seen.made_by_gate(x, ramp, call=7)
    >>> seen.multiplied(torch.mul, (ramp, x))
    7
    """

    def __init__(self) -> None:
        self._names = count()
        self._values: Any = WeakTensorKeyDictionary()  # tensor -> name of its value, up to scale and offset
        self._made: dict[int, tuple[int, int]] = {}  # name of a value -> (name of what it was made of, call)

    def made_by_gate(self, source: Tensor, result: Tensor, call: int) -> None:
        """A gated function made `result` of `source`, perhaps in its place."""
        origin = self._value(source)
        self._values[result] = made = next(self._names)
        self._made[made] = (origin, call)

    def computed(self, func: Any, args: Sequence[Any], value: int | None, result: Any) -> None:
        """Another function made `result`; `value` is what `scaled` said before it did."""
        if not isinstance(result, Tensor):
            return
        if value is not None:
            self._values[result] = value
        elif any(result is arg for arg in args) and getattr(func, "__name__", "").endswith("_"):
            self._values[result] = next(self._names)  # written into: it is another value now

    def scaled(self, func: Any, args: Sequence[Any]) -> int | None:
        """The value whose multiple, with an offset, a call computes; None: it is no such call."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        large = [tensor for tensor in tensors if tensor.numel() != 1] or tensors
        if getattr(func, "__name__", "") not in _AFFINE or len(large) != 1:
            return None
        return self._value(large[0])

    def multiplied(self, func: Any, args: Sequence[Any]) -> int | None:
        """The gated call whose result, up to scale and offset, a call multiplies by what it was made of."""
        if getattr(func, "__name__", "") not in _PRODUCT or len(args) < 2:
            return None
        for factor, other in (args[:2], args[1::-1]):
            if isinstance(factor, Tensor) and isinstance(other, Tensor):
                origin, call = self._made.get(self._value(factor), (None, None))
                if origin is not None and origin == self._value(other):
                    return call
        return None

    def _value(self, tensor: Tensor) -> int:
        value = self._values.get(tensor)
        if value is None:
            self._values[tensor] = value = next(self._names)
        return int(value)

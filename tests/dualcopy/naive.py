"""A gated forward by other means than the package's, to hold it against.

The functions of torch are replaced by name while a copy runs. Masks are floats, pooling indices are int64,
and ordinary autograd differentiates h = a(r)·z + b(r).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Coefficients = tuple[Tensor, Tensor]
"""a and b of every element."""
Activation = Callable[[Tensor, Callable[[Tensor], Coefficients], bool], Tensor]
"""(pre-activation, rule that gives its coefficients, in place) -> activation."""


def _leaky(slope: float) -> Callable[[Tensor], Coefficients]:
    def rule(z: Tensor) -> Coefficients:
        one = torch.ones_like(z)
        return torch.where(z > 0, one, slope * one), torch.zeros_like(z)

    return rule


def _clipped(low: float, high: float) -> Callable[[Tensor], Coefficients]:
    def rule(z: Tensor) -> Coefficients:
        inside = ((z > low) & (z < high)).to(z.dtype)
        below, above = (z <= low).to(z.dtype), (z >= high).to(z.dtype)
        return inside, below * low + above * high

    return rule


def _above(threshold: float, value: float) -> Callable[[Tensor], Coefficients]:
    def rule(z: Tensor) -> Coefficients:
        open_ = (z > threshold).to(z.dtype)
        return open_, (1 - open_) * value

    return rule


class _Pass:
    """What replaces torch's functions; subclasses say where coefficients and indices come from."""

    def coefficients(self, z: Tensor, rule: Callable[[Tensor], Coefficients]) -> Coefficients:
        raise NotImplementedError

    def index(self, z: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        raise NotImplementedError

    def activate(self, z: Tensor, rule: Callable[[Tensor], Coefficients], inplace: bool) -> Tensor:
        a, b = self.coefficients(z, rule)
        return z.mul_(a).add_(b) if inplace else a * z + b

    def relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        return self.activate(input, _leaky(0.0), inplace)

    def relu_(self, input: Tensor) -> Tensor:
        return self.activate(input, _leaky(0.0), True)

    def relu6(self, input: Tensor, inplace: bool = False) -> Tensor:
        return self.activate(input, _clipped(0.0, 6.0), inplace)

    def leaky_relu(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        return self.activate(input, _leaky(negative_slope), inplace)

    def rrelu(
        self, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
    ) -> Tensor:
        return self.activate(input, _leaky((lower + upper) / 2), inplace)

    def hardtanh(self, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        return self.activate(input, _clipped(min_val, max_val), inplace)

    def threshold(self, input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
        return self.activate(input, _above(threshold, value), inplace)

    def prelu(self, input: Tensor, weight: Tensor) -> Tensor:
        open_, _ = self.coefficients(input, _leaky(0.0))
        slope = weight.reshape(1, -1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight
        return open_ * input + (1 - open_) * slope * input

    def max_pool(self, plain: Callable[..., Any], dims: int) -> Callable[..., Any]:
        def pooled(input: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
            index = self.index(input, lambda z: plain(z, *args, return_indices=True, **kwargs))
            flat = input.flatten(-dims).gather(-1, index.flatten(-dims))
            values = flat.reshape(index.shape)
            return (values, index) if return_indices else values

        return pooled

    def adaptive_max_pool(self, plain: Callable[..., Any], dims: int) -> Callable[..., Any]:
        pool = self.max_pool(plain, dims)

        def pooled(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
            return pool(input, output_size, return_indices=return_indices)

        return pooled

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replace the functions while the block runs."""
        names = ["relu", "relu_", "relu6", "leaky_relu", "rrelu", "hardtanh", "threshold", "prelu"]
        replaced: list[tuple[Any, str, Any]] = [(F, name, getattr(self, name)) for name in names]
        for name in ("relu", "relu_"):
            method = getattr(self, name)
            replaced.append((torch, name, method))
            replaced.append((Tensor, name, lambda z, method=method: method(z)))
        for dims in (1, 2, 3):
            for base, pool in (("max_pool", self.max_pool), ("adaptive_max_pool", self.adaptive_max_pool)):
                plain = getattr(F, f"{base}{dims}d")
                replaced.append((F, f"{base}{dims}d", pool(plain, dims)))
        with ExitStack() as stack:
            for owner, name, function in replaced:
                stack.enter_context(mock.patch.object(owner, name, function))
            yield


class _Record(_Pass):
    def __init__(self) -> None:
        self.tape: list[Any] = []

    def coefficients(self, z: Tensor, rule: Callable[[Tensor], Coefficients]) -> Coefficients:
        self.tape.append(rule(z))
        return self.tape[-1]

    def index(self, z: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        self.tape.append(pool(z)[1])
        return self.tape[-1]


class _Play(_Pass):
    def __init__(self, tape: list[Any]) -> None:
        self.tape = iter(tape)

    def coefficients(self, z: Tensor, rule: Callable[[Tensor], Coefficients]) -> Coefficients:
        return next(self.tape)

    def index(self, z: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        return next(self.tape)


def gated(structural: nn.Module, quantitative: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`quantitative` run under the decisions of `structural`, which is run in evaluation mode."""
    record = _Record()
    structural.eval()
    with torch.no_grad(), record.watching():
        structural(*args, **kwargs)
    play = _Play(record.tape)
    with play.watching():
        output = quantitative(*args, **kwargs)
    assert next(play.tape, None) is None, "the copies make different numbers of gated calls"
    return output

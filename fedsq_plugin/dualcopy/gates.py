"""Piecewise-linear gates: the structural copy finds the region, the quantitative copy scales by it.

For pre-activation z at one gated call, the region r(x) comes from the structural copy and the
quantitative copy computes h = a(r)·z + b(r) (FedSQ, arXiv 2604.02990; the regions and coefficients of
the activations other than ReLU are the piecewise-linear reading of that rule).

A region costs one byte per activation. Autograd keeps that byte and nothing else, PReLU excepted, whose
slope needs the pre-activation for its own gradient, as in the plain model.

`threshold_backward` and `leaky_relu_backward` are used as "scale by a mask" kernels: on a CPU they run
about ten times faster than `torch.where` or `masked_fill` with a bool mask, and like those they are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

LOW, LINEAR, HIGH = 0, 1, 2
"""Region codes. With two regions, HIGH does not occur."""


class Pieces(NamedTuple):
    """One call of a piecewise-linear activation, with its arguments normalised.

    Below `lower`: slope·z + low. Between: z. From `upper` on (if any): the constant `high`.
    """

    input: Tensor
    inplace: bool = False
    lower: float = 0.0
    slope: float | Tensor = 0.0
    low: float = 0.0
    upper: float | None = None
    high: float = 0.0


def regions(pieces: Pieces) -> Tensor:
    """Region of every pre-activation: uint8, same shape as the input.

    On a breakpoint the region is the one whose derivative PyTorch uses there.
    """
    z = pieces.input.detach()
    # relu and a cast are vectorised on every device; a comparison with a scalar is not.
    # NaN is in the linear region, so that it is passed on as by the plain activation.
    above = torch.relu(z).to(torch.bool) if pieces.lower == 0.0 else ~(z <= pieces.lower)
    code = above.view(torch.uint8)
    if pieces.upper is None:
        return code
    return code + (z >= pieces.upper).view(torch.uint8)


def _linear(region: Tensor, upper: float | None) -> Tensor:
    """1 where the region is the linear one, else 0 (uint8)."""
    return region if upper is None else (region == LINEAR).view(torch.uint8)


def _scale(z: Tensor, linear: Tensor, slope: float, inplace: bool) -> Tensor:
    """z where `linear` is 1, slope·z elsewhere; exact, also for infinite z and slope 0."""
    mask = linear.to(z.dtype)
    scaled: Tensor
    if slope == 0.0:
        kernel = _aten.threshold_backward
        scaled = kernel.grad_input(z, mask, 0, grad_input=z) if inplace else kernel(z, mask, 0)
    else:
        kernel, options = _aten.leaky_relu_backward, (mask, slope, False)
        scaled = kernel.grad_input(z, *options, grad_input=z) if inplace else kernel(z, *options)
    return scaled


class _Scale(torch.autograd.Function):
    """`_scale` with a gradient. Saves one byte per activation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, linear: Tensor, slope: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(linear)
        ctx.slope = slope
        if inplace:
            ctx.mark_dirty(z)
        return _scale(z, linear, slope, inplace)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (linear,) = ctx.saved_tensors
        # Only a second derivative needs the gradient itself to be differentiable.
        scale = _Scale.apply if torch.is_grad_enabled() else _scale
        return scale(grad, linear, ctx.slope, False), None, None, None


class _ScaleByWeight(torch.autograd.Function):
    """PReLU under a given gate: the slope is a parameter (one value, or one per channel)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, open_: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, open_, weight)
        return _select(z, open_) + _per_channel(weight, z) * _select(z, 1 - open_)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        z, open_, weight = ctx.saved_tensors
        closed = 1 - open_
        through = _select(grad, open_) + _per_channel(weight, z) * _select(grad, closed)
        slope = _select(z, closed) * grad
        if weight.numel() > 1:
            slope = slope.transpose(0, 1).flatten(1).sum(1) if z.dim() > 1 else slope
        else:
            slope = slope.sum()
        return through, None, slope.reshape(weight.shape).to(weight.dtype)


def _select(z: Tensor, mask: Tensor) -> Tensor:
    return _scale(z, mask, 0.0, inplace=False)


def _per_channel(weight: Tensor, z: Tensor) -> Tensor:
    """The PReLU weight, shaped to broadcast over z: (N, C, ...) for more than one value."""
    weight = weight.to(z.dtype)
    if weight.numel() == 1 or z.dim() < 2:
        return weight.reshape(-1) if z.dim() else weight.reshape(())
    return weight.reshape(1, -1, *([1] * (z.dim() - 2)))


def apply(pieces: Pieces, region: Tensor) -> Tensor:
    """h = a(r)·z + b(r) for the pre-activation of `pieces` under a region found elsewhere.

    Writes into the input when the call was an in-place one.
    """
    z = pieces.input
    if isinstance(pieces.slope, Tensor):
        device = z.device.type
        if torch.is_autocast_enabled(device) and z.dtype != torch.float64:
            z = z.to(torch.get_autocast_dtype(device))  # as autocast does with the plain prelu
        scaled: Tensor = _ScaleByWeight.apply(z, region, pieces.slope)
        return scaled
    # torch.compile takes no autograd function that writes into its input. A copy it elides itself.
    compiling = torch.compiler.is_compiling()
    inplace = pieces.inplace and not compiling
    linear = _linear(region, pieces.upper)
    h: Tensor = _Scale.apply(z, linear, pieces.slope, inplace)
    if pieces.low != 0.0 or pieces.upper is not None:
        offset = torch.zeros_like(z, requires_grad=False)
        if pieces.low != 0.0:
            offset.masked_fill_(region == LOW, pieces.low)
        if pieces.upper is not None:
            offset.masked_fill_(region == HIGH, pieces.high)
        h = h.add_(offset) if inplace else h + offset
    return z.copy_(h) if pieces.inplace and compiling else h

"""Piecewise-linear gates: the structural copy finds the region, the quantitative copy scales by it.

At each gated call the structural copy gives the region r(x), and the quantitative copy computes
h = a(r)·z + b(r) from its own pre-activation z. Source: FedSQ, arXiv 2604.02990. The paper gives the rule
for ReLU; regions and coefficients of the other activations are our extension of it.

A region takes one byte per activation. Autograd saves only this byte. PReLU is the exception: the gradient
of its slope also needs the pre-activation, as in the plain model.

`threshold_backward` and `leaky_relu_backward` serve as kernels that scale by a mask. They are exact, and on
a CPU about ten times faster than `torch.where` or `masked_fill` with a bool mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

LOW, LINEAR, HIGH = 0, 1, 2
"""Region codes. An activation with two regions has no HIGH."""


class Pieces(NamedTuple):
    """One call of a piecewise-linear activation, with its arguments normalised.

    For z ≤ lower the result is slope·z + low; for z ≥ upper (if given) the constant `high`; otherwise z.
    """

    input: Tensor
    inplace: bool = False
    lower: float = 0.0
    slope: float | Tensor = 0.0
    low: float = 0.0
    upper: float | None = None
    high: float = 0.0


def find_regions(pieces: Pieces) -> Tensor:
    """Return the region of every pre-activation: uint8, same shape as the input.

    A value on a breakpoint gets the region whose derivative PyTorch uses at this point.
    """
    z = pieces.input.detach()
    # relu and a cast are vectorised on every device; a comparison with a scalar is not.
    # NaN belongs to the linear region, so it passes through, as in the plain activation.
    above = torch.relu(z).to(torch.bool) if pieces.lower == 0.0 else ~(z <= pieces.lower)
    code = above.view(torch.uint8)
    if pieces.upper is None:
        return code
    return code + (z >= pieces.upper).view(torch.uint8)


def _mask_linear(region: Tensor, upper: float | None) -> Tensor:
    """Return 1 in the linear region, else 0 (uint8)."""
    return region if upper is None else (region == LINEAR).view(torch.uint8)


def _scale(z: Tensor, linear: Tensor, slope: float, inplace: bool) -> Tensor:
    """Return z where `linear` is 1, else slope·z. Exact, also for infinite z and slope 0."""
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
    """`_scale` with a gradient. It saves one byte per activation."""

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
        # The gradient must be differentiable only for second derivatives.
        scale = _Scale.apply if torch.is_grad_enabled() else _scale
        return scale(grad, linear, ctx.slope, False), None, None, None


class _ScaleByWeight(torch.autograd.Function):
    """PReLU under a given gate. Its slope is a parameter: one value, or one per channel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, open_: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, open_, weight)
        return _select(z, open_) + _reshape_weight(weight, z) * _select(z, 1 - open_)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        z, open_, weight = ctx.saved_tensors
        closed = 1 - open_
        through = _select(grad, open_) + _reshape_weight(weight, z) * _select(grad, closed)
        slope = _select(z, closed) * grad
        if weight.numel() > 1:
            slope = slope.transpose(0, 1).flatten(1).sum(1) if z.dim() > 1 else slope
        else:
            slope = slope.sum()
        return through, None, slope.reshape(weight.shape).to(weight.dtype)


def _select(z: Tensor, mask: Tensor) -> Tensor:
    return _scale(z, mask, 0.0, inplace=False)


def _reshape_weight(weight: Tensor, z: Tensor) -> Tensor:
    """Reshape the PReLU weight so that it broadcasts over z, which is (N, C, ...) for several values."""
    weight = weight.to(z.dtype)
    if weight.numel() == 1 or z.dim() < 2:
        return weight.reshape(-1) if z.dim() else weight.reshape(())
    return weight.reshape(1, -1, *([1] * (z.dim() - 2)))


def apply(pieces: Pieces, region: Tensor) -> Tensor:
    """Return h = a(r)·z + b(r), where z is the input of `pieces` and r the given region.

    If the call is an in-place one, the result is written into the input.
    """
    z = pieces.input
    if isinstance(pieces.slope, Tensor):
        device = z.device.type
        if torch.is_autocast_enabled(device) and z.dtype != torch.float64:
            z = z.to(torch.get_autocast_dtype(device))  # autocast casts the plain prelu in the same way
        scaled: Tensor = _ScaleByWeight.apply(z, region, pieces.slope)
        return scaled
    # torch.compile does not support an autograd function that writes into its input. It removes the extra copy.
    compiling = torch.compiler.is_compiling()
    inplace = pieces.inplace and not compiling
    linear = _mask_linear(region, pieces.upper)
    h: Tensor = _Scale.apply(z, linear, pieces.slope, inplace)
    if pieces.low != 0.0 or pieces.upper is not None:
        offset = torch.zeros_like(z, requires_grad=False)
        if pieces.low != 0.0:
            offset.masked_fill_(region == LOW, pieces.low)
        if pieces.upper is not None:
            offset.masked_fill_(region == HIGH, pieces.high)
        h = h.add_(offset) if inplace else h + offset
    return z.copy_(h) if pieces.inplace and compiling else h

"""Max-pooling gates: the structural copy's argmax selects the entry of the quantitative copy.

The argmax is stored as a code, the position inside the pooling window: one byte for windows of up to 256
entries, two or four for larger ones. It is converted to an index only when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pool(NamedTuple):
    """One call of a max-pooling function, with its arguments normalised. `dims` is 1, 2 or 3."""

    input: Tensor
    dims: int
    options: dict[str, Any]
    adaptive: bool
    return_indices: bool


class Windows(NamedTuple):
    """The pooling window of each output entry. It is the same in both copies.

    The flat spatial index of an input entry is `base[output entry] + offset[position inside the window]`.
    """

    base: Tensor
    """int64, spatial shape of the output. Negative if the window starts in the padding."""
    offset: Tensor
    """int64, one element for each position inside the largest window."""
    position: Tensor
    """offset -> position with this offset, in the smallest dtype that holds all positions."""


def _repeat(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        values = tuple(int(v) for v in value)
        return values * dims if len(values) == 1 else values
    return (int(value),) * dims


def find_windows(pool: Pool, outputs: Sequence[int]) -> Windows:
    """Return the pooling windows of a call whose output has the spatial sizes `outputs`."""
    dims, device, inputs = pool.dims, pool.input.device, tuple(pool.input.shape[-pool.dims :])
    # torch.compile warns about caches. It puts these tables into its graph anyway.
    cached = not torch.compiler.is_compiling()
    if pool.adaptive:
        adaptive = _adaptive_windows if cached else _adaptive_windows.__wrapped__
        return adaptive(inputs, tuple(outputs), device)
    kernel = _repeat(pool.options["kernel_size"], dims)
    stride = pool.options["stride"]
    strides = kernel if stride is None or stride == [] else _repeat(stride, dims)
    padding, dilation = (_repeat(pool.options[key], dims) for key in ("padding", "dilation"))
    make = _windows if cached else _windows.__wrapped__
    return make(inputs, tuple(outputs), kernel, strides, padding, dilation, device)


@lru_cache(maxsize=256)
def _windows(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> Windows:
    starts = [torch.arange(n) * s - p for n, s, p in zip(outputs, strides, padding, strict=True)]
    steps = [range(0, k * d, d) for k, d in zip(kernel, dilation, strict=True)]
    return _build_tables(inputs, starts, steps, device)


@lru_cache(maxsize=256)
def _adaptive_windows(inputs: tuple[int, ...], outputs: tuple[int, ...], device: torch.device) -> Windows:
    starts, steps = [], []
    for i, n in zip(inputs, outputs, strict=True):
        starts.append(torch.arange(n) * i // n)
        largest = max((((entry + 1) * i + n - 1) // n - entry * i // n for entry in range(n)), default=1)
        steps.append(range(largest))
    return _build_tables(inputs, starts, steps, device)


def _build_tables(inputs: tuple[int, ...], starts: list[Tensor], steps: list[range], device: torch.device) -> Windows:
    base = offset = torch.zeros((), dtype=torch.int64)
    last = 0  # the largest offset, as a plain number: torch.compile cannot read it from a tensor
    for size, start, step in zip(inputs, starts, steps, strict=True):
        base = base[..., None] * size + start
        offset = offset[..., None] * size + torch.arange(step.start, step.stop, step.step)
        last = last * size + step[-1]
    offset = offset.flatten()
    entries = len(offset)
    small = torch.uint8 if entries <= 2**8 else torch.int16 if entries <= 2**15 else torch.int32
    position = torch.zeros(last + 1, dtype=small)
    position[offset] = torch.arange(entries).to(small)
    return Windows(base.to(device), offset.to(device), position.to(device))


def encode(index: Tensor, at: Windows) -> Tensor:
    """Convert flat spatial indices, as PyTorch returns them, to positions inside the windows."""
    return at.position[index - at.base]


def decode(code: Tensor, at: Windows) -> Tensor:
    """Invert `encode`: int64, same shape as `code`."""
    return at.offset[code.long()] + at.base


class _Route(torch.autograd.Function):
    """Pick one entry per window. Autograd saves the code, not the eight-byte index."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, code: Tensor, at: Windows) -> Tensor:
        ctx.save_for_backward(code)
        ctx.at, ctx.shape = at, z.shape
        dims = at.base.dim()
        index = decode(code, at)
        if torch.compiler.is_compiling():  # it does not support `out` with a variable batch size
            return z.flatten(-dims).gather(-1, index.flatten(-dims)).view(code.shape)
        # The result must not be a view: the next activation may write into it.
        values = z.new_empty(code.shape)
        torch.gather(z.flatten(-dims), -1, index.flatten(-dims), out=values.flatten(-dims))
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (code,) = ctx.saved_tensors
        dims = ctx.at.base.dim()
        index = decode(code, ctx.at).flatten(-dims)
        flat = grad.new_zeros(ctx.shape).flatten(-dims)
        return flat.scatter_add(-1, index, grad.flatten(-dims)).view(ctx.shape), None, None


_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE: dict[int, Callable[..., Any]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def choose(pool: Pool) -> tuple[Any, Tensor]:
    """Pool as the plain model does. Return the result and the code of the chosen entries."""
    function = (_ADAPTIVE if pool.adaptive else _MAX)[pool.dims]
    values, index = function(pool.input, **pool.options, return_indices=True)
    code = encode(index, find_windows(pool, values.shape[-pool.dims :]))
    return ((values, index) if pool.return_indices else values), code


def route(pool: Pool, code: Tensor) -> Any:
    """Pool the entries that `code` gives; also return their indices if the call asks for them."""
    at = find_windows(pool, code.shape[-pool.dims :])
    values: Tensor = _Route.apply(pool.input, code, at)
    if torch.compiler.is_compiling():
        values = values.clone()  # under the compiler `_Route` returns a view
    return (values, decode(code, at)) if pool.return_indices else values

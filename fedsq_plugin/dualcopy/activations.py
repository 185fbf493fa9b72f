"""Tables of the torch functions that are gated, and of the activations that cannot be gated.

An activation module calls one of these functions (`nn.ReLU` calls `F.relu`). One table is therefore enough
for modules, functional calls and tensor methods. Each function below has the signature of a torch function
and returns the arguments in one common form.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Part, Word
from .gates import Pieces
from .pooling import Pool
from .smooth import LambdaActivation

Gated = Pieces | Pool


def relu(input: Tensor, inplace: bool = False) -> Pieces:
    return Pieces(input, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Pieces:
    return hardtanh(input, 0.0, 6.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Pieces:
    return Pieces(input, inplace, slope=negative_slope)


def prelu(input: Tensor, weight: Tensor) -> Pieces:
    return Pieces(input, slope=weight)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Pieces:
    return Pieces(input, inplace, lower=min_val, low=min_val, upper=max_val, high=max_val)


def rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Pieces:
    """Use the slope of evaluation mode, also if `training` is true: a gate must not be random."""
    return Pieces(input, inplace, slope=(lower + upper) / 2)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Pieces:
    return Pieces(input, inplace, lower=threshold, low=value)


def _max_pool(
    dims: int,
    indices: bool,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pool:
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": ceil_mode,
    }
    return Pool(input, dims, options, adaptive=False, return_indices=indices or return_indices)


def _adaptive_max_pool(dims: int, indices: bool, input: Tensor, output_size: Any, return_indices: bool = False) -> Pool:
    options = {"output_size": output_size}
    return Pool(input, dims, options, adaptive=True, return_indices=indices or return_indices)


_nn: Any = torch._C._nn  # the C++ functions; torch.nn.functional exports only some of them

_IN_PLACE_TOO: dict[Callable[..., Pieces], tuple[list[Any], list[Any]]] = {
    relu: ([F.relu, torch.relu, Tensor.relu], [torch.relu_, Tensor.relu_]),
    relu6: ([F.relu6, _nn.relu6], [_nn.relu6_]),
    leaky_relu: ([F.leaky_relu, _nn.leaky_relu], [_nn.leaky_relu_]),
    prelu: ([torch.prelu, Tensor.prelu], []),
    hardtanh: ([F.hardtanh, _nn.hardtanh], [_nn.hardtanh_]),
    threshold: ([F.threshold, torch.threshold], [torch.threshold_]),
}

GATED: dict[Any, Callable[..., Gated]] = {}
"""torch function -> function that normalises its arguments."""

for _normalise, (_plain, _inplace) in _IN_PLACE_TOO.items():
    GATED.update(dict.fromkeys(_plain, _normalise))
    GATED.update(dict.fromkeys(_inplace, partial(_normalise, inplace=True)))
# rrelu_ is a separate function: it has no flag `inplace`, but a generator.
GATED.update({F.rrelu: rrelu, torch.rrelu: rrelu, torch.rrelu_: partial(rrelu, inplace=True)})
for _d in (1, 2, 3):
    for _base, _parse in (("max_pool", _max_pool), ("adaptive_max_pool", _adaptive_max_pool)):
        _name = f"{_base}{_d}d"
        GATED[getattr(F, _name)] = partial(_parse, _d, False)
        GATED[getattr(F, f"{_name}_with_indices")] = partial(_parse, _d, True)
        if hasattr(torch, _name):  # the C++ function; adaptive_max_pool1d also returns indices
            GATED[getattr(torch, _name)] = partial(_parse, _d, _name == "adaptive_max_pool1d")
GATED[torch.max_pool1d_with_indices] = partial(_max_pool, 1, True)

_NEVER: dict[str, tuple[list[type[nn.Module]], list[Any]]] = {
    "gelu": ([nn.GELU], [F.gelu]),
    "silu": ([nn.SiLU], [F.silu]),
    "elu": ([nn.ELU], [F.elu, _nn.elu_]),
    "celu": ([nn.CELU], [F.celu, torch.celu, torch.celu_]),
    "selu": ([nn.SELU], [F.selu, torch.selu, torch.selu_]),
    "mish": ([nn.Mish], [F.mish]),
    "softplus": ([nn.Softplus], [F.softplus]),
    "hardswish": ([nn.Hardswish], [F.hardswish]),
    "hardsigmoid": ([nn.Hardsigmoid], [F.hardsigmoid]),
    "glu": ([nn.GLU], [F.glu]),
    "logsigmoid": ([nn.LogSigmoid], [F.logsigmoid]),
    "softsign": ([nn.Softsign], [F.softsign]),
    "tanhshrink": ([nn.Tanhshrink], [F.tanhshrink]),
    "softshrink": ([nn.Softshrink], [F.softshrink]),
    "hardshrink": ([nn.Hardshrink], [F.hardshrink, torch.hardshrink, Tensor.hardshrink]),
    "lstm": ([nn.LSTM, nn.LSTMCell], [torch.lstm, torch.lstm_cell]),
    "gru": ([nn.GRU, nn.GRUCell], [torch.gru, torch.gru_cell]),
    # After lstm and gru, whose modules are subclasses of these: the first match gives the name.
    "rnn": ([nn.RNNBase, nn.RNNCellBase], [torch.rnn_relu, torch.rnn_tanh, torch.rnn_relu_cell, torch.rnn_tanh_cell]),
    "fractional_max_pool": (
        [nn.FractionalMaxPool2d, nn.FractionalMaxPool3d],
        [getattr(F, f"fractional_max_pool{dims}d{indices}") for dims in (2, 3) for indices in ("", "_with_indices")],
    ),
    "lambda_activation": ([LambdaActivation], []),
}
UNGATEABLE: dict[Any, str] = {function: name for name, (_, functions) in _NEVER.items() for function in functions}
"""torch function -> name of an activation that never has a fixed linear gate."""
UNGATEABLE_MODULES: dict[type[nn.Module], str] = {cls: name for name, (found, _) in _NEVER.items() for cls in found}
"""The same by module class."""

_SIGMOID = (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, torch.special.expit)
_TANH: tuple[Any, ...] = (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh)
OUTPUT_ONLY: dict[Any, str] = dict.fromkeys(_SIGMOID, "sigmoid") | dict.fromkeys(_TANH, "tanh")
"""torch function -> name of an activation that is allowed only as the model's output."""


class GateKind(Enum):
    """The kind of a gate. The value is the text for messages."""

    TWO_REGIONS = "piecewise linear"
    THREE_REGIONS = "piecewise linear, 3 regions"
    POOLING = "max-pooling"
    ADAPTIVE_POOLING = "adaptive max-pooling"


def classify(call: Gated) -> tuple[GateKind, tuple[int, ...]]:
    """Return the kind of a gated call and, for pooling, the spatial size of its input (it defines the windows).

    Calls of the two copies match if their kinds, sizes and shapes are equal.
    """
    if isinstance(call, Pool):
        pooling = GateKind.ADAPTIVE_POOLING if call.adaptive else GateKind.POOLING
        return pooling, tuple(call.input.shape[-call.dims :])
    return (GateKind.TWO_REGIONS if call.upper is None else GateKind.THREE_REGIONS), ()


def describe(kind: GateKind, size: tuple[int, ...]) -> str:
    """Return the result of `classify` as text for messages."""
    return f"{kind.value} {len(size)}d of {'x'.join(map(str, size))}" if size else kind.value


_RECURRENT = "recurrent cells have smooth gates of their own: use a convolutional or MLP backbone"
_SMOOTH = ("replace it by nn.ReLU", Word("relu_ise"))
_INSTEAD: dict[str, str | tuple[Part, ...]] = {
    "elu": "use nn.LeakyReLU or nn.ReLU in its place",
    "swish": ("use a backbone with nn.ReLU, or make it an nn.Hardswish or nn.SiLU and that a ReLU (relu_ise)"),
    **dict.fromkeys(("gelu", "silu", "hardswish"), _SMOOTH),
    **dict.fromkeys(("rnn", "lstm", "gru"), _RECURRENT),
    "fractional_max_pool": "use nn.MaxPool or nn.AdaptiveMaxPool in its place",
    "lambda_activation": "harden it and call replace_by_relu(model), which makes it nn.ReLU",
}


def suggest_instead(name: str) -> tuple[Part, ...]:
    """Say what to use instead of the activation called `name`, which cannot be gated."""
    found = _INSTEAD.get(name, "replace it by nn.ReLU or another piecewise-linear activation")
    return (found,) if isinstance(found, str) else found

"""Tables of the operators below Python's functions (`torch.ops.aten`), by what they mean for gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

ACTIVATIONS: dict[str, str] = {
    **{
        name: name
        for name in (
            *("relu", "relu6", "leaky_relu", "hardtanh", "threshold", "gelu", "silu", "mish", "elu", "celu", "selu"),
            *("softplus", "hardswish", "hardsigmoid", "glu", "softshrink", "hardshrink", "prelu"),
            *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
            *("fractional_max_pool2d", "fractional_max_pool3d"),
        )
    },
    "_prelu_kernel": "prelu",
    "erf": "erf",
    "erfc": "erf",
    "rrelu_with_noise": "rrelu",
    "rrelu_with_noise_functional": "rrelu",
    "log_sigmoid_forward": "logsigmoid",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool3d_with_indices": "max_pool3d",
    "mkldnn_max_pool2d": "max_pool2d",
    "mkldnn_max_pool3d": "max_pool3d",
    "quantized_max_pool2d": "max_pool2d",
    "_transformer_encoder_layer_fwd": "transformer_encoder_layer",
    "_thnn_fused_lstm_cell": "lstm",
    "_thnn_fused_gru_cell": "gru",
    "_cudnn_rnn": "rnn",
    "mkldnn_rnn_layer": "lstm",
}
"""Operator -> name of the activation."""

PIECEWISE: dict[str, str] = {
    "clamp": "clamp",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "clip": "clamp",
    "maximum": "maximum",
    "minimum": "minimum",
    "fmax": "maximum",
    "fmin": "minimum",
    "max": "max",
    "min": "min",
    "amax": "max",
    "amin": "min",
    "abs": "abs",
    **dict.fromkeys(("absolute", "__abs__", "abs_"), "abs"),
    **dict.fromkeys(("clamp_", "clamp_min_", "clamp_max_", "clip_"), "clamp"),
    **dict.fromkeys(("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"), "mul"),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_", "masked_scatter", "__setitem__", "index_put_"), "where"),
    **dict.fromkeys(("addcmul", "einsum", "index_put", "mul_"), "mul"),
}
"""Functions, and operators, with which a model can write an activation. The value is the name for messages."""

MASKS: dict[str, str] = {
    "mul": "mask",
    "addcmul": "mask",
    "where": "where",
    "masked_fill": "where",
    "masked_scatter": "where",
    "index_put": "where",
    "_index_put_impl": "where",
}
"""Operators that are an activation if one argument is a mask of the model's own values."""

OUTPUTS = {"sigmoid", "tanh"}
"""Operators that are allowed as the model's output only."""

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"}
"""Operators that choose entries if one factor is a mask of the model's own values."""

COMPARES = {
    *("gt", "ge", "lt", "le", "eq", "ne", "sign", "sgn", "heaviside", "signbit", "floor", "ceil", "round", "trunc"),
    *("argmax", "argmin", "argsort", "nonzero", "bernoulli", "searchsorted", "bucketize", "logical_not"),
}
"""Operators whose result is piecewise constant."""

CHOOSES = {"topk", "sort", "kthvalue", "median", "nanmedian", "mode", "masked_select", "unique", "_unique2", "nonzero"}
"""Operators that give chosen entries of their input."""

FACTORIES = {
    *("zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like", "full_like", "eye"),
    *("rand_like", "randn_like", "randint_like", "scalar_tensor", "lift_fresh", "empty_strided", "empty_permuted"),
}
"""Operators whose result depends on no value of their arguments."""

_INDEX_AT: dict[str, slice] = {
    "index": slice(1, 2),
    "index_select": slice(2, 3),
    "gather": slice(2, 3),
    "take": slice(1, 2),
    "embedding": slice(1, 2),
    "index_add": slice(2, 3),
    "index_copy": slice(2, 3),
    "scatter_add": slice(2, 3),
    "index_put": slice(1, 2),
    "_index_put_impl": slice(1, 2),
    "scatter": slice(2, 3),
}
"""Operator -> its arguments that are indices."""


def find_indices(base: str, args: Sequence[Any]) -> list[Tensor]:
    """Return the arguments by which an operator takes entries of another tensor."""
    values = args[_INDEX_AT[base]] if base in _INDEX_AT else ()
    indices = [index for value in values for index in (value if isinstance(value, (list, tuple)) else [value])]
    return [index for index in indices if isinstance(index, Tensor)]


def cuts(base: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Return whether an operator of `PIECEWISE` is an activation, not a bound that keeps numbers sound."""
    if not tensors or tensors[0].numel() <= 1 or not tensors[0].is_floating_point():
        return False
    if base in ("clamp", "clamp_min", "clamp_max"):
        bounds = [bound for bound in args[1:] if bound is not None]
        if any(isinstance(bound, Tensor) for bound in bounds):
            return True
        return len(bounds) > 1 or any(float(bound) == 0.0 for bound in bounds)
    if base in ("max", "min"):
        return len(args) > 1  # over a dimension; the largest of all entries is a measure, not an activation
    return base in ("maximum", "minimum", "fmax", "fmin", "amax", "amin", "abs")

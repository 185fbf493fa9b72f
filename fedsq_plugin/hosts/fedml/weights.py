"""Weights from a user's own trainer or aggregator: taken as tensors of the model's dtypes, or refused by key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UpdateError, in_one_line
from ...federation.state import EXTRA, State
from ...federation.updates import brief

WRITTEN_OUT = (bool, int, float, complex, list, tuple)
"""Python's own numbers, and what holds them: they have no dtype, and take the model's."""
INTEGERS_END = 2.0**63


def take_weights(weights: Any, like: Mapping[str, Tensor], whose: str, *, rounded: bool = False) -> State:
    """An independent copy of weights, on the CPU and without gradients.

    Tensors, numpy arrays, what numpy can read, and Python's numbers and lists are taken. A value gets the dtype of the
    entry of `like` with its key, where nothing is lost by it; Python's fractions are rounded to it, as
    `torch.tensor(value, dtype=...)` does. Keys and shapes are not looked at: the server does.

    Args:
        weights: what `get_model_params` gave.
        like: a state of the model.
        whose: for the error, as "silo 3: get_model_params of your client_trainer".
        rounded: fractions may lose digits by the dtype of `like`, as those of a mean in float64 do.

    Raises:
        UpdateError: it is no mapping, or a value is no tensor and cannot become one, or would lose by its new dtype.
    """
    if not isinstance(weights, Mapping):
        raise UpdateError(
            f"{whose} gave {_kind(weights)}; it must give a dict of tensors or arrays by the keys of the model's "
            "state_dict()"
        )
    found: State = OrderedDict()
    for key, value in weights.items():
        if not isinstance(key, str):
            raise UpdateError(f"{whose} gave the key {brief(key)}; keys are those of the model's state_dict()")
        if key.rpartition(".")[2] == EXTRA:
            continue  # it stays with the model
        try:
            found[key] = _cast(_tensor(value), like.get(key), rounded or isinstance(value, WRITTEN_OUT))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UpdateError(f"{whose} gave {key} as {_kind(value)}: {_said(error)}") from None
    return found


def _tensor(value: Any) -> Tensor:
    """A copy, with the value's own dtype, or that which Python's numbers have."""
    if isinstance(value, Tensor):
        if value.is_quantized or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError("it must be a plain tensor that has values")
        return value.detach().to("cpu", copy=True)
    if not (isinstance(value, WRITTEN_OUT) or hasattr(value, "__array__")):
        raise TypeError("it must be a tensor or an array")
    array = np.array(value)  # also of arrays that are read-only or lie backwards in memory
    if array.dtype.kind not in "biufc":
        raise TypeError(f"it must be a tensor or an array of numbers, and holds {array.dtype}")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _cast(value: Tensor, like: Tensor | None, rounded: bool) -> Tensor:
    """The value in the dtype of `like`. `rounded`: fractions may lose digits."""
    if like is None or value.dtype == like.dtype:
        return value
    names = f"{_name(value)}, and the model's is {_name(like)}"
    if value.is_complex() and not like.is_complex():
        raise ValueError(f"it is {names}")
    cast = value.to(like.dtype)
    rounds = rounded and value.is_floating_point() and like.is_floating_point()
    if not rounds and not _equal(cast, value):
        raise ValueError(f"it is {names}, in which it is not the same; give it as {_name(like)}")
    if rounds and not torch.equal(cast.isfinite(), value.isfinite()):
        raise ValueError(f"it is too large for {_name(like)}")
    return cast


def _equal(cast: Tensor, value: Tensor) -> bool:
    """Whether a cast between dtypes changed nothing."""
    for one, other in ((cast, value), (value, cast)):
        # Beyond the range of an integer, what comes back is anything, perhaps by chance the same.
        if one.is_floating_point() and not other.is_floating_point() and not bool((one.abs() < INTEGERS_END).all()):
            return False
    back = cast.to(value.dtype)
    return bool(((back == value) | ((back != back) & (value != value))).all())


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"a numpy {type(value).__name__} of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a {value.device.type} tensor of {_name(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _said(error: Exception) -> str:
    return str(error) if type(error) in (TypeError, ValueError) else in_one_line(error)

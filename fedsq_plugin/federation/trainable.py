"""Models whose state cannot be sent and averaged: refused by name, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dualcopy import DualCopy
from ..errors import ConfigError
from .state import tensors_of

_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Packages of torch's quantised modules."""


def refuse_untrainable(model: nn.Module) -> None:
    """Raise ConfigError for the first module or entry of the state that no silo could train or send: one that is lazy,
    quantised, no tensor, or no dense tensor with values.

    What a module's `get_extra_state` gives is no such entry: it stays where it is (`state.EXTRA`).
    """
    plain = model.quantitative if isinstance(model, DualCopy) else model
    for path, module in plain.named_modules():
        kind, where = type(module), path or "the model itself"
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_lazy(value):
                raise ConfigError(
                    f"module '{where}' ({kind.__name__}) is lazy: its {name} has no shape yet; run a sample through "
                    "the model before it is handed over"
                )
        if f"{kind.__module__}.".startswith(tuple(f"{package}." for package in _QUANTISED)):
            raise ConfigError(_quantised(f"module '{where}' ({kind.__module__}.{kind.__name__})"))
    state = tensors_of(plain)
    for name, _ in plain.named_parameters(remove_duplicate=False):
        if name not in state:
            raise ConfigError(
                f"the model's state_dict() has no entry '{name}', which is the name of a parameter: what silos send is "
                "that of nn.Module; give a state_dict() with other keys another name"
            )
    for key, value in state.items():
        if wrong := _problem(key, value):
            raise ConfigError(wrong)


def _problem(key: str, value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return (
            f"the state's entry '{key}' is a {type(value).__name__} and no tensor: give it by get_extra_state and "
            "set_extra_state, then it stays with the model"
        )
    if value.is_quantized:
        return _quantised(f"the state's entry '{key}'")
    hollow, layout = value.is_meta, value.layout
    if hollow or value.is_nested or layout is not torch.strided:
        what = "has no values" if hollow else f"is of the layout {layout}"
        return (
            f"the state's entry '{key}' {what}, and only a dense tensor with values can be averaged: make it one, or "
            "register the buffer with persistent=False"
        )
    return None


def _quantised(what: str) -> str:
    return f"{what} is quantised, and cannot be trained or averaged: train the plain network and quantise it afterwards"

"""Attributes that are written on a DualCopy: they reach both copies of the model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .copies import copy_model
from .validation import find_in_modules, refuse


def refuse_module(name: str, value: Any, accept: tuple[str, ...]) -> None:
    """Raise GateError if `value` is a module that cannot be gated as the part `name` of a model."""
    if isinstance(value, nn.Module):
        # Paths in `accept` begin at the model.
        refuse(find_in_modules(nn.ModuleDict({name: value}), accept))


def freeze(value: Any) -> Any:
    """Return a copy of an attribute's value for the structural copy."""
    if isinstance(value, nn.Module):
        return copy_model(value, hooks=False).eval().requires_grad_(False)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=False)
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # a handle or a lock, which both copies may share
        return value

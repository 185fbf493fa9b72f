"""Roles of the entries of a state dict, found by module type and an explicit head, never by the name of a key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from enum import Enum

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Word, nearest
from .state import State


class Role(str, Enum):
    BODY = "body"
    HEAD = "head"
    NORM_PARAMETER = "norm parameter"
    HEAD_NORM_PARAMETER = "norm parameter of the head"
    NORM_BUFFER = "norm buffer"
    """Floating-point buffers: running statistics, and every other entry that is not trained."""
    COUNTER = "counter"
    """Integer and boolean entries, as BatchNorm's number of batches."""


NORMALISATION: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation, lazy ones included
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def roles(model: nn.Module, head: str | None = None) -> dict[str, Role]:
    """The role of every key of `model.state_dict()`, in the order of the keys.

    Args:
        head: module path of the head, `fc` for a ResNet.

    Raises:
        ConfigError: no module has that path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if head is not None and (not head or head not in modules):
        raise ConfigError(Word("head"), f" '{head}' is no module of the model{nearest(head, filter(None, modules))}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for key, value in model.state_dict().items():
        owner = modules.get(key.rpartition(".")[0])
        if not (value.is_floating_point() or value.is_complex()):
            found[key] = Role.COUNTER
        elif key not in parameters:
            found[key] = Role.NORM_BUFFER
        else:
            norm = isinstance(owner, NORMALISATION)
            if head is not None and key.startswith(f"{head}."):
                found[key] = Role.HEAD_NORM_PARAMETER if norm else Role.HEAD
            else:
                found[key] = Role.NORM_PARAMETER if norm else Role.BODY
    return found


def refuse_without_norm(name: str, model: nn.Module) -> None:
    """Raise ConfigError where an algorithm treats normalisation layers apart and the model has none."""
    if not any(isinstance(module, NORMALISATION) for module in model.modules()):
        raise ConfigError(f"{name} treats normalisation layers apart, and the model has none: use another algorithm")


def with_roles(state: Mapping[str, Tensor], roles: Mapping[str, Role], kept: Collection[Role]) -> State:
    """The entries of a state whose roles are in `kept`. The tensors are not copied."""
    return OrderedDict((key, value) for key, value in state.items() if roles[key] in kept)


def check_finite(value: torch.Tensor) -> bool:
    """Whether all entries are finite. A finite sum shows it in one pass. Finite entries can overflow the sum, so where
    it is not finite the entries are looked at."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())

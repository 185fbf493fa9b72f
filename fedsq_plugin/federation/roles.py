"""Roles of the entries of a state dict, found by module type and an explicit head, never by the name of a key.

A role is a tensor's: keys that name one tensor, or tensors that overlap in memory, have one role, that of the first
key. An algorithm that parts the roles of such keys refuses the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from enum import Enum

from torch import Tensor, nn

from ..errors import ConfigError, Word, nearest
from .state import State, tensors_of
from .ties import tied_keys


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


class Roles(dict[str, Role]):
    """The role of every key of a state."""

    tied: Mapping[str, str]
    """By key: the first key of the same tensor, for keys that are not the first."""


def roles(model: nn.Module, head: str | None = None) -> Roles:
    """The role of every key of a model's state, in the order of the keys.

    Args:
        head: module path of the head, `fc` for a ResNet.

    Raises:
        ConfigError: no module has that path.
    """
    found = Roles(_by_name(model, head))
    found.tied = tied_keys(model)
    found.update({key: found[first] for key, first in found.tied.items()})
    return found


def _by_name(model: nn.Module, head: str | None) -> dict[str, Role]:
    """The roles without regard to keys that share a tensor."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if head is not None and (not head or head not in modules):
        raise ConfigError(Word("head"), f" '{head}' is no module of the model{nearest(head, filter(None, modules))}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for key, value in tensors_of(model).items():
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


PARAMETERS = frozenset({Role.BODY, Role.HEAD, Role.NORM_PARAMETER, Role.HEAD_NORM_PARAMETER})


def refuse_parted(name: str, what: str, model: nn.Module, head: str | None, inside: Callable[[Role], bool]) -> None:
    """Raise ConfigError where a tensor has one name inside of a part of the model and another one outside.

    Args:
        name: of the algorithm, which treats that part apart.
        what: the part, in words.
    """
    tied = tied_keys(model)
    alone = _by_name(model, head) if tied else {}
    for key, first in tied.items():
        if {alone[key], alone[first]} <= PARAMETERS and inside(alone[key]) != inside(alone[first]):
            raise ConfigError(
                f"{name} treats {what} apart, and {first} and {key} are one tensor, which is inside and outside of it: "
                "give each a tensor of its own, or use an algorithm that does not part them"
            )


def refuse_without_norm(name: str, model: nn.Module) -> None:
    """Raise ConfigError where an algorithm treats normalisation layers apart, and the model has none, or one that
    shares a tensor with another layer."""
    if not any(isinstance(module, NORMALISATION) for module in model.modules()):
        raise ConfigError(f"{name} treats normalisation layers apart, and the model has none: use another algorithm")
    norm = (Role.NORM_PARAMETER, Role.HEAD_NORM_PARAMETER)
    refuse_parted(name, "normalisation layers", model, None, lambda role: role in norm)


def with_roles(state: Mapping[str, Tensor], roles: Mapping[str, Role], kept: Collection[Role]) -> State:
    """The entries of a state whose roles are in `kept`. The tensors are not copied."""
    return OrderedDict((key, value) for key, value in state.items() if roles[key] in kept)

"""Copies of a model: independent of it, and without the hooks of its user."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..errors import GateError, in_one_line

_Model = TypeVar("_Model", bound=nn.Module)


def find_tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor inside nested tuples, lists, mappings and attributes of objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return
    elif isinstance(value, (Mapping, tuple, list)) or hasattr(value, "__dict__"):
        seen.add(id(value))
        parts = value if isinstance(value, (Mapping, tuple, list)) else vars(value)
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from find_tensors(part, seen)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIONS = (
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
    "_non_full_backward_hooks",
)


def is_users(hook: Any, modules: Container[nn.Module] = ()) -> bool:
    """Return whether a hook is the user's, not a part of the model's function.

    A part of it are hooks of torch, as that of a weight norm, and methods of the model's own `modules`.
    """
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    if isinstance(owner, nn.Module) and owner in modules:
        return False
    place = hook if isinstance(hook, types.FunctionType) else type(hook)
    return not str(getattr(place, "__module__", "")).startswith("torch.")


def find_hook(model: nn.Module) -> str | None:
    """Return the path of a module with a forward hook of the user; None if there is none."""
    modules = set(model.modules())
    for path, module in model.named_modules():
        if any(is_users(hook, modules) for name in _HOOKS[:2] for hook in getattr(module, name).values()):
            return path or "the model itself"
    return None


def copy_model(model: _Model, hooks: bool = True) -> _Model:
    """Deep-copy a model. Tensors that autograd computed are detached, because `copy.deepcopy` rejects them.

    Args:
        hooks: also copy the hooks of the user.

    Raises:
        GateError: a part of the model cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in find_tensors(model) if not t.is_leaf}
    kept: list[OrderedDict[int, Any]] = []
    if not hooks:
        modules = set(model.modules())
        for module in modules:
            for name in _HOOKS:
                found = getattr(module, name, None)
                if found:
                    own = OrderedDict((key, hook) for key, hook in found.items() if not is_users(hook, modules))
                    memo[id(found)] = own
                    kept.append(own)
    try:
        copied = copy.deepcopy(model, memo)
        for own in kept:
            for key, hook in own.items():
                own[key] = copy.deepcopy(hook, memo)  # a method of a module becomes that of the module's copy
        return copied
    except Exception as error:
        raise GateError(_explain(model, error)) from error


def _explain(model: nn.Module, error: Exception) -> str:
    """Say which part of a model cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers") or isinstance(value, nn.Module):
                continue
            try:
                copy.deepcopy(value, {id(t): t.detach() for t in find_tensors(value)})
            except Exception as own:
                where = f"{path}.{name}" if path else name
                return (
                    f"{where}: this {type(value).__name__} cannot be copied ({in_one_line(own)}), and the structural "
                    "copy is a copy of the model; use the Python function or module that it was made from"
                )
    return f"the model cannot be copied ({in_one_line(error)}), and the structural copy is a copy of it"


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Run a copy of a model without the hooks that the user gave to all modules (`register_module_forward_hook`)."""
    names = [name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks")]
    found: Mapping[str, Any] = {name: getattr(torch_module, name) for name in names}
    users = {name: value for name, value in found.items() if value}
    for name in users:
        setattr(torch_module, name, OrderedDict())
    try:
        yield
    finally:
        for name, value in users.items():
            setattr(torch_module, name, value)

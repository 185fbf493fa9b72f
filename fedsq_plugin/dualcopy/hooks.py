"""Hooks of the user on the quantitative copy: they may look at a forward, but not change it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ..errors import GateError
from .copies import find_tensors, is_users


def get_stamp() -> tuple[int, int]:
    """Return a value that changes whenever a hook is registered anywhere in the process."""
    return os.getpid(), RemovableHandle.next_id


@contextmanager
def check_hooks(model: nn.Module) -> Iterator[None]:
    """Raise GateError in a forward of `model` if a hook of the user changes what it is given.

    The structural copy has no hooks, so that a hook fires once per forward. A change would be in one copy only.
    """
    back: list[tuple[MutableMapping[int, Any], int, Any]] = []
    places: list[tuple[str, Any]] = [
        (path or "the model itself", hooks)
        for path, module in model.named_modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if hooks
    ]
    places += [
        ("all modules", hooks) for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    ]
    modules = set(model.modules())
    for path, hooks in places:
        for key, hook in list(hooks.items()):
            if is_users(hook, modules):
                back.append((hooks, key, hook))
                hooks[key] = _watch(path, hook)
    try:
        yield
    finally:
        for hooks, key, hook in back:
            if key in hooks:  # a hook may remove itself
                hooks[key] = hook


def _watch(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook so that a change by it is an error."""

    def run(*given: Any) -> Any:
        before = [(tensor, tensor._version) for tensor in find_tensors(given[1:]) if not tensor.is_inference()]
        result = hook(*given)
        same = result is None or any(result is one for one in given[1:])
        if not same or any(tensor._version != version for tensor, version in before):
            name = getattr(hook, "__name__", type(hook).__name__)
            raise GateError(
                f"{path}: the hook {name} changes what the module gets or gives; the structural copy runs without "
                "hooks and would not follow: put the change into the module's forward()"
            )
        return result

    return run

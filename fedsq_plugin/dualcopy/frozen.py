"""Keeps the structural copy as it is: what its forward writes into it is found, and taken back after each forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import GateError

_DEPTH = 6
"""Containers inside containers are followed this far."""
_REGISTRIES = ("_parameters", "_buffers")
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, FunctionType, MethodType, ModuleType)


MADE = "made"


class Write(NamedTuple):
    """Something that a forward writes into its model."""

    path: str
    registry: str
    """`_parameters` or `_buffers`; empty for an attribute; `MADE` for a layer or parameter that is new."""
    name: str


class _Saved:
    """A value, and how it was: tensors with their numbers, containers with their entries."""

    def __init__(self, value: Any, seen: set[int], depth: int = _DEPTH) -> None:
        self._value = value
        self._copy: Any = None
        self._parts: list[_Saved] = []
        if isinstance(value, (*_PLAIN, nn.Module)) or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            self._copy = value.detach().clone()
        elif isinstance(value, torch.Generator):
            self._copy = value.get_state()
        elif (entries := _get_entries(value)) is not None:
            self._copy = entries
            parts = entries.values() if isinstance(entries, dict) else entries
            self._parts = [_Saved(part, seen, depth - 1) for part in parts]

    def is_changed(self) -> bool:
        value, before = self._value, self._copy
        if before is None:
            return False
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                return not _is_same_sparse(value.detach(), before)
            now = value.detach()
            same = now.shape == before.shape and torch.equal(now.nan_to_num(), before.nan_to_num())
            return not (same and torch.equal(now != now, before != before))
        if isinstance(value, torch.Generator):
            return not torch.equal(value.get_state(), before)
        return not _is_same(_get_entries(value), before) or any(part.is_changed() for part in self._parts)

    def restore(self) -> None:
        value, before = self._value, self._copy
        if before is None:
            return
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                value.data.copy_(before)
            else:  # a sparse tensor gets new parts, which its `data` would keep for itself
                with torch.no_grad():
                    value.copy_(before)
        elif isinstance(value, torch.Generator):
            value.set_state(before)
        else:
            _set_entries(value, before)
        for part in self._parts:
            part.restore()


def _is_same_sparse(one: Tensor, other: Tensor) -> bool:
    """Return whether two sparse tensors are equal, which torch itself does not compare."""
    one, other = one.to_sparse().coalesce(), other.to_sparse().coalesce()
    same = one.shape == other.shape and torch.equal(one.indices(), other.indices())
    return same and torch.equal(one.values(), other.values())


def _get_version(tensor: Tensor) -> int:
    """Return the number of writes into a tensor; 0 for one of inference mode, which is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _get_entries(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Return a copy of a container's entries; None if it is no container that can change."""
    if isinstance(value, MutableMapping):
        return dict(value)
    if isinstance(value, (list, deque, MutableSet)):
        return list(value)
    return dict(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, tuple)) else None


def _set_entries(value: Any, entries: Any) -> None:
    if isinstance(value, MutableMapping):
        value.clear()
        value.update(entries)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(entries)
    elif isinstance(value, MutableSet):
        value.clear()
        for entry in entries:
            value.add(entry)
    else:
        vars(value).clear()
        vars(value).update(entries)


def _is_same(now: Any, before: Any) -> bool:
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(_is_equal(now[key], before[key]) for key in before)
    return len(now) == len(before) and all(map(_is_equal, now, before))


def _is_equal(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)


_MISSING = object()
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _get_holders(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mappings in which a module keeps what a forward may write."""
    for registry in _REGISTRIES:
        yield registry, getattr(module, registry)
    yield "", {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


class Snapshot:
    """A model as it is before a forward, to see what the forward writes."""

    def __init__(self, model: nn.Module) -> None:
        self._model, seen = model, set[int]()
        self._paths = {path for path, _ in model.named_modules()}
        self._saved = {
            Write(path, registry, name): (value, _Saved(value, seen))
            for path, module in model.named_modules()
            for registry, held in _get_holders(module)
            for name, value in held.items()
        }

    def find_writes(self) -> tuple[Write, ...]:
        """Return what changed since then, and what is new."""
        writes = []
        for path, module in self._model.named_modules():
            if path not in self._paths:
                if next(module.parameters(), None) is not None:
                    writes.append(Write(path, MADE, ""))
                continue
            for registry, held in _get_holders(module):
                for name in held:
                    key = Write(path, registry, name)
                    if key not in self._saved:
                        writes.append(key if registry != "_parameters" else Write(path, MADE, name))
                        continue
                    value, saved = self._saved[key]
                    if not _is_equal(held[name], value) or saved.is_changed():
                        writes.append(key)
        return tuple(writes)


@contextmanager
def undo(model: nn.Module, writes: Iterable[Write]) -> Iterator[None]:
    """Run a forward of `model` and take back the given writes."""
    back: list[Callable[[], None]] = []
    for path, registry, name in writes:
        module = model.get_submodule(path)
        held: dict[str, Any] = getattr(module, registry) if registry else vars(module)
        value = held.get(name, _MISSING)
        back.append(_make_undo(held, name, value, _Saved(value, set())))
    try:
        yield
    finally:
        for take_back in back:
            take_back()


def _make_undo(held: dict[str, Any], name: str, value: Any, saved: _Saved) -> Callable[[], None]:
    def take_back() -> None:
        if value is _MISSING:
            held.pop(name, None)
        else:
            held[name] = value
            saved.restore()

    return take_back


def get_versions(modules: Iterable[nn.Module]) -> list[tuple[Tensor, int]]:
    """Return the buffers of some modules, with the numbers of writes into them."""
    found = [tensor for module in modules for tensor in module._buffers.values() if tensor is not None]
    return [(tensor, _get_version(tensor)) for tensor in found]


def refuse_new_writes(model: nn.Module, modules: Iterable[nn.Module], before: list[tuple[Tensor, int]]) -> None:
    """Raise GateError if a forward wrote into a buffer, unlike the forwards before it."""
    now = get_versions(modules)
    if len(now) == len(before) and all(a is b and v == w for (a, v), (b, w) in zip(now, before, strict=True)):
        return
    versions = {id(tensor): version for tensor, version in before}
    names = {id(tensor): name for name, tensor in model.named_buffers()}
    name = next((names.get(id(t)) for t, v in now if versions.get(id(t)) != v), None)
    raise GateError(
        f"{name or 'a buffer'}: the model writes into this buffer in evaluation mode too, but not in its first "
        "forward; the structural copy is frozen: write from the first forward on, or in training mode only"
    )

"""What a model holds beside its state, and its training may write: attributes, buffers that are not saved, generators.

The silos of a process share one model. If such a thing stayed as one silo left it, the next silo's result would depend
on the order of the silos and on their processes, and a resumed run would be another one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dualcopy import DualCopy
from .seeding import derive
from .state import same_values, tensors_of

log = logging.getLogger(__name__)

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_MISSING = object()


class Beside:
    """A model's numbers, texts, tensors and generators that are no part of its state, as they are now.

    What lies deeper, in lists, mappings or other objects, is not seen: it stays as training leaves it.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = model.quantitative if isinstance(model, DualCopy) else model
        in_state = {_storage(value) for value in tensors_of(plain).values()} - {None}
        self._kept = [
            _Kept(f"{path}.{name}" if path else name, held, name)
            for path, module in plain.named_modules()
            for held, names in _holders(module)
            for name in names
            # A view of a weight moves with the weight.
            if not (isinstance(held[name], Tensor) and _storage(held[name]) in in_state)
        ]
        self._said = False

    def put_back(self) -> None:
        """Make everything what it was. The first thing that had moved is named in the log."""
        moved = [kept.name for kept in self._kept if kept.put_back()]
        if moved and not self._said:
            self._said = True
            log.warning(
                "the model's '%s' moves while the model trains, and is no part of its state: it begins anew with "
                "every silo's round; make it a buffer that is saved, if the silos shall share it",
                moved[0],
            )

    def seed(self, seed: int) -> None:
        """Seed the model's own generators for a silo's round: put back alone, they would repeat their draws in every
        round and at every silo."""
        generators = [kept.generator for kept in self._kept if kept.generator is not None]
        for number, generator in enumerate(generators):
            generator.manual_seed(derive("model's generator", seed, number))


class _Kept:
    """One value, where it is held, and what was in it."""

    def __init__(self, name: str, held: MutableMapping[str, Any], key: str) -> None:
        self.name, self._held, self._key = name, held, key
        self._value = held[key]
        self._inside: Any = None
        if isinstance(self._value, Tensor):
            self._inside, self._version = self._value.detach().clone(), _version(self._value)
        elif isinstance(self._value, torch.Generator):
            self._inside = self._value.get_state()

    @property
    def generator(self) -> torch.Generator | None:
        """The value, where it is a generator."""
        return self._value if isinstance(self._value, torch.Generator) else None

    def put_back(self) -> bool:
        """Returns whether it had moved."""
        now = self._held.get(self._key, _MISSING)
        if isinstance(self._value, Tensor):
            return self._put_tensor_back(now)
        if isinstance(self._value, torch.Generator):
            moved = now is not self._value or not torch.equal(self._value.get_state(), self._inside)
            self._value.set_state(self._inside)
        else:
            moved = now is not self._value and not (type(now) is type(self._value) and now == self._value)
        if moved:
            self._held[self._key] = self._value
        return moved

    def _put_tensor_back(self, now: Any) -> bool:
        if now is self._value and _version(now) == self._version:
            return False
        device = now.device if isinstance(now, Tensor) else self._inside.device
        fresh = self._inside.to(device, copy=True)
        # A model that goes to another device has other tensors with the same values. What autograd computed, as the
        # weight of a weight norm, is computed anew.
        alike = isinstance(now, Tensor) and now.dtype == fresh.dtype and now.layout is torch.strided and now.is_leaf
        moved = not isinstance(now, Tensor) or (alike and not same_values(now, fresh))
        self._held[self._key] = self._value = fresh
        self._version = _version(fresh)
        return moved


def _holders(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], list[str]]]:
    """Where a module holds such values, and their names there."""
    attributes = vars(module)
    seen = (*_PLAIN, Tensor, torch.Generator)
    yield attributes, [key for key, value in attributes.items() if key not in _OF_TORCH and isinstance(value, seen)]
    yield module._buffers, list(module._non_persistent_buffers_set & module._buffers.keys())


def _storage(value: Tensor) -> int | None:
    """Address of a tensor's memory; None where it has none, as a sparse one."""
    try:
        return value.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _version(value: Tensor) -> int:
    """Number of writes into a tensor, which those of inference mode do not count."""
    return 0 if value.is_inference() else value._version

"""What a forward does below Python's functions: activations there, decisions, random draws, rows chosen.

A dispatch mode sees every operator of a forward, also those of scripted functions and of `torch.ops`. It
follows what each tensor depends on: on parameters, on the input, on random numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .operators import (
    ACTIVATIONS,
    CHOOSES,
    COMPARES,
    FACTORIES,
    MASKS,
    OUTPUTS,
    PIECEWISE,
    PRODUCTS,
    cuts,
    find_indices,
)
from .places import Place

PARAMETER, INPUT, RANDOM, MASK, CHOSEN, DRAWN = 1, 2, 4, 8, 16, 32
"""What a tensor depends on. MASK: only piecewise constantly. CHOSEN: entries were chosen by values that depend
on parameters. DRAWN: they were chosen at random."""
_LATE = 64
"""The first of the marks that single operators get."""
_BOTH = PARAMETER | INPUT
DECIDES = PARAMETER | RANDOM
"""A number that is read from such a tensor can differ between two copies, or between two forwards."""


class Draw(NamedTuple):
    """One random draw of a forward."""

    path: str
    operator: str
    shape: tuple[int, ...]
    own: bool
    """It is from a generator that the model has for itself."""


class Seen(NamedTuple):
    """An activation, or another thing that cannot be gated, which no Python function showed."""

    path: str
    what: str


class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watch the operators of one forward.

    Args:
        find_place: gives the module that runs, and where in its code.
        parameters: the tensors in which two copies of the model can differ, by name.
        inputs: the tensors of the model's arguments.
        alter: number of a decision -> number of the other value that it gets.
    """

    def __init__(
        self,
        find_place: Callable[[FrameType | None], Place],
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        alter: Mapping[int, int],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._find_place, self._alter = find_place, alter
        self._flags: dict[StorageWeakRef | int, int] = {}
        self._names: dict[StorageWeakRef | int, str] = {}
        for name, tensor in parameters.items():
            self._names[_key(tensor)] = name
            self._flags[_key(tensor)] = PARAMETER
        for tensor in inputs:
            self._flags[_key(tensor)] = self._flags.get(_key(tensor), 0) | INPUT
        self._functions = _find_functions()
        self.function: str | None = None
        """Name of the torch function that runs now."""
        self.covered = False
        """Whether this function is in the tables of gated and ungateable functions."""
        self.fed: set[str] = set()
        self.last: frozenset[str] = frozenset()
        self.decisions: list[tuple[Place, int]] = []
        """Place and number of other values of each decision that depends on parameters or random numbers."""
        self.draws: list[Draw] = []
        self.seen: list[Seen] = []
        self.late: list[tuple[Seen, set[StorageWeakRef | int]]] = []
        """Piecewise linear arithmetic, with its results. It counts if the model goes on with a result."""
        self.gated = 0
        """What the inputs of gated calls depend on, all together."""
        self.suspects: list[tuple[Seen, Tensor]] = []
        """Activations that are fine as the model's output, with their result."""

    def flags(self, tensor: Any) -> int:
        """Return what a tensor depends on."""
        return self._flags.get(_key(tensor), 0) if isinstance(tensor, Tensor) else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        flags = [self.flags(t) for t in tensors]
        every = 0
        for flag in flags:
            every |= flag
        used = frozenset(self._name(tensor) for tensor in tensors if _key(tensor) in self._names)
        if used:
            self.fed |= used
            self.last = used
        if name in ("_local_scalar_dense", "equal"):
            return self._decide(func(*args, **kwargs), every)
        late = len(self.late)
        self._look(name, args, tensors, flags, every)
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        state = _get_state(tensors, kwargs) if seeded else None
        result = func(*args, **kwargs)
        # Attention, for example, is among these operators also if it drops nothing.
        draws = state is not None and not torch.equal(state, _get_state(tensors, kwargs))
        if draws:
            shape = next((tuple(t.shape) for t in [*tensors, *tree_leaves(result)] if isinstance(t, Tensor)), ())
            own = kwargs.get("generator") is not None
            self.draws.append(Draw(self._find_place(sys._getframe())[0], name, shape, own))
        if name.rstrip("_") in OUTPUTS and not self.covered and isinstance(result, Tensor) and every & _BOTH == _BOTH:
            self.suspects.append((Seen(self._find_place(sys._getframe())[0], name.rstrip("_")), result))
        self._mark(func, name, args, tensors, flags, every | (RANDOM if draws else 0), result)
        for number in range(late, len(self.late)):
            self._mark_late(number, result)
        return result

    def _mark_late(self, number: int, result: Any) -> None:
        """Give the results of piecewise linear arithmetic a mark of their own, to see where they are used."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                key = _key(tensor)
                self._flags[key] = self._flags.get(key, 0) | _LATE << number
                self.late[number][1].add(key)

    def find_used(self, outputs: Iterable[Tensor]) -> list[Seen]:
        """Return the piecewise linear arithmetic that a gated call, or a later function before the output, uses."""
        marks = [(_key(tensor), self.flags(tensor)) for tensor in outputs]
        found = []
        for number, (seen, own) in enumerate(self.late):
            mark = _LATE << number
            if self.gated & mark or any(flags & mark and at not in own for at, flags in marks):
                found.append(seen)
        return found

    def _name(self, tensor: Tensor) -> str:
        """Return the name of a parameter; for a part of it, also where the part begins."""
        name, start = self._names[_key(tensor)], tensor.storage_offset()
        return f"{name}[{start}:]" if start else name

    def _decide(self, value: Any, flags: int) -> Any:
        """Note that a number was read from a tensor. Return it, or another one in its place."""
        if not flags & (PARAMETER | RANDOM) or self.function in _HARMLESS:
            return value
        return self.decide(value)

    def decide(self, value: Any) -> Any:
        """Note a decision. Return its value, or another one in its place."""
        others: list[Any]
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, (int, float)):
            others = [value + 1, value - 1]
        else:
            return value
        number = len(self.decisions)
        self.decisions.append((self._find_place(sys._getframe(1)), len(others)))
        return others[self._alter[number]] if number in self._alter else value

    def decide_tensor(self) -> int | None:
        """Note that all numbers of a tensor are read. Return which other values they get, if any."""
        self.decisions.append((self._find_place(sys._getframe(1)), 2))
        return self._alter.get(len(self.decisions) - 1)

    def is_inside_function(self, frame: FrameType | None) -> bool:
        """Return whether the forward of a user's `torch.autograd.Function` runs."""
        return self._find_function(frame) is not None

    def _look(self, name: str, args: Any, tensors: list[Tensor], flags: list[int], every: int) -> None:
        """Note activations that no gated function made."""
        inside = self._find_function(sys._getframe(1))
        if inside is not None and every & PARAMETER:
            self._see(inside)
        if self.covered or inside is not None:
            return
        base = name.rstrip("_")
        if base in ACTIVATIONS and self.function not in _HARMLESS:
            if every & _BOTH == _BOTH:
                self._see(ACTIVATIONS[base])
        elif self.function is None or self.function in PIECEWISE:
            both = [flag & _BOTH == _BOTH for flag in flags]
            if not any(both):
                return
            masked = any(b and f & MASK for b, f in zip(both, flags, strict=True)) and any(
                f & _BOTH and not f & MASK and t.is_floating_point() for f, t in zip(flags, tensors, strict=True)
            )
            if (base in MASKS and masked) or (base in PIECEWISE and cuts(base, args, tensors)):
                self.late.append(
                    (Seen(self._find_place(sys._getframe(1))[0], MASKS.get(base) or PIECEWISE[base]), set())
                )

    def _see(self, what: str) -> None:
        self.seen.append(Seen(self._find_place(sys._getframe(1))[0], what))

    def _mark(
        self, func: Any, name: str, args: Any, tensors: list[Tensor], flags: list[int], every: int, result: Any
    ) -> None:
        """Note what the results depend on."""
        base = name.rstrip("_")
        out = every & ~MASK
        if base in FACTORIES or name.startswith("new_") or self.function in _HARMLESS:
            out = 0
        out |= every & RANDOM
        dependent = [flag for flag in flags if flag & PARAMETER]
        if base in COMPARES or (dependent and all(flag & MASK for flag in dependent)):
            out |= MASK if every & PARAMETER else 0
        mixes = any(f & MASK for f in dependent) and any(not f & MASK for f in dependent)
        for reason, flag in ((PARAMETER, CHOSEN), (RANDOM, DRAWN)):
            if any(self.flags(index) & reason for index in find_indices(base, args)):
                out |= flag
        if (base in CHOOSES and every & PARAMETER) or (base in PRODUCTS and mixes):
            out |= CHOSEN
        written = [t for t in tensors if any(r is t for r in tree_leaves(result))]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                key = _key(tensor)
                kept = self._flags.get(key, 0) if written or func._schema.is_mutable else 0
                if key in self._names:
                    continue
                if out | kept or key in self._flags:
                    self._flags[key] = (out | kept) if not (kept and not out & MASK) else (out | kept) & ~MASK

    def _find_function(self, frame: FrameType | None) -> str | None:
        """Return the name of the user's `torch.autograd.Function` whose forward runs now."""
        while frame is not None:
            if frame.f_code in self._functions:
                return self._functions[frame.f_code]
            frame = frame.f_back
        return None


_HARMLESS = {
    "isnan",
    "isinf",
    "isfinite",
    "nan_to_num",
    "nan_to_num_",
    "isneginf",
    "isposinf",
    "__repr__",
    "__format__",
}
"""Functions that test for broken numbers, or print."""


def _get_state(tensors: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    """Return the state of the generator that an operator draws from."""
    generator = kwargs.get("generator")
    if generator is not None:
        state: Tensor = generator.get_state()
        return state
    devices = [t.device for t in tensors] + [torch.device(kwargs.get("device") or "cpu")]
    device = devices[0]
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _key(tensor: Tensor) -> StorageWeakRef | int:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return id(tensor)  # no storage: a sparse tensor, for example


def _find_functions() -> dict[CodeType, str]:
    """Return the forward of every `torch.autograd.Function` that is not torch's, by its code."""
    found: dict[CodeType, str] = {}
    left: list[Any] = [torch.autograd.Function]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        code = getattr(cls.forward, "__code__", None)
        if code is not None and not cls.__module__.startswith(("torch.", "functorch.")):
            found[code] = cls.__name__
    return found

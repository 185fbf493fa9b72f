"""Which activations a forward calls, in order, and how the calls of the two copies correspond."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activations import GATED, OUTPUT_ONLY, UNGATEABLE, kind, shown
from .passes import cloned
from .pooling import Pool
from .products import Products

_Model = TypeVar("_Model", bound=nn.Module)


class TwoCopies(nn.Module):
    """The base of DualCopy: what DualCopy itself uses can recognise one by it."""


class Call(NamedTuple):
    """One activation call of a forward: `what` is the kind of its gate, or the name of one that has none."""

    path: str
    what: str
    gated: bool
    own: bool = False
    """Gated, but part of a smooth activation: where that is accepted, each copy has its own gate here."""


class _Trace(TorchFunctionMode):
    def __init__(self, own_pooling: bool) -> None:
        super().__init__()
        self.path = [""]
        self.calls: list[Call] = []
        self.suspects: list[tuple[Call, Tensor, int]] = []
        """Calls that are fine as outputs, their results, and the version of these."""
        self._own_pooling = own_pooling
        self._products = Products()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        here, products = self.path[-1], self._products
        if func in GATED:
            call = GATED[func](*args, **(kwargs or {}))
            if not (self._own_pooling and isinstance(call, Pool)):
                self.calls.append(Call(here, shown(*kind(call)), gated=True))
            result = func(*args, **(kwargs or {}))
            if not isinstance(call, Pool):
                products.made_by_gate(call.input, result, len(self.calls) - 1)
            return result
        if func in UNGATEABLE:
            self.calls.append(Call(here, UNGATEABLE[func], gated=False))
        part, value = products.multiplied(func, args), products.scaled(func, args)
        if part is not None:
            self.calls[part] = self.calls[part]._replace(own=True)
            self.calls.append(Call(here, "swish", gated=False))
        result = func(*args, **(kwargs or {}))
        products.computed(func, args, value, result)
        if func in OUTPUT_ONLY:
            self.suspects.append((Call(here, OUTPUT_ONLY[func], gated=False), result, result._version))
        return result


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    own_pooling: bool = False,
    evaluation: bool = False,
) -> list[Call]:
    """The activation calls of one forward, in order; in evaluation mode, or in the model's own. The
    model, its buffers and the global random generators are left as they were: a copy runs."""
    runner = detached_copy(model)
    if evaluation:
        runner.eval()
    args, kwargs = cloned(args, kwargs)
    watch = _Trace(own_pooling)
    with ExitStack() as stack:
        for path, module in runner.named_modules():

            def enter(_: nn.Module, __: Any, path: str = path) -> None:
                watch.path.append(path)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                watch.path.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
        devices = {t.device for t in _tensors([args, dict(kwargs)]) if t.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        output = runner(*args, **kwargs)
    outputs = {t.untyped_storage().data_ptr() for t in _tensors(output)}
    hidden = [
        call
        for call, result, version in watch.suspects
        # Written into afterwards, as by x.sigmoid().mul_(x), it is not the output that it was.
        if result.untyped_storage().data_ptr() not in outputs or result._version != version
    ]
    return watch.calls + hidden


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists, mappings and objects with such attributes."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return
    elif isinstance(value, (Mapping, tuple, list)) or hasattr(value, "__dict__"):
        seen.add(id(value))
        parts = value if isinstance(value, (Mapping, tuple, list)) else vars(value)
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from _tensors(part, seen)


def detached_copy(model: _Model) -> _Model:
    """`copy.deepcopy`, which refuses tensors that autograd computed: those are detached."""
    computed = [t for t in _tensors(model) if not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


def align(structural: Sequence[Call], quantitative: Sequence[Call]) -> tuple[int | None, ...] | None:
    """Which structural gate each of the quantitative copy's gated calls uses; None: one to one.

    Calls correspond when they are the same occurrence in the same module. A call that only one copy
    makes (auxiliary heads run in training mode only) keeps its own gate, or is passed over; a call that
    is part of a smooth activation keeps its own gate, too.
    """

    def occurrences(calls: Sequence[Call]) -> list[tuple[tuple[str, str, int], bool]]:
        count: dict[tuple[str, str], int] = {}
        found = []
        for call in calls:
            if call.gated:
                key = (call.path, call.what)
                count[key] = count.get(key, -1) + 1
                found.append(((*key, count[key]), call.own))
        return found

    numbers = {key: number for number, (key, _) in enumerate(occurrences(structural))}
    plan = tuple(None if own else numbers.get(key) for key, own in occurrences(quantitative))
    return None if plan == tuple(range(len(numbers))) else plan

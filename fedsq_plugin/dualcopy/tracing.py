"""Lists the activation calls of a forward, and matches the calls of the two copies."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activations import GATED, OUTPUT_ONLY, UNGATEABLE, classify, describe
from .passes import clone_arguments
from .pooling import Pool
from .products import Products

_Model = TypeVar("_Model", bound=nn.Module)


class TwoCopies(nn.Module):
    """Base class of DualCopy. Modules that DualCopy imports use it to recognise a DualCopy."""


class Call(NamedTuple):
    """One activation call. `what` is the kind of its gate, or the name of an activation without gate."""

    path: str
    what: str
    gated: bool
    own: bool = False
    """The call is part of a smooth activation. If the user accepts it, each copy uses its own gate here."""


class _Trace(TorchFunctionMode):
    def __init__(self, own_pooling: bool) -> None:
        super().__init__()
        self.path = [""]
        self.calls: list[Call] = []
        self.suspects: list[tuple[Call, Tensor, int]] = []
        """Calls that are allowed only as the model's output, with their result and its version."""
        self._own_pooling = own_pooling
        self._products = Products()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        here, products = self.path[-1], self._products
        if func in GATED:
            call = GATED[func](*args, **(kwargs or {}))
            if not (self._own_pooling and isinstance(call, Pool)):
                self.calls.append(Call(here, describe(*classify(call)), gated=True))
            result = func(*args, **(kwargs or {}))
            if not isinstance(call, Pool):
                products.record_gate(call.input, result, len(self.calls) - 1)
            return result
        if func in UNGATEABLE:
            self.calls.append(Call(here, UNGATEABLE[func], gated=False))
        part, value = products.find_product(func, args), products.find_scaled(func, args)
        if part is not None:
            self.calls[part] = self.calls[part]._replace(own=True)
            self.calls.append(Call(here, "swish", gated=False))
        result = func(*args, **(kwargs or {}))
        products.record_call(func, args, value, result)
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
    """Run one forward of a copy of the model and return its activation calls, in order.

    With `evaluation` the copy is in evaluation mode, else in the mode of the model. The model, its buffers and
    the global random generators do not change.
    """
    runner = copy_model(model)
    if evaluation:
        runner.eval()
    args, kwargs = clone_arguments(args, kwargs)
    watch = _Trace(own_pooling)
    with ExitStack() as stack:
        for path, module in runner.named_modules():

            def enter(_: nn.Module, __: Any, path: str = path) -> None:
                watch.path.append(path)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                watch.path.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
        devices = {t.device for t in _find_tensors([args, dict(kwargs)]) if t.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        output = runner(*args, **kwargs)
    outputs = {t.untyped_storage().data_ptr() for t in _find_tensors(output)}
    hidden = [
        call
        for call, result, version in watch.suspects
        # After a later write, as in x.sigmoid().mul_(x), the output is another function.
        if result.untyped_storage().data_ptr() not in outputs or result._version != version
    ]
    return watch.calls + hidden


def _find_tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
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
            yield from _find_tensors(part, seen)


def copy_model(model: _Model) -> _Model:
    """Deep-copy a model. Tensors that autograd computed are detached, because `copy.deepcopy` rejects them."""
    computed = [t for t in _find_tensors(model) if not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


def align(structural: Sequence[Call], quantitative: Sequence[Call]) -> tuple[int | None, ...] | None:
    """Return the index of the structural gate for each gated call of the quantitative copy; None: all in order.

    Two calls match if they are the same occurrence of the same kind in the same module. Some calls exist in
    one copy only (auxiliary heads run only in training mode): in the quantitative copy they use their own
    gate, and gates of the structural copy stay unused. Parts of a smooth activation use their own gate, too.
    """

    def count_occurrences(calls: Sequence[Call]) -> list[tuple[tuple[str, str, int], bool]]:
        count: dict[tuple[str, str], int] = {}
        found = []
        for call in calls:
            if call.gated:
                key = (call.path, call.what)
                count[key] = count.get(key, -1) + 1
                found.append(((*key, count[key]), call.own))
        return found

    numbers = {key: number for number, (key, _) in enumerate(count_occurrences(structural))}
    plan = tuple(None if own else numbers.get(key) for key, own in count_occurrences(quantitative))
    return None if plan == tuple(range(len(numbers))) else plan

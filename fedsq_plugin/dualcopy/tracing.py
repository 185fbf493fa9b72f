"""Lists what one forward of a model does: its activation calls, its decisions, its random draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .activations import GATED, OUTPUT_ONLY, UNGATEABLE, UNGATEABLE_MODULES, Gated, classify, describe
from .below import CHOSEN, DECIDES, DRAWN, Below, Draw
from .copies import copy_model, find_tensors, without_global_hooks
from .frozen import Snapshot, Write
from .passes import clone_arguments
from .places import Place, Places
from .plan import GatedCall, as_key
from .pooling import Pool
from .products import Products
from .randomness import keep_random_states
from .transforms import refuse_inside


class Call(NamedTuple):
    """One activation call. `what` is the kind of its gate, or the name of an activation without gate."""

    path: str
    what: str
    gated: bool
    own: bool = False
    """The call is part of a smooth activation. If the user accepts it, each copy uses its own gate here."""
    below: bool = False
    """The call was seen below Python's functions only."""


class Traced(NamedTuple):
    """What one forward does."""

    calls: list[Call]
    gated: list[GatedCall]
    decisions: list[tuple[Place, int]]
    """Place, and number of other values, of each number that the forward reads from its own tensors."""
    draws: list[Draw]
    moved: object
    """The random states of Python and numpy after the forward; None if it left them alone."""
    chosen: list[tuple[str, int]]
    """Module and reason (`CHOSEN`, `DRAWN`) of gated calls whose input has entries that the model chose."""
    writes: tuple[Write, ...]
    """What the forward writes into the model."""


class _Trace(TorchFunctionMode):
    def __init__(self, own_pooling: bool, places: Places, below: Below) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.gated: list[GatedCall] = []
        self.chosen: list[tuple[str, int]] = []
        self.suspects: list[tuple[Call, Tensor, int]] = []
        """Calls that are allowed only as the model's output, with their result and its version."""
        self._own_pooling = own_pooling
        self._products = Products()
        self._places, self._below = places, below

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        place, kwargs = self._places.find(sys._getframe().f_back), kwargs or {}
        products, below = self._products, self._below
        if func in GATED:
            call = GATED[func](*args, **kwargs)
            if not (self._own_pooling and isinstance(call, Pool)):
                self._note(place, call)
            number = len(self.calls) - 1
            result = self._run(func, args, kwargs, covered=True)
            if not isinstance(call, Pool):
                products.record_gate(call.input, result, number)
            return result
        if func in UNGATEABLE:
            self.calls.append(Call(place[0], UNGATEABLE[func], gated=False))
        part, value = products.find_product(func, args), products.find_scaled(func, args)
        if part is not None:
            self.calls[part] = self.calls[part]._replace(own=True)
            self.calls.append(Call(place[0], "swish", gated=False))
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__") and below.flags(args[0]) & DECIDES:
            args = (self._decide(args[0]), *args[1:])
        result = self._run(func, args, kwargs, covered=func in UNGATEABLE or func in OUTPUT_ONLY)
        products.record_call(func, args, value, result)
        if func in OUTPUT_ONLY:
            self.suspects.append((Call(place[0], OUTPUT_ONLY[func], gated=False), result, result._version))
        return result

    def _note(self, place: Place, call: Gated) -> None:
        """Note a gated call before it runs."""
        refuse_inside(place[0], call.input)
        below, (kind, size) = self._below, classify(call)
        own = below.is_inside_function(sys._getframe())
        self.calls.append(Call(place[0], describe(kind, size), gated=True, own=own))
        shape = tuple(call.input.shape)
        free = call.dims if isinstance(call, Pool) else 0
        key = as_key(place, kind)
        made = GatedCall(key, frozenset(below.fed), below.last, shape[: len(shape) - free], own, len(self.calls) - 1)
        self.gated.append(made)
        below.fed.clear()
        below.gated |= below.flags(call.input)
        self.chosen += [(place[0], flag) for flag in (CHOSEN, DRAWN) if below.flags(call.input) & flag]

    def _decide(self, tensor: Tensor) -> Tensor:
        """Note that a whole tensor is read. Return it, or one with other values."""
        changed = self._below.decide_tensor()
        if changed is None:
            return tensor
        return ~tensor if tensor.dtype == torch.bool else tensor + (1, -1)[changed]

    def _run(self, func: Any, args: Any, kwargs: Any, covered: bool) -> Any:
        below = self._below
        before = below.function, below.covered
        below.function, below.covered = getattr(func, "__name__", ""), covered
        try:
            return func(*args, **kwargs)
        finally:
            below.function, below.covered = before


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    own_pooling: bool = False,
    evaluation: bool = False,
    weights: nn.Module | None = None,
    alter: Mapping[int, int] | None = None,
    grad: bool = False,
    seed: int | None = None,
) -> Traced:
    """Run one forward of a copy of the model and return what it does, in order.

    With `evaluation` the copy is in evaluation mode, else in the mode of the model. The model, its buffers and
    the global random generators do not change.

    Args:
        weights: another copy of the model, whose parameters and buffers are used.
        alter: number of a decision -> number of the other value that it gets.
        grad: whether gradients are on, as some models take another path then.
        seed: where the random generators start; None: where they are.
    """
    runner = copy_model(model, hooks=False)
    if weights is not None:
        _take_weights(runner, weights)
    if evaluation:
        runner.eval()
    args, kwargs = clone_arguments(args, kwargs)
    places, before = Places(runner), Snapshot(runner)
    given = list(find_tensors([args, dict(kwargs)]))
    below = Below(places.find, _find_weights(runner), given, alter or {})
    watch = _Trace(own_pooling, places, below)
    devices = {t.device for t in given if t.device.type == "cuda"}
    with keep_random_states(devices, seed) as moved, without_global_hooks(), _record_for_nobody(grad), watch, below:
        output = runner(*args, **kwargs)
    outputs = {t.untyped_storage().data_ptr() for t in find_tensors(output)}
    hidden = [
        call
        for call, result, version in watch.suspects
        # After a later write, as in x.sigmoid().mul_(x), the output is another function.
        if result.untyped_storage().data_ptr() not in outputs or result._version != version
    ]
    hidden += [
        Call(seen.path, seen.what, gated=False, below=True)
        for seen, result in below.suspects
        if result.untyped_storage().data_ptr() not in outputs
    ]
    judged = {path for path, module in runner.named_modules() if isinstance(module, tuple(UNGATEABLE_MODULES))}
    unseen = [
        Call(seen.path, seen.what, gated=False, below=True)
        for seen in below.seen + below.find_used(find_tensors(output))
        if not any(seen.path == path or seen.path.startswith(f"{path}.") for path in judged)
        and not (own_pooling and "max" in seen.what)
    ]
    gated = [call._replace(own=watch.calls[call.number].own) for call in watch.gated]
    return Traced(
        watch.calls + hidden + unseen, gated, below.decisions, below.draws, moved(), watch.chosen, before.find_writes()
    )


@contextmanager
def _record_for_nobody(grad: bool) -> Iterator[None]:
    """Set whether gradients are on. What autograd saves is not shown to the user's hooks for saved tensors."""
    with torch.set_grad_enabled(grad), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield


def _take_weights(model: nn.Module, other: nn.Module) -> None:
    """Copy the parameters and buffers of `other` that `model` has in the same shape."""
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in theirs and theirs[name].shape == tensor.shape:
                tensor.copy_(theirs[name])


def _find_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what can differ between two copies: the parameters, and the buffers that are no integers."""
    # A counter is a number; other integers are indices, and the same in both copies.
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point() or b.is_complex() or not b.dim()}
    return dict(model.named_parameters()) | buffers

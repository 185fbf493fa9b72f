"""The two passes of a gated forward: capture the structural copy's gates, then replay them.

Both passes intercept the torch functions that the forward calls, in call order, on the current thread. They
change nothing in the modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from ..errors import GateError
from . import gates, pooling
from .activations import GATED, Gated, GateKind, classify, describe
from .places import Place, Places
from .plan import Ledger, Plan, as_key, describe_parting
from .pooling import Pool


class Gate(NamedTuple):
    """The decision of the structural copy at one gated call."""

    kind: GateKind
    region: Tensor
    """uint8: the region of each activation. For pooling: the code of each output entry."""
    size: tuple[int, ...] = ()
    """For pooling, the spatial size of its input."""
    place: Place | None = None
    """Where the call is made; None if that is unknown, as under torch.compile."""


class Watch(TorchFunctionMode):
    """Call `on_gated` for gated functions. Run all other functions unchanged."""

    def __init__(self, own_pooling: bool, places: Places | None) -> None:
        super().__init__()
        self._own_pooling, self._places = own_pooling, places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        normalise = GATED.get(func)
        if normalise is None:
            return func(*args, **(kwargs or {}))
        call = normalise(*args, **(kwargs or {}))
        if self._own_pooling and isinstance(call, Pool):
            return func(*args, **(kwargs or {}))
        place = None if self._places is None else self._places.find(sys._getframe().f_back)
        return self.on_gated(call, place, lambda: func(*args, **(kwargs or {})))

    def on_gated(self, call: Gated, place: Place | None, run: Callable[[], Any]) -> Any:
        raise NotImplementedError


class Capture(Watch):
    """Run the structural copy unchanged and record its gates."""

    def __init__(self, own_pooling: bool, places: Places | None = None) -> None:
        super().__init__(own_pooling, places)
        self.gates: list[Gate] = []

    def on_gated(self, call: Gated, place: Place | None, run: Callable[[], Any]) -> Any:
        if isinstance(call, Pool):
            values, region = pooling.choose(call)
        else:
            region = gates.find_regions(call)
            # RReLU with training=True would be random, also in a functional call.
            maybe_random = not isinstance(call.slope, Tensor) and call.slope != 0.0
            values = gates.apply(call, region) if maybe_random else run()
        kind, size = classify(call)
        self.gates.append(Gate(kind, region, size, place))
        return values


class Replay(Watch):
    """Run the quantitative copy under the structural copy's gates.

    A call uses the gate of the same call in the structural copy, by its place in the model. Where places are
    unknown, the k-th call uses the gate that the plan's order gives.
    """

    def __init__(self, captured: Sequence[Gate], plan: Plan, own_pooling: bool, places: Places | None = None) -> None:
        known = [as_key(gate.place, gate.kind) for gate in captured if gate.place is not None]
        super().__init__(own_pooling, places if len(known) == len(captured) else None)
        self._captured, self._plan = captured, plan
        self._ledger = Ledger(plan, known)
        self._calls = 0
        self._with_grad = torch.is_grad_enabled()

    def on_gated(self, call: Gated, place: Place | None, run: Callable[[], Any]) -> Any:
        number, self._calls = self._calls, self._calls + 1
        kind = classify(call)[0]
        source = self._find_by_order(number) if place is None else self._ledger.find(as_key(place, kind))
        if source is None:
            return run()
        if self._with_grad and not torch.is_grad_enabled() and _runs_in_checkpoint():
            raise GateError(
                "activation checkpointing (use_reentrant=True) runs the model again in the backward pass, "
                "where it would use its own gates: turn it off"
            )
        gate = self._captured[source]
        shape = call.input.shape
        gate_shape, free = gate.region.shape, call.dims if isinstance(call, Pool) else 0
        same_shape = gate_shape[: len(gate_shape) - free] == shape[: len(shape) - free]
        if classify(call) != (gate.kind, gate.size) or not same_shape:
            what = (
                f"gated call {number} is {describe(*classify(call))} on shape {tuple(shape)}, the "
                f"structural copy's was {describe(gate.kind, gate.size)} with gates of {tuple(gate_shape)}"
            )
            raise GateError(describe_parting(place[0] if place else "", what))
        if isinstance(call, Pool):
            return pooling.route(call, gate.region)
        return gates.apply(call, gate.region)

    def _find_by_order(self, number: int) -> int | None:
        order = self._plan.order
        if number >= len(order):
            raise GateError(describe_parting("", f"it makes more than {len(order)} gated calls"))
        source = order[number]
        if source is not None and source >= len(self._captured):
            raise GateError(describe_parting("", f"there are gates of {len(self._captured)} calls only"))
        return source

    def finish(self) -> None:
        """Raise GateError if the forward left out calls, and it is unknown which."""
        if self._places is not None:
            self._ledger.finish()
        elif self._calls != len(self._plan.order):
            what = f"{self._calls} gated calls instead of {len(self._plan.order)}"
            raise GateError(describe_parting("", what))


def _runs_in_checkpoint() -> bool:
    """Return whether the caller runs inside a reentrant activation checkpoint."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def capture(
    model: torch.nn.Module, args: Any, kwargs: Any, own_pooling: bool, places: Places | None = None
) -> list[Gate]:
    """Run one forward of the structural copy without gradient and return its gates.

    The forward leaves inference mode, so that training can use the gates.
    """
    watch = Capture(own_pooling, places)
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = clone_arguments(args, kwargs)
        with watch:
            model(*args, **kwargs)
    return watch.gates


def clone_arguments(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Clone the tensors in a model's arguments. The model may write into its input, and a second run follows."""
    copies: tuple[tuple[Any, ...], dict[str, Any]]
    copies = tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
    return copies


def replay(
    model: torch.nn.Module,
    captured: Sequence[Gate],
    plan: Plan,
    args: Any,
    kwargs: Any,
    own_pooling: bool,
    places: Places | None = None,
) -> Any:
    """Run one forward of the quantitative copy under the given gates."""
    watch = Replay(captured, plan, own_pooling, places)
    with watch:
        output = model(*args, **kwargs)
    watch.finish()
    return output

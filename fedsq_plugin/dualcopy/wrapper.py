"""DualCopy: a plain network that is trained under the gates of a frozen copy."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import GateError
from .attributes import freeze, refuse_module
from .copies import copy_model, without_global_hooks
from .frozen import get_versions, refuse_new_writes, undo
from .hooks import check_hooks, get_stamp
from .inspection import Inspection
from .passes import Gate, capture, replay
from .places import Places
from .plan import Plan
from .precision import HALF, Precision, compute_in, widen
from .randomness import get_states, set_states
from .transforms import refuse_transforms
from .validation import TwoCopies, find_in_modules, refuse, validate

Pooling = Literal["structural", "own"]


class DualCopy(TwoCopies):
    """A network with two copies of its weights: the structural copy decides the gates, the quantitative is trained.

    The structural copy is made at construction. It runs in evaluation mode and without gradient. For every
    input it gives the region of each piecewise-linear activation and the argmax of each max-pooling. The
    quantitative copy is `model` itself and uses these gates in place of its own. Directly after construction,
    in evaluation mode, the output equals the plain model's output bit for bit. Source: FedSQ, arXiv
    2604.02990; the gates of pooling and of activations other than ReLU are reconstructed.

    From outside, a DualCopy looks like the plain model: `parameters()`, `buffers()`, `named_modules()` and
    `state_dict()` are those of the quantitative copy, with the names of the plain model. The structural copy
    follows `.to()` only. Calls that occur only in training mode (auxiliary heads) use their own gates.

    Args:
        model: any torch model. It becomes the quantitative copy; it is not copied.
        accept: paths (or glob patterns) of activations that may stay ungated; `path:activation` names a
            functional call inside the module at `path`.
        pooling: "structural" gates max-pooling by the structural copy; with "own" it is not gated.
        example: an input batch. With it, functional activations are checked now; without it, at the first
            forward.
        structural_precision: precision of the structural copy, also inside autocast. Then the gates of an
            input do not depend on the precision of the training. None: the surrounding autocast applies.

    Raises:
        GateError: an activation cannot be gated, or there is no gate at all. Without `example`, functional
            activations raise it at the first forward.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> dual, x = DualCopy(net), torch.randn(3, 4)
    >>> torch.equal(dual(x), net(x))
    True
    >>> list(dual.state_dict()) == list(net.state_dict())
    True
    """

    _quantitative: nn.Module
    _structural: nn.Module
    structural_version: int
    """Number of changes of the structural copy. A cache of gates uses it to see that they are outdated."""

    def __init__(
        self,
        model: nn.Module,
        accept: Iterable[str] = (),
        pooling: Pooling = "structural",
        example: Any = None,
        structural_precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if isinstance(accept, str):
            raise GateError(f"accept is a list of names, got the string {accept!r}: use [{accept!r}]")
        if pooling not in ("structural", "own"):
            raise GateError(f"pooling is {pooling!r}; it must be 'structural' or 'own'")
        if structural_precision not in (None, *get_args(Precision)):
            known = ", ".join(get_args(Precision))
            raise GateError(f"structural_precision is {structural_precision!r}; it must be one of {known}, None")
        accept = tuple(accept)
        refuse(find_in_modules(model, accept) if example is None else validate(model, example, accept, pooling))
        structural = copy_model(model, hooks=False).eval().requires_grad_(False)
        # The registries are shared with the plain model, so every walk over modules, parameters and buffers
        # finds the same. The two copies themselves are not in the registries.
        self.__dict__.update(
            _quantitative=model,
            _structural=structural,
            _parameters=model._parameters,
            _buffers=model._buffers,
            _modules=model._modules,
            _non_persistent_buffers_set=model._non_persistent_buffers_set,
            training=model.training,
            _accept=accept,
            _own_pooling=pooling == "own",
            _structural_precision=structural_precision,
            _plans={},
            _places=(Places(structural), Places(model)),
            structural_version=0,
            _hooks_checked=None,
        )

    @property
    def quantitative(self) -> nn.Module:
        """The copy that is trained: the plain model. If it is called directly, it uses its own gates."""
        return self._quantitative

    @property
    def gate_dtype(self) -> torch.dtype | None:
        """The dtype that autocast now gives the structural copy; None: no autocast."""
        if self._structural_precision is not None:
            return HALF.get(self._structural_precision)
        device = _get_device(self._structural).type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    @property
    def structural(self) -> nn.Module:
        """The copy that decides the gates. After `unfreeze` it is the quantitative copy."""
        return self._structural

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the quantitative copy's output under the structural copy's gates for this input."""
        refuse_transforms()
        if self.unfrozen:
            return self._quantitative(*args, **kwargs)
        if not self.draws(args, kwargs):
            return self.gated(self.gates(*args, **kwargs), *args, **kwargs)
        device = _get_device(self._structural)
        states = get_states([device] if device.type == "cuda" else [])
        gates = self.gates(*args, **kwargs)
        set_states(states)  # both copies draw the same
        return self._replay(gates, args, kwargs)

    def draws(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Return whether the structural copy draws random numbers. Then only `forward` gives both copies the same."""
        return self._inspect(args, kwargs or {}).draws

    def gates(self, *args: Any, **kwargs: Any) -> list[Gate]:
        """Return the structural copy's gates for an input, in call order, one byte per activation.

        The gates stay valid until the structural copy changes (`structural_version`).
        """
        return self._run_capture(partial(capture, places=self._places[0]), args, kwargs)

    def _run_capture(self, run: Callable[..., list[Gate]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Gate]:
        """Do `gates` by `run`, which is `capture` or its compiled form."""
        plan = self._inspect(args, kwargs)
        structural, buffered = self._structural, self._places[0].buffered
        with ExitStack() as stack:
            if self._structural_precision is not None:
                args, kwargs = widen(structural, (args, kwargs))
                stack.enter_context(compute_in(self._structural_precision, _get_device(structural)))
            stack.enter_context(without_global_hooks())
            before = get_versions(buffered)
            with undo(structural, plan.writes):
                gates = run(structural, args, kwargs, self._own_pooling)
            if not plan.writes:
                refuse_new_writes(structural, buffered, before)
        return gates

    def gated(self, gates: Sequence[Gate], *args: Any, **kwargs: Any) -> Any:
        """Return the quantitative copy's output for an input under the given gates.

        Raises:
            GateError: the gates belong to another input shape or another model, or the model draws random numbers.
        """
        if self.draws(args, kwargs):
            raise GateError(
                "the model draws random numbers in evaluation mode too, so that given gates belong to other draws; "
                "call the DualCopy, which gives both copies the same"
            )
        return self._replay(gates, args, kwargs)

    def _replay(self, gates: Sequence[Gate], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, stamp = partial(replay, places=self._places[1]), get_stamp()
        if stamp == self._hooks_checked:
            return self._run_replay(run, gates, args, kwargs)
        with check_hooks(self._quantitative):
            output = self._run_replay(run, gates, args, kwargs)
        self.__dict__["_hooks_checked"] = stamp
        return output

    def _run_replay(
        self, run: Callable[..., Any], gates: Sequence[Gate], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do `gated` by `run`, which is `replay` or its compiled form."""
        plan = self._inspect(args, kwargs)
        return run(self._quantitative, gates, plan, args, kwargs, self._own_pooling)

    def find_dependent(self, find: Callable[[nn.Module, Tensor, bool], str | None], x: Tensor) -> str | None:
        """Return what `find_dependent` says of the structural copy."""
        with compute_in("fp32", _get_device(self._structural)):
            return find(self._structural, x, self._own_pooling)

    def release(self) -> nn.Module:
        """Return an independent copy of the quantitative copy: a plain module with its own gates.

        After training it computes another function than the DualCopy; report the results of both.
        """
        return copy_model(self._quantitative)

    def refresh(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Load `state` (default: the quantitative copy's) into the structural copy. After `unfreeze`, make one anew."""
        if self.unfrozen:
            self.__dict__["_structural"] = copy_model(self._quantitative, hooks=False).eval().requires_grad_(False)
            self.__dict__["_places"] = (Places(self._structural), Places(self._quantitative))
        self._structural.load_state_dict(self._quantitative.state_dict() if state is None else state)
        self.structural_version += 1

    def unfreeze(self) -> None:
        """Remove the structural copy. From now on the quantitative copy uses its own gates."""
        self.__dict__["_structural"] = self._quantitative
        self.structural_version += 1

    @property
    def unfrozen(self) -> bool:
        """Whether the structural copy is removed."""
        return self._structural is self._quantitative

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the state of both copies. The keys have the prefix `quantitative.` or `structural.`."""
        copies = {"quantitative": self._quantitative, "structural": self._structural}
        return {f"{name}.{key}": value for name, module in copies.items() for key, value in module.state_dict().items()}

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `full_state_dict`."""
        for name, module in (("quantitative", self._quantitative), ("structural", self._structural)):
            prefix = f"{name}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
        self.structural_version += 1

    def _inspect(self, args: Any, kwargs: Any) -> Plan:
        """Check the first forward in each mode. Return the plan that matches the copies' calls."""
        mode = (self._quantitative.training, torch.is_grad_enabled())
        found: Plan | None = self._plans.get(mode)
        if found is None:
            options = (self._own_pooling, self._accept, mode[1])
            found = Inspection(self._structural, self._quantitative, args, kwargs, *options).plan
            self._plans[mode] = found
        return found

    # The methods below make the DualCopy look like the plain model.

    def train(self, mode: bool = True) -> DualCopy:
        self.training = mode
        self._quantitative.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._quantitative.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._quantitative.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> DualCopy:
        for module in (self._quantitative, self._structural):
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the model, in both copies."""
        model = self.__dict__.get("_quantitative")
        if model is None or name in self.__dict__ or hasattr(nn.Module, name):
            super().__setattr__(name, value)
        elif hasattr(type(self), name):
            raise GateError(f"{name} is a name of DualCopy itself; to set the model's, write .quantitative.{name}")
        else:
            self._write(lambda copy, part: setattr(copy, name, part), name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            self._write(lambda copy, _: delattr(copy, name), name, None)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._write(lambda copy, part: copy.register_buffer(name, part, persistent), name, tensor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._write(lambda copy, part: copy.register_parameter(name, part), name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._write(lambda copy, part: copy.add_module(name, part), name, module)

    def _write(self, write: Callable[[nn.Module, Any], None], name: str, value: Any) -> None:
        """Write `value` into the quantitative copy, and a frozen copy of it into the structural one."""
        refuse_module(name, value, self._accept)
        frozen = None if self.unfrozen else freeze(value)
        write(self._quantitative, value)
        if not self.unfrozen:
            write(self._structural, frozen)
        self._plans.clear()
        self.__dict__["_places"] = (Places(self._structural), Places(self._quantitative))
        self.structural_version += 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_quantitative")
            if model is None or name.startswith("__"):
                raise
        value = getattr(model, name)
        if isinstance(value, types.MethodType):
            raise AttributeError(
                f"{type(model).__name__}.{name} would run without the structural copy's gates; "
                f"call the DualCopy, or .quantitative.{name} if that is meant"
            )
        return value


def _get_device(model: nn.Module) -> torch.device:
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device

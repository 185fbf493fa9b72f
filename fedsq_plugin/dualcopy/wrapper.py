"""DualCopy: a plain network, trained under the gates of a frozen copy of itself."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import GateError
from .passes import Gate, capture, replay
from .precision import HALF, Precision, exactly, widened
from .tracing import TwoCopies, align, detached_copy, trace
from .validation import call_findings, refuse, static_findings, validate

Pooling = Literal["structural", "own"]


class DualCopy(TwoCopies):
    """The quantitative copy of a network under the structural copy's gates.

    For every input, the structural copy (taken at construction, in evaluation mode, without gradient)
    decides each piecewise-linear activation's region and each max-pooling's argmax; the quantitative
    copy, which is `model` itself, is scaled and routed by them. Right after construction, in evaluation
    mode, the output equals the plain model's bit for bit. Source: FedSQ, arXiv 2604.02990; activations
    other than ReLU, and pooling, are reconstructed.

    To everything outside, a DualCopy looks like the plain model: `parameters()`, `buffers()`,
    `named_modules()` and `state_dict()` are the quantitative copy's, with the plain model's names. The
    structural copy follows `.to()` only. Calls made in training mode alone (auxiliary heads) have no
    structural gate and keep their own.

    Args:
        model: any torch model. It becomes the quantitative copy, not a copy of it.
        accept: paths (or glob patterns) of activations that may stay ungated; `path:activation` names a
            functional call inside the module at `path`.
        pooling: "structural" routes max-pooling by the structural copy; "own" leaves it alone.
        example: an input batch, to have functional activations checked now instead of at the first
            forward.
        structural_precision: what the structural copy computes in, whatever autocast surrounds the call: then
            the gates of an input do not depend on the precision of the training. None: as the surroundings
            do, and as the plain model does there.

    Raises:
        GateError: an activation cannot be gated, or there is no gate at all. Where only running the
            model can tell, at the first forward.

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
    """Counts the changes of the structural copy, for whoever keeps its gates."""

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
        if example is not None:
            refuse(validate(model, example, accept, pooling))
        else:
            refuse(static_findings(model, accept))
        structural = detached_copy(model).eval().requires_grad_(False)
        # Sharing the registries makes this module and the plain one the same to every walk over
        # modules, parameters and buffers; the copies themselves stay outside the registries.
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
            structural_version=0,
        )

    @property
    def quantitative(self) -> nn.Module:
        """The trained copy: the plain model, with its own gates when called directly."""
        return self._quantitative

    @property
    def gate_dtype(self) -> torch.dtype | None:
        """What autocast would have the structural copy compute in now; None: its weights' own."""
        if self._structural_precision is not None:
            return HALF.get(self._structural_precision)
        device = _device(self._structural).type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    @property
    def structural(self) -> nn.Module:
        """The copy that decides the gates; the quantitative copy itself after `unfreeze`."""
        return self._structural

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The quantitative copy's output under the structural copy's gates for this input."""
        if self.unfrozen:
            return self._quantitative(*args, **kwargs)
        return self.gated(self.gates(*args, **kwargs), *args, **kwargs)

    def gates(self, *args: Any, **kwargs: Any) -> list[Gate]:
        """The structural copy's decisions for an input, in call order, one byte per activation.

        They stay valid as long as the structural copy does, so that an input that comes again need not
        be run through it again.
        """
        return self._captured(capture, args, kwargs)

    def _captured(self, run: Callable[..., list[Gate]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Gate]:
        """`gates`, by `capture` itself or something that does the same."""
        self._inspect(args, kwargs)
        if self._structural_precision is None:
            return run(self._structural, args, kwargs, self._own_pooling)
        args, kwargs = widened(self._structural, (args, kwargs))
        with exactly(self._structural_precision, _device(self._structural)):
            return run(self._structural, args, kwargs, self._own_pooling)

    def gated(self, gates: Sequence[Gate], *args: Any, **kwargs: Any) -> Any:
        """The quantitative copy's output for an input whose gates are given.

        Raises:
            GateError: the gates are of another input shape or another model.
        """
        return self._replayed(replay, gates, args, kwargs)

    def _replayed(
        self, run: Callable[..., Any], gates: Sequence[Gate], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`gated`, by `replay` itself or something that does the same."""
        plan = self._inspect(args, kwargs)
        return run(self._quantitative, gates, plan, args, kwargs, self._own_pooling)

    def release(self) -> nn.Module:
        """An independent copy of the quantitative copy as a plain module, with its own gates.

        It is another function than the DualCopy once training has moved it; report both.
        """
        return detached_copy(self._quantitative)

    def refresh(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Replace the structural copy's weights by `state` (default: the quantitative copy's). Where it was
        given up, there is one again."""
        if self.unfrozen:
            self.__dict__["_structural"] = detached_copy(self._quantitative).eval().requires_grad_(False)
        self._structural.load_state_dict(self._quantitative.state_dict() if state is None else state)
        self.structural_version += 1

    def unfreeze(self) -> None:
        """Give up the structural copy: from now on the gates are the quantitative copy's own."""
        self.__dict__["_structural"] = self._quantitative
        self.structural_version += 1

    @property
    def unfrozen(self) -> bool:
        """Whether the structural copy was given up."""
        return self._structural is self._quantitative

    def full_state_dict(self) -> dict[str, Tensor]:
        """Both copies: the plain keys, prefixed by `quantitative.` and `structural.`."""
        copies = {"quantitative": self._quantitative, "structural": self._structural}
        return {f"{name}.{key}": value for name, module in copies.items() for key, value in module.state_dict().items()}

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `full_state_dict` gave."""
        for name, module in (("quantitative", self._quantitative), ("structural", self._structural)):
            prefix = f"{name}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
        self.structural_version += 1

    def _inspect(self, args: Any, kwargs: Any) -> Sequence[int | None] | None:
        """Check the first forward in each mode; how the copies' calls correspond."""
        mode = self._quantitative.training
        if mode not in self._plans:
            calls = trace(self._structural, args, kwargs, self._own_pooling)
            own = trace(self._quantitative, args, kwargs, self._own_pooling) if mode else calls
            refuse(call_findings(calls if own is calls else calls + own, self._accept))
            self._plans[mode] = align(calls, own)
        plan: Sequence[int | None] | None = self._plans[mode]
        return plan

    # What the outside sees is the plain model.

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


def _device(model: nn.Module) -> torch.device:
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device

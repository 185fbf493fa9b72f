"""A forward through torch.compile, beside the model rather than around it: the model stays what it is, with
its own keys, to be loaded, sent and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .passes import Gate, capture, replay
from .wrapper import DualCopy


def _call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


class Compiled:
    """The forward of a model, of a DualCopy its two passes, each compiled as one graph or not at all.

    Gates agree with the model's own up to the rounding of fused kernels. There is one per process that
    trains: a new one makes what others have compiled void.

    Raises:
        ConfigError: from a call, where torch.compile does not take the model as a whole.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        # torch keeps at most eight compilations of one function, and runs it uncompiled from then on.
        torch.compiler.reset()
        self._model = model
        self._gates: int | None = None
        self._capture, self._replay, self._plain = (
            self._refusing(torch.compile(function, fullgraph=True, backend=backend))
            for function in (capture, replay, _call)
        )

    def __call__(self, x: Tensor) -> Any:
        model = self._model
        if not isinstance(model, DualCopy) or model.unfrozen:
            plain = model.quantitative if isinstance(model, DualCopy) else model
            return self._plain(plain, x)
        return self.gated(self.gates(x), x)

    def gates(self, x: Tensor) -> list[Gate]:
        """As `DualCopy.gates`."""
        assert isinstance(self._model, DualCopy)
        if self._gates is None:
            self._gates = len(self._model.gates(x))
        found = self._model._captured(self._capture, (x,), {})
        if len(found) != self._gates:  # what is passed over here would silently have its own gate
            raise ConfigError(
                f"torch.compile sees {len(found)} of the {self._gates} gated calls of this model (not those "
                "of functions that write into their input, perhaps); set fedsq_args.compile: false"
            )
        return found

    def gated(self, gates: Sequence[Gate], x: Tensor) -> Any:
        """As `DualCopy.gated`."""
        assert isinstance(self._model, DualCopy)
        return self._model._replayed(self._replay, gates, (x,), {})

    @staticmethod
    def _refusing(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            from torch._dynamo.exc import TorchDynamoException

            try:
                return compiled(*args)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split("\n")[:2]).strip()
                raise ConfigError(
                    f"torch.compile does not take this model as a whole: {type(error).__name__}: {reason}; "
                    "set fedsq_args.compile: false"
                ) from error

        return run

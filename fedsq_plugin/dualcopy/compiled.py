"""The forward through torch.compile. The model itself is not wrapped, so its state-dict keys do not change."""

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
    """The compiled forward of a model. For a DualCopy, each of the two passes is compiled as one graph.

    Gates equal those of the model, except for the rounding of fused kernels. Use only one per process: a new
    one resets torch.compile, and the code that others compiled is lost.

    Raises:
        ConfigError: on a call, if torch.compile cannot compile the whole model.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        # torch compiles one function at most eight times; after that it runs the function uncompiled.
        torch.compiler.reset()
        self._model = model
        self._gates: int | None = None
        self._capture, self._replay, self._plain = (
            self._raise_config_error(torch.compile(function, fullgraph=True, backend=backend))
            for function in (capture, replay, _call)
        )

    def __call__(self, x: Tensor) -> Any:
        model = self._model
        if not isinstance(model, DualCopy) or model.unfrozen:
            plain = model.quantitative if isinstance(model, DualCopy) else model
            return self._plain(plain, x)
        if model.draws((x,)):
            raise ConfigError(
                "the model draws random numbers in evaluation mode too, and its compiled passes would draw others; "
                "set fedsq_args.compile: false"
            )
        return self.gated(self.gates(x), x)

    def gates(self, x: Tensor) -> list[Gate]:
        """Do what `DualCopy.gates` does."""
        assert isinstance(self._model, DualCopy)
        if self._gates is None:
            self._gates = len(self._model.gates(x))
        found = self._model._run_capture(self._capture, (x,), {})
        if len(found) != self._gates:  # a call that the compiler does not see would silently use its own gate
            raise ConfigError(
                f"torch.compile sees {len(found)} of the {self._gates} gated calls of this model (not those "
                "of functions that write into their input, perhaps); set fedsq_args.compile: false"
            )
        return found

    def gated(self, gates: Sequence[Gate], x: Tensor) -> Any:
        """Do what `DualCopy.gated` does."""
        assert isinstance(self._model, DualCopy)
        return self._model._run_replay(self._replay, gates, (x,), {})

    @staticmethod
    def _raise_config_error(compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a compiled function so that errors of the compiler become a ConfigError."""

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

"""Transforms of torch that cannot run a DualCopy: torch.func, torch.export, torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GateError


def refuse_inside(path: str, input: Tensor) -> None:
    """Raise GateError for a gated call on a nested tensor, or inside a transform of torch.func in a model's forward."""
    where = path or "the model itself"
    if input.is_nested:
        raise GateError(f"{where}: gets a nested tensor, which cannot be gated: pad its parts to one dense tensor")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise GateError(
            f"{where}: is called inside a transform of torch.func (vmap, grad), where it cannot be gated: call it on "
            "the whole batch, without the transform"
        )


def refuse_transforms() -> None:
    """Raise GateError if a transform traces the forward: the two passes of a DualCopy are not one graph of torch."""
    if torch.compiler.is_compiling():
        raise GateError(
            "torch.compile and torch.export do not take a DualCopy: set the option compile, or use dualcopy.Compiled, "
            "to compile its passes; export .release(), the plain module with its own gates"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise GateError(
            "torch.func's transforms (vmap, grad) do not take a DualCopy: call backward() or torch.autograd.grad, one "
            "sample at a time for gradients per sample; .release() gives a plain module with its own gates"
        )

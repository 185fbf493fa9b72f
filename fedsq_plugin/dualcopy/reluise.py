"""Model surgery for ReLU-isation: smooth activations -> λ-activations -> ReLU.

Only modules are replaced. A functional call, as `F.gelu(x)` in a forward, stays what it is, and is found by
`validate` and refused by DualCopy under its own name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError
from .smooth import Kind, LambdaActivation
from .wrapper import DualCopy


def replace_by_lambda(model: nn.Module, initial: float = 1.01, temperature: float = 0.1) -> dict[str, LambdaActivation]:
    """Replace every nn.GELU, nn.SiLU and nn.Hardswish of `model` by a LambdaActivation, in place.

    A module that is used at several paths is replaced by one. `model.state_dict()` gains a key `<path>.s`
    for each.

    Returns:
        What `activations` does.

    Raises:
        ConfigError: there is none to replace, or a value is out of its range.
    """
    if isinstance(model, DualCopy):
        raise ConfigError("the model is a DualCopy already; replace its activations before wrapping it")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def make(module: nn.Module) -> nn.Module | None:
        kind = _kind(module)
        return LambdaActivation(kind, initial, temperature).to(device) if kind else None

    if not _replace(model, make):
        raise ConfigError(
            "the model holds no nn.GELU, nn.SiLU or nn.Hardswish to replace; "
            "a functional call, as F.gelu, has to be made a module first"
        )
    return activations(model)


def replace_by_relu(model: nn.Module) -> None:
    """Replace every LambdaActivation of `model` by nn.ReLU, in place; a shared one by one.

    The state-dict keys are then those from before `replace_by_lambda`.

    Raises:
        ConfigError: there is none to replace.
    """
    if not _replace(model, lambda module: nn.ReLU() if isinstance(module, LambdaActivation) else None):
        raise ConfigError("the model holds no LambdaActivation to replace; call replace_by_lambda before")


def activations(model: nn.Module) -> dict[str, LambdaActivation]:
    """Path -> LambdaActivation, in the model's order; a shared one once, under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LambdaActivation)}


def lambdas(model: nn.Module) -> dict[str, float]:
    """Path -> λ of each LambdaActivation, as `activations` orders them."""
    return {path: module.lam.item() for path, module in activations(model).items()}


def _kind(module: nn.Module) -> Kind | None:
    # A subclass with a forward of its own computes something else.
    forward = type(module).forward
    if isinstance(module, nn.GELU) and forward is nn.GELU.forward:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if isinstance(module, nn.SiLU) and forward is nn.SiLU.forward:
        return "silu"
    if isinstance(module, nn.Hardswish) and forward is nn.Hardswish.forward:
        return "hardswish"
    return None


def _replace(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> bool:
    """Replace the modules inside `model` for which `make` gives another; whether there was one."""
    made: dict[nn.Module, nn.Module] = {}
    for owner in list(model.modules()):
        for name, module in list(owner._modules.items()):
            if module is None:
                continue
            new = made.get(module) or make(module)
            if new is None:
                continue
            made[module] = new.train(module.training)
            setattr(owner, name, new)
            if isinstance(owner, nn.TransformerEncoderLayer):
                # Its fused kernel has the activation it was built with, and runs whenever this is set.
                owner.activation_relu_or_gelu = 0
    return bool(made)

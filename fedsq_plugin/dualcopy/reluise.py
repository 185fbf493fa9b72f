"""ReLU-isation replaces activation modules: smooth activation -> λ-activation -> ReLU.

It replaces modules only. A functional call such as `F.gelu(x)` stays; `validate` finds it and DualCopy rejects it.
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

    A module with several paths gets one replacement. `model.state_dict()` gets a new key `<path>.s` per path.

    Returns:
        The same as `activations(model)`.

    Raises:
        ConfigError: the model has no such module, or a value is out of range.
    """
    if isinstance(model, DualCopy):
        raise ConfigError("the model is a DualCopy already; replace its activations before wrapping it")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def make(module: nn.Module) -> nn.Module | None:
        kind = _find_kind(module)
        return LambdaActivation(kind, initial, temperature).to(device) if kind else None

    if not _replace(model, make):
        raise ConfigError(
            "the model holds no nn.GELU, nn.SiLU or nn.Hardswish to replace; "
            "a functional call, as F.gelu, has to be made a module first"
        )
    return activations(model)


def replace_by_relu(model: nn.Module) -> None:
    """Replace every LambdaActivation of `model` by nn.ReLU, in place. This undoes the new state-dict keys.

    Raises:
        ConfigError: the model has no LambdaActivation.
    """
    if not _replace(model, lambda module: nn.ReLU() if isinstance(module, LambdaActivation) else None):
        raise ConfigError("the model holds no LambdaActivation to replace; call replace_by_lambda before")


def activations(model: nn.Module) -> dict[str, LambdaActivation]:
    """Path -> LambdaActivation, in the order of the model. A shared module occurs once, under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LambdaActivation)}


def lambdas(model: nn.Module) -> dict[str, float]:
    """Path -> λ of each LambdaActivation, in the order of `activations`."""
    return {path: module.lam.item() for path, module in activations(model).items()}


def _find_kind(module: nn.Module) -> Kind | None:
    # A subclass that overrides forward computes another function.
    forward = type(module).forward
    if isinstance(module, nn.GELU) and forward is nn.GELU.forward:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if isinstance(module, nn.SiLU) and forward is nn.SiLU.forward:
        return "silu"
    if isinstance(module, nn.Hardswish) and forward is nn.Hardswish.forward:
        return "hardswish"
    return None


def _replace(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> bool:
    """Replace each module for which `make` returns a new one. Return whether any was replaced."""
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
                # The layer has a fused kernel with the old activation. 0 switches this kernel off.
                owner.activation_relu_or_gelu = 0
    return bool(made)

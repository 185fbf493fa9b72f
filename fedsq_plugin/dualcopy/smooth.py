"""λ-activations: smooth activations that become ReLU as λ grows.

f(x; λ) = x·g(λx), where the gate g rises from 0 to 1 around 0. For λ = 1, f is the original activation; for
λ → ∞ it becomes ReLU. Source: λ-GELU, arXiv 2603.21991, with g = Φ and λ in [1, ∞). Reconstructed: the other
gates, and the parameterisation λ = 1 + softplus(s/t) with t = 0.1, which is common in the literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, nearest

Kind = Literal["gelu", "gelu_tanh", "silu", "hardswish"]

_EDGE = 1000.0
"""Outside ±_EDGE all gates are constant, also in float64. Clamping there avoids 0·inf in the gradients."""


class _Gate(NamedTuple):
    function: Callable[[Tensor], Tensor]
    area: float
    """∫|g(u) − H(u)|du, where H is the step function, the gate of ReLU."""


def _normal(u: Tensor) -> Tensor:
    # (1 + erf)/2 would lose all digits for very negative u (cancellation).
    return torch.erfc(u * -math.sqrt(0.5)) / 2


def _normal_by_tanh(u: Tensor) -> Tensor:
    # σ(2v) = (1 + tanh(v))/2, but without cancellation for very negative u.
    return torch.sigmoid(math.sqrt(8 / math.pi) * (u + 0.044715 * u**3))


def _ramp(u: Tensor) -> Tensor:
    # Not F.relu6: a DualCopy would gate this call, also if the user accepts the activation ungated.
    return (u + 3).clamp(0, 6) / 6


GATES: dict[str, _Gate] = {
    "gelu": _Gate(_normal, math.sqrt(2 / math.pi)),
    # There is no closed form; the value is from numerical integration.
    "gelu_tanh": _Gate(_normal_by_tanh, 0.797780895574),
    "silu": _Gate(torch.sigmoid, 2 * math.log(2)),
    "hardswish": _Gate(_ramp, 1.5),
}


def _find_gate(kind: str) -> _Gate:
    if kind not in GATES:
        raise ConfigError(f"'{kind}' is no kind of λ-activation{nearest(kind, GATES)}")
    return GATES[kind]


def _widen(value: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def lambda_activation(x: Tensor, lam: Tensor | float, kind: Kind) -> Tensor:
    """Return x·g(λx), with the shape and dtype of x.

    g is Φ for "gelu", its tanh approximation for "gelu_tanh", σ for "silu", relu6(u + 3)/6 for "hardswish". The
    computation is in float32 or float64. Value and gradient are finite for every finite x and every λ ≥ 1.

    Args:
        x: any shape, floating point.
        lam: λ, a scalar or a tensor that broadcasts over x.

    Raises:
        ConfigError: the kind is unknown.
    """
    gate, wide = _find_gate(kind).function, _widen(x)
    u = wide * (lam.to(wide.dtype) if isinstance(lam, Tensor) else lam)
    return (wide * gate(u.clamp(-_EDGE, _EDGE))).to(x.dtype)


def target_lambda(kind: Kind, tolerance: float) -> float:
    """Return the λ* for which ∫|g(λ*x) − H(x)|dx equals `tolerance`, in units of x. H is the step function.

    λ* = area / tolerance. The area, this integral for λ = 1, is √(2/π) for "gelu", 0.79778 for "gelu_tanh",
    2·ln 2 for "silu" and 3/2 for "hardswish". The criterion is reconstructed: the paper's target is unpublished.

    Raises:
        ConfigError: the kind is unknown, or the tolerance is not above 0 and finite.

    >>> round(target_lambda("gelu", 0.01), 4)
    79.7885
    """
    area = _find_gate(kind).area
    if not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance of a hardened gate is {tolerance}; it must be above 0, as 0.01")
    return area / tolerance


class LambdaActivation(nn.Module):
    """A λ-activation with one learnable λ for all its inputs: λ = 1 + softplus(s/t), parameter `s`.

    It never works in place, also if it replaces an in-place activation.

    Args:
        initial: λ at the start, above 1. With the default the function is close to the original activation,
            and the gradient dλ/ds = σ(s/t)/t does not vanish yet.
        temperature: t, above 0.

    Raises:
        ConfigError: the kind is unknown, or a value is out of range.

    >>> LambdaActivation("gelu", initial=2.0)
    LambdaActivation(gelu, lambda=2)
    """

    def __init__(self, kind: Kind, initial: float = 1.01, temperature: float = 0.1) -> None:
        super().__init__()
        _find_gate(kind)
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature of a λ-activation is {temperature}; it must be above 0, as 0.1")
        self.kind: Kind = kind
        self.temperature = temperature
        self.s = nn.Parameter(torch.zeros(()))
        self.set_lambda(initial)

    @property
    def lam(self) -> Tensor:
        """λ: a scalar in float32 or float64, differentiable with respect to `s`."""
        return 1 + F.softplus(_widen(self.s) / self.temperature)

    @torch.no_grad()
    def set_lambda(self, value: float) -> None:
        """Set λ to a value, by s = t·log(exp(λ − 1) − 1).

        Raises:
            ConfigError: the value is not above 1, or too large for the dtype of `s`.
        """
        excess = value - 1
        # exp(λ − 1) is factored out, to avoid overflow for large λ and cancellation near 1.
        s = self.temperature * (excess + math.log(-math.expm1(-excess))) if excess > 0 else math.nan
        if not torch.tensor(s, dtype=self.s.dtype).isfinite():
            raise ConfigError(f"λ of an activation is set to {value}; it must be above 1 and finite, as 1.01")
        self.s.fill_(s)

    def forward(self, x: Tensor) -> Tensor:
        return lambda_activation(x, self.lam, self.kind)

    def extra_repr(self) -> str:
        return f"{self.kind}, lambda={self.lam.item():.6g}"

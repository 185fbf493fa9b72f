"""λ-activations against float64 references, and against PyTorch's activations at λ = 1."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit, ndtr
from torch import Tensor, nn

from fedsq_plugin.dualcopy.smooth import Kind, LambdaActivation, lambda_activation, target_lambda
from fedsq_plugin.errors import ConfigError

Array = npt.NDArray[np.float64]
KINDS: tuple[Kind, ...] = ("gelu", "gelu_tanh", "silu", "hardswish")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_lambda = pytest.mark.parametrize("lam", [1.0, 1.5, 80.0, 1e4])


def cubic(u: Array) -> Array:
    return math.sqrt(8 / math.pi) * (u + 0.044715 * u**3)


def density(u: Array) -> Array:
    return np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)


def logistic_density(v: Array) -> Array:
    return expit(v) * expit(-v)


def cubic_slope(u: Array) -> Array:
    return math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * u**2)


# Gates g and their derivatives g', in float64.
GATE: dict[Kind, Callable[[Array], Array]] = {
    "gelu": ndtr,
    "gelu_tanh": lambda u: expit(cubic(u)),
    "silu": expit,
    "hardswish": lambda u: np.clip(u + 3, 0, 6) / 6,
}
SLOPE: dict[Kind, Callable[[Array], Array]] = {
    "gelu": density,
    "gelu_tanh": lambda u: logistic_density(cubic(u)) * cubic_slope(u),
    "silu": logistic_density,
    "hardswish": lambda u: (abs(u) < 3) / 6,
}
PLAIN: dict[Kind, nn.Module] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


def inputs(lam: float) -> Tensor:
    """float32, dense where the gate moves for this λ; none at ±3/λ, where hard-swish has no derivative."""
    return torch.linspace(-16.003, 16.001, 4001) / lam


def gradients(x: Tensor, lam: float, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Value, df/dx and df/dλ, each entry by entry."""
    x, many = x.clone().requires_grad_(), torch.full_like(x, lam, requires_grad=True)
    value = lambda_activation(x, many, kind)
    by_x, by_lam = torch.autograd.grad(value.sum(), (x, many))
    return value.detach(), by_x, by_lam


@each_kind
@each_lambda
def test_value_is_the_float64_formula(kind: Kind, lam: float) -> None:
    x = inputs(lam)
    wide = x.double().numpy()
    value = gradients(x, lam, kind)[0]
    np.testing.assert_allclose(value.numpy(), wide * GATE[kind](lam * wide), rtol=2e-6, atol=3e-7 / lam)


@each_kind
@each_lambda
def test_gradient_in_x_is_the_float64_formula(kind: Kind, lam: float) -> None:
    # (x·g(λx))' = g(u) + u·g'(u), u = λx
    x = inputs(lam)
    u = lam * x.double().numpy()
    by_x = gradients(x, lam, kind)[1]
    np.testing.assert_allclose(by_x.numpy(), GATE[kind](u) + u * SLOPE[kind](u), rtol=2e-6, atol=2e-6)


@each_kind
@each_lambda
def test_gradient_in_lambda_is_the_float64_formula(kind: Kind, lam: float) -> None:
    # d(x·g(λx))/dλ = x²·g'(u), at most about 0.5/λ² for smooth kinds and 1.5/λ² for hard-swish
    x = inputs(lam)
    wide = x.double().numpy()
    by_lam = gradients(x, lam, kind)[2]
    expected = wide**2 * SLOPE[kind](lam * wide)
    np.testing.assert_allclose(by_lam.numpy(), expected, rtol=1e-5, atol=2e-5 / lam**2)


@pytest.mark.parametrize(("kind", "lowest"), [("gelu", -12.0), ("gelu_tanh", -6.0), ("silu", -80.0)])
def test_left_tail_keeps_its_relative_precision(kind: Kind, lowest: float) -> None:
    # Down to about 1e-33, where x·(1 + erf)/2 would be 0 from -5.5 on. Rounding the gate's argument by
    # 1e-7 of itself moves the tail by that times its logarithm (at most 80) and a factor of about 3.
    x = torch.linspace(lowest, lowest / 4, 1001)
    wide = x.double().numpy()
    value = lambda_activation(x, 1.0, kind).double().numpy()
    np.testing.assert_allclose(value, wide * GATE[kind](wide), rtol=3e-5, atol=0)


EXTREME = [s * m for m in (1e30, 1e20, 1e10, 1e5, 1e3, 60.0, 1e-10, 1e-30, 0.0) for s in (1.0, -1.0)]


@each_kind
@pytest.mark.parametrize("lam", [1.0, 80.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_have_finite_values_and_gradients(kind: Kind, lam: float, dtype: torch.dtype) -> None:
    for result in gradients(torch.tensor(EXTREME, dtype=dtype), lam, kind):
        assert result.isfinite().all()


@each_kind
def test_far_out_it_is_relu(kind: Kind) -> None:
    x = torch.tensor([1e30, 1e5, -1e5, -1e30])
    value, by_x, by_lam = gradients(x, 1e4, kind)
    assert value.tolist() == F.relu(x).tolist()
    assert by_x.tolist() == [1, 1, 0, 0]
    assert by_lam.tolist() == [0, 0, 0, 0]


@each_kind
def test_a_large_incoming_gradient_does_not_meet_an_overflow(kind: Kind) -> None:
    # x·grad overflows to inf, the gate's derivative is 0: their product would be NaN.
    x, lam = torch.tensor([-1e30], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    value = lambda_activation(x, lam, kind)
    by_x, by_lam = torch.autograd.grad(value, (x, lam), torch.tensor([1e20]))
    assert (by_x.item(), by_lam.item()) == (0, 0)


@each_kind
def test_second_derivatives_are_finite_far_out(kind: Kind) -> None:
    x = torch.tensor(EXTREME, requires_grad=True)
    (first,) = torch.autograd.grad(lambda_activation(x, 80.0, kind).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all()


@each_kind
def test_lambda_one_is_the_plain_activation(kind: Kind) -> None:
    x = torch.linspace(-20, 20, 4001)
    torch.testing.assert_close(lambda_activation(x, 1.0, kind), PLAIN[kind](x), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_gradients_of_both_orders_by_differences(kind: Kind) -> None:
    x = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, lam: Tensor) -> Tensor:
        return lambda_activation(x, lam, kind)

    assert torch.autograd.gradcheck(f, (x, lam))
    assert torch.autograd.gradgradcheck(f, (x, lam))


def test_hardswish_gradient_by_differences() -> None:
    # No point near u = ±3; first order, as the second is piecewise constant.
    x = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, lam: lambda_activation(x, lam, "hardswish"), (x, lam))


@each_kind
def test_gradient_reaches_the_parameter(kind: Kind) -> None:
    module = LambdaActivation(kind, initial=1.3).double()
    x = torch.tensor([-1.2, 0.3, 0.9], dtype=torch.float64)

    def f(s: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, {"s": s}, (x,))
        return output

    assert torch.autograd.gradcheck(f, (module.s,))


# Largest u·(1 − g(u)), which is λ·max|f − ReLU|: about 0.17 for the normal gate (at u = 0.75), 0.2785 for
# the logistic one (Lambert's W(1/e)), and 3·3/(4·6) = 0.375 for the ramp (at u = 1.5).
GREATEST: dict[Kind, float] = {"gelu": 0.17, "gelu_tanh": 0.171, "silu": 0.2785, "hardswish": 0.375}


@given(kind=st.sampled_from(KINDS), lam=st.floats(1, 1e4), x=st.floats(-1e6, 1e6, width=32))
def test_distance_to_relu_is_bounded(kind: Kind, lam: float, x: float) -> None:
    value = lambda_activation(torch.tensor(x), lam, kind).item()
    # Rounding of float32, relative to x, comes on top.
    assert abs(value - max(x, 0)) <= GREATEST[kind] / lam * 1.001 + 1e-6 * abs(x)


@given(kind=st.sampled_from(KINDS), lam=st.floats(1, 1e4), x=st.floats(-1e6, 1e6, width=32))
def test_value_lies_below_relu(kind: Kind, lam: float, x: float) -> None:
    value = lambda_activation(torch.tensor(x), lam, kind).item()
    assert value <= max(x, 0.0)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    x, lam = torch.linspace(-8, 8, 1001).to(dtype), torch.tensor(3.3)
    narrow = lambda_activation(x, lam, kind)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, lambda_activation(x.float(), lam, kind).to(dtype))


def test_narrow_inputs_give_lambda_a_float32_gradient() -> None:
    x, lam = torch.full((4096,), 0.01, dtype=torch.bfloat16), torch.tensor(1.0, requires_grad=True)
    lambda_activation(x, lam, "silu").sum().backward()
    # Each adds x²·σ'(x), about 0.01²/4 (0.01 being 0.010009765625 in bfloat16); in bfloat16 a sum of
    # equal parts stalls at 256 of them.
    assert lam.grad is not None
    assert lam.grad.item() == pytest.approx(4096 * 0.010009765625**2 / 4, rel=1e-3)


@each_kind
def test_under_vmap_it_is_the_same(kind: Kind) -> None:
    x, lams = torch.linspace(-4, 4, 41), torch.tensor([1.0, 5.0])
    found = torch.vmap(lambda lam: lambda_activation(x, lam, kind))(lams)
    assert torch.equal(found, torch.stack([lambda_activation(x, lam, kind) for lam in lams]))


def test_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'gelu_tan' is no kind .* did you mean 'gelu_tanh'\?"):
        lambda_activation(torch.zeros(1), 1.0, "gelu_tan")  # type: ignore[arg-type]


# Target


@pytest.mark.parametrize(
    ("kind", "expected"),
    # 0.7978845608/0.01; 2·0.6931471806/0.01; 1.5/0.01
    [("gelu", 79.78845608), ("gelu_tanh", 79.77808956), ("silu", 138.6294361), ("hardswish", 150.0)],
)
def test_target_is_the_area_over_the_tolerance(kind: Kind, expected: float) -> None:
    assert target_lambda(kind, 0.01) == pytest.approx(expected, rel=1e-9)


@each_kind
def test_at_the_target_the_gates_distance_from_a_step_is_the_tolerance(kind: Kind) -> None:
    lam = target_lambda(kind, 0.05)
    left, _ = quad(lambda x: float(GATE[kind](np.float64(lam * x))), -2, 0)
    right, _ = quad(lambda x: 1 - float(GATE[kind](np.float64(lam * x))), 0, 2)
    assert left + right == pytest.approx(0.05, rel=1e-7)


@pytest.mark.parametrize("tolerance", [0.0, -0.01, math.nan, math.inf])
def test_impossible_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match=r"tolerance of a hardened gate .* must be above 0"):
        target_lambda("gelu", tolerance)


# Module


def test_lambda_of_a_parameter_by_hand() -> None:
    module = LambdaActivation("gelu", temperature=0.5)
    with torch.no_grad():
        module.s.fill_(0.5)
    # 1 + log(1 + e^(0.5/0.5)) = 1 + log(3.718281828)
    assert module.lam.item() == pytest.approx(2.313261688, rel=1e-6)


@given(value=st.floats(1e-12, 1e4).map(lambda excess: 1 + excess), temperature=st.floats(0.01, 10))
def test_set_lambda_inverts_the_parameterisation(value: float, temperature: float) -> None:
    module = LambdaActivation("gelu", temperature=temperature).double()
    module.set_lambda(value)
    assert module.lam.item() - 1 == pytest.approx(value - 1, rel=1e-9, abs=3e-16)


@pytest.mark.parametrize("value", [1.0001, 1.01, 3.0, 79.788, 1e4])
def test_set_lambda_is_right_in_float32(value: float) -> None:
    module = LambdaActivation("silu")
    module.set_lambda(value)
    assert module.lam.item() == pytest.approx(value, rel=3e-7)


@pytest.mark.parametrize("value", [1.0, 0.5, -2.0, math.nan, math.inf, 1e300])
def test_lambda_out_of_range_is_refused(value: float) -> None:
    module = LambdaActivation("gelu")
    with pytest.raises(ConfigError, match="must be above 1 and finite"):
        module.set_lambda(value)


def test_refused_lambda_leaves_the_old_one() -> None:
    module = LambdaActivation("gelu", initial=4.0)
    with pytest.raises(ConfigError):
        module.set_lambda(1.0)
    assert module.lam.item() == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.inf, math.nan])
def test_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature of a λ-activation"):
        LambdaActivation("gelu", temperature=temperature)


def test_module_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'swish' is no kind"):
        LambdaActivation("swish")  # type: ignore[arg-type]


def test_module_has_one_scalar_parameter() -> None:
    assert {name: p.shape for name, p in LambdaActivation("gelu").named_parameters()} == {"s": ()}


@each_kind
def test_module_computes_at_its_lambda(kind: Kind) -> None:
    module, x = LambdaActivation(kind, initial=2.5), torch.linspace(-3, 3, 61)
    torch.testing.assert_close(module(x), lambda_activation(x, 2.5, kind))


def test_module_of_half_precision_computes_lambda_in_float32() -> None:
    assert LambdaActivation("gelu").bfloat16().lam.dtype == torch.float32


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_kind_and_lambda(how: str) -> None:
    assert repr(COPIES[how](LambdaActivation("silu", 7.0))) == "LambdaActivation(silu, lambda=7)"

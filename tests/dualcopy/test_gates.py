"""Piecewise-linear gates: numbers by hand, breakpoints, in-place calls, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import gates
from fedsq_plugin.dualcopy.gates import Pieces

from .nets import Shifted

Function = Callable[[Tensor], Any]
INF, NAN = float("inf"), float("nan")


def shifted(f: Function, shift: float) -> DualCopy:
    """f(x) decides, f(x + shift) is scaled."""
    dual = DualCopy(Shifted(f))
    with torch.no_grad():
        dual.quantitative.get_parameter("shift").fill_(shift)
    return dual


def tiny(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype)


# x is what the structural copy sees, z = x + 10 or x - 10 what the quantitative copy sees.
BY_HAND: dict[str, tuple[nn.Module, list[float], list[float], list[float], float]] = {
    # regions 0 0 1; z = 8 10 13; h = r·z. The derivative by the shift is the sum of a(r) = 0 + 0 + 1.
    "relu": (nn.ReLU(), [-2, 0, 3], [0, 0, 13], [0, 0, -7], 1.0),
    # slopes .5 .5 1
    "leaky_relu": (nn.LeakyReLU(0.5), [-2, 0, 3], [4, 5, 13], [-6, -5, -7], 2.0),
    # slopes .25 .25 1
    "prelu": (nn.PReLU(init=0.25), [-2, 0, 3], [2, 2.5, 13], [-3, -2.5, -7], 1.5),
    # the slope is the mean of the bounds: .3 .3 1
    "rrelu": (nn.RReLU(0.2, 0.4), [-2, 0, 3], [2.4, 3, 13], [-3.6, -3, -7], 1.6),
    # low low linear high high; the saturated ones are the bounds 0 and 6, whatever z is
    "relu6": (nn.ReLU6(), [-1, 0, 2, 6, 9], [0, 0, 12, 6, 6], [0, 0, -8, 6, 6], 1.0),
    # likewise with the bounds -1 and 2
    "hardtanh": (nn.Hardtanh(-1, 2), [-3, -1, 0.5, 2, 5], [-1, -1, 10.5, 2, 2], [-1, -1, -9.5, 2, 2], 1.0),
    # up to 1: the constant 20; above: z
    "threshold": (nn.Threshold(1, 20), [0, 1, 1.5], [20, 20, 11.5], [20, 20, -8.5], 1.0),
}
each_activation = pytest.mark.parametrize("name", BY_HAND)


@each_activation
def test_positive_shift_by_hand(name: str) -> None:
    f, x, expected, _, _ = BY_HAND[name]
    assert_close(shifted(f, 10.0)(tiny(x)), tiny(expected))


@each_activation
def test_negative_shift_by_hand(name: str) -> None:
    f, x, _, expected, _ = BY_HAND[name]
    assert_close(shifted(f, -10.0)(tiny(x)), tiny(expected))


@each_activation
def test_gradient_by_hand(name: str) -> None:
    f, x, _, _, expected = BY_HAND[name]
    dual = shifted(f, 10.0)
    dual(tiny(x)).sum().backward()
    assert_close(dual.get_parameter("shift").grad, torch.tensor(expected))


def test_prelu_weight_gradient_by_hand() -> None:
    dual = shifted(nn.PReLU(init=0.25), 10.0)
    dual(tiny([-2, 0, 3])).sum().backward()
    # The sum of the z whose region is the closed one: 8 + 10.
    assert_close(dual.get_parameter("f.weight").grad, torch.tensor([18.0]))


def test_prelu_per_channel_by_hand() -> None:
    prelu = nn.PReLU(2)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.5, 0.25]))
    dual = shifted(prelu, 10.0)
    x = torch.tensor([[[-2.0, 3.0], [-6.0, -4.0]]])  # (1, 2 channels, 2)
    out = dual(x)
    # z: 8 13 | 4 6, slopes .5 and .25
    assert_close(out, torch.tensor([[[4.0, 13.0], [1.0, 1.5]]]))
    out.sum().backward()
    # channel 0: 8; channel 1: 4 + 6
    assert_close(prelu.weight.grad, torch.tensor([8.0, 10.0]))


def test_prelu_slope_is_the_quantitative_copys() -> None:
    dual = shifted(nn.PReLU(init=0.25), 0.0)
    with torch.no_grad():
        dual.get_parameter("f.weight").fill_(3.0)
    assert_close(dual(tiny([-2, 3])), tiny([-6, 3]))


@each_activation
@pytest.mark.parametrize("values", ["x", "random"])
def test_equal_copies_give_the_plain_activation(name: str, values: str) -> None:
    f, x = BY_HAND[name][0].eval(), tiny(BY_HAND[name][1])
    x = x if values == "x" else torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(DualCopy(nn.Sequential(f)).eval()(x), f(x))


@each_activation
def test_gradient_on_breakpoints_is_torchs(name: str) -> None:
    f = BY_HAND[name][0].eval()
    x = tiny(BY_HAND[name][1]).requires_grad_()
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    (grad,) = torch.autograd.grad(DualCopy(nn.Sequential(f)).eval()(x).sum(), x)
    assert torch.equal(grad, expected)


@each_activation
def test_not_a_number_and_infinity_pass_as_in_the_plain_activation(name: str) -> None:
    f, x = BY_HAND[name][0].eval(), tiny([NAN, INF, -INF, 1.0])
    assert_close(DualCopy(nn.Sequential(f)).eval()(x), f(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "threshold"])
def test_gradient_at_not_a_number_is_torchs(name: str) -> None:
    f, x = BY_HAND[name][0].eval(), tiny([NAN, 1.5]).requires_grad_()
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    (grad,) = torch.autograd.grad(DualCopy(nn.Sequential(f)).eval()(x).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("f", [nn.Hardtanh(0.0, INF), nn.Hardtanh(-INF, 0.5), nn.Threshold(0.1, -INF)], ids=str)
def test_infinite_bounds(f: nn.Module) -> None:
    x = tiny([-2.0, 0.0, 0.3, 4.0])
    assert torch.equal(DualCopy(nn.Sequential(f))(x), f(x))


def test_infinite_preactivation_behind_a_closed_gate_is_zero() -> None:
    assert torch.equal(shifted(F.relu, INF)(tiny([-1.0])), tiny([0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_activation
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    f = BY_HAND[name][0].eval().to(dtype)
    x = (torch.randn(2, 60, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    try:
        out = DualCopy(nn.Sequential(f)).eval()(x)
        assert out.dtype == dtype
        assert torch.equal(out, f(x))
    finally:
        f.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_activation
def test_autocast(name: str, dtype: torch.dtype) -> None:
    f, x = BY_HAND[name][0].eval(), torch.randn(2, 60, generator=torch.Generator().manual_seed(0)) * 3
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = DualCopy(nn.Sequential(f)).eval()(x.to(dtype)), f(x.to(dtype))
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@each_activation
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,), (2, 3), (2, 3, 4, 5, 2)], ids=str)
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    f = BY_HAND[name][0].eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(DualCopy(nn.Sequential(f)).eval()(x), f(x))


def test_integers() -> None:
    x = torch.arange(-3, 4)
    assert torch.equal(DualCopy(nn.Sequential(nn.ReLU()))(x), F.relu(x))


@pytest.mark.parametrize("name", sorted(BY_HAND.keys() - {"rrelu"}))  # torch's rrelu drops them
def test_strides_are_the_plain_activations(name: str) -> None:
    f = BY_HAND[name][0].eval()
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert DualCopy(nn.Sequential(f)).eval()(x).stride() == f(x).stride()


RELU_SPELLINGS: dict[str, Function] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu keyword": lambda x: F.relu(input=x, inplace=False),
    "F.relu inplace": lambda x: F.relu(x, True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": torch.relu,
    "torch.relu keyword": lambda x: torch.relu(input=x),
    "torch.relu_": lambda x: torch.relu_(x),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
}


@pytest.mark.parametrize("spelling", RELU_SPELLINGS)
def test_every_spelling_of_relu(spelling: str) -> None:
    out = shifted(RELU_SPELLINGS[spelling], -10.0)(tiny([-2, 0, 3]))
    assert_close(out, tiny([0, 0, -7]))


# Name -> the function spelled otherwise; regions of x = -2, 0.5, 9 and z = 8, 10.5, 19 in comments.
SPELLINGS: dict[str, tuple[Function, list[float]]] = {
    "F.relu6": (lambda x: F.relu6(input=x), [0, 10.5, 6]),
    "F.relu6 inplace": (lambda x: F.relu6(x, inplace=True), [0, 10.5, 6]),
    "F.hardtanh defaults": (F.hardtanh, [-1, 10.5, 1]),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, min_val=-3.0, max_val=4.0), [8, 10.5, 4]),
    "F.leaky_relu default": (F.leaky_relu, [0.08, 10.5, 19]),
    "F.leaky_relu keyword": (lambda x: F.leaky_relu(x, negative_slope=0.5), [4, 10.5, 19]),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, 0.5), [4, 10.5, 19]),
    "F.prelu": (lambda x: F.prelu(x, torch.tensor([0.5])), [4, 10.5, 19]),
    "x.prelu": (lambda x: x.prelu(torch.tensor([0.5])), [4, 10.5, 19]),
    "torch.prelu": (lambda x: torch.prelu(x, weight=torch.tensor([0.5])), [4, 10.5, 19]),
    "F.rrelu training": (lambda x: F.rrelu(x, 0.2, 0.4, training=True), [2.4, 10.5, 19]),
    "F.rrelu_": (lambda x: F.rrelu_(x, 0.2, 0.4), [2.4, 10.5, 19]),
    "torch.rrelu": (lambda x: torch.rrelu(x, 0.2, 0.4, True), [2.4, 10.5, 19]),
    "F.threshold": (lambda x: F.threshold(x, threshold=1, value=7), [7, 7, 19]),
    "F.threshold_": (lambda x: F.threshold_(x, 1, 7), [7, 7, 19]),
    "torch.threshold": (lambda x: torch.threshold(x, 1, 7), [7, 7, 19]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_other_spelling(spelling: str) -> None:
    f, expected = SPELLINGS[spelling]
    assert_close(shifted(f, 10.0)(tiny([-2, 0.5, 9])), tiny(expected))


IN_PLACE: dict[str, tuple[Function, list[float]]] = {
    "relu": (lambda x: F.relu(x, inplace=True), [0, 13]),
    "relu_": (lambda x: x.relu_(), [0, 13]),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.5, inplace=True), [4, 13]),
    "relu6": (lambda x: F.relu6(x, inplace=True), [0, 13]),
    "hardtanh": (lambda x: F.hardtanh(x, -1, 2, inplace=True), [-1, 2]),
    "rrelu": (lambda x: F.rrelu(x, 0.2, 0.4, inplace=True), [2.4, 13]),
    "threshold": (lambda x: F.threshold(x, 1, 7, inplace=True), [7, 13]),
}
each_in_place = pytest.mark.parametrize("name", IN_PLACE)


@each_in_place
def test_in_place_changes_other_references(name: str) -> None:
    f, expected = IN_PLACE[name]

    def through_a_reference(z: Tensor) -> Tensor:
        f(z)
        return z

    assert_close(shifted(through_a_reference, 10.0)(tiny([-2, 3])), tiny(expected))


@each_in_place
def test_in_place_returns_its_argument(name: str) -> None:
    f, _ = IN_PLACE[name]
    same: list[bool] = []

    def returned(z: Tensor) -> Tensor:
        out: Tensor = f(z)
        same.append(out is z)
        return out

    shifted(returned, 10.0)(tiny([-2, 3]))
    assert all(same)


@each_in_place
def test_in_place_on_a_view_changes_the_base(name: str) -> None:
    f, expected = IN_PLACE[name]

    def on_a_view(z: Tensor) -> Tensor:
        f(z[:, :2])
        return z

    assert_close(shifted(on_a_view, 10.0)(tiny([-2, 3, -5])), tiny([*expected, 5]))


@each_in_place
def test_in_place_gradient(name: str) -> None:
    f, _ = IN_PLACE[name]
    dual = shifted(f, 10.0)
    x = tiny([-2, 3]).requires_grad_()
    dual(x).sum().backward()
    # x = -2 and 3: closed and open, but both saturated for hardtanh(-1, 2)
    slopes = {"leaky_relu": [0.5, 1], "rrelu": [0.3, 1], "hardtanh": [0, 0]}.get(name, [0, 1])
    assert_close(x.grad, tiny(slopes))


def test_in_place_on_a_leaf_that_needs_a_gradient_is_refused_as_in_torch() -> None:
    dual = DualCopy(nn.Sequential(nn.ReLU(inplace=True)))
    with pytest.raises(RuntimeError, match="leaf"):
        dual(tiny([-2, 3]).requires_grad_())


def random_z(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


PIECES: dict[str, dict[str, Any]] = {
    "relu": {},
    "leaky_relu": {"slope": 0.3},
    "hardtanh": {"lower": -0.5, "low": -0.5, "upper": 0.4, "high": 0.4},
    "threshold": {"lower": 0.1, "low": 2.0},
}


@pytest.mark.parametrize("name", PIECES)
def test_gradcheck(name: str) -> None:
    region = gates.find_regions(Pieces(random_z(3, 4), **PIECES[name]))
    z = random_z(3, 4, seed=1).requires_grad_()
    assert gradcheck(lambda z: gates.apply(Pieces(z, **PIECES[name]), region), z)


@pytest.mark.parametrize("name", PIECES)
def test_gradgradcheck(name: str) -> None:
    region = gates.find_regions(Pieces(random_z(3, 4), **PIECES[name]))
    z = random_z(3, 4, seed=1).requires_grad_()
    assert gradgradcheck(lambda z: gates.apply(Pieces(z, **PIECES[name]), region) ** 2, z)


PRELU_SHAPES = [((4, 3), 3), ((2, 3, 4), 3), ((2, 3, 2, 2), 1), ((2, 3, 2, 2, 2), 3), ((5,), 1)]
each_prelu = pytest.mark.parametrize(("shape", "weights"), PRELU_SHAPES, ids=str)


@each_prelu
def test_prelu_gradcheck(shape: tuple[int, ...], weights: int) -> None:
    region = gates.find_regions(Pieces(random_z(*shape)))
    z = random_z(*shape, seed=1).requires_grad_()
    weight = random_z(weights, seed=2).requires_grad_()
    assert gradcheck(lambda z, w: gates.apply(Pieces(z, slope=w), region), (z, weight))


@each_prelu
def test_prelu_gradgradcheck(shape: tuple[int, ...], weights: int) -> None:
    region = gates.find_regions(Pieces(random_z(*shape)))
    z = random_z(*shape, seed=1).requires_grad_()
    weight = random_z(weights, seed=2).requires_grad_()
    assert gradgradcheck(lambda z, w: gates.apply(Pieces(z, slope=w), region), (z, weight))


@each_prelu
def test_prelu_weight_gradient_is_the_naive_formulas(shape: tuple[int, ...], weights: int) -> None:
    decides, z = random_z(*shape), random_z(*shape, seed=1)
    weight = random_z(weights, seed=2).requires_grad_()
    out = gates.apply(Pieces(z, slope=weight), gates.find_regions(Pieces(decides)))
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    broadcast = weight.reshape(1, -1, *[1] * (len(shape) - 2)) if weights > 1 else weight
    naive = torch.where(decides > 0, z, broadcast * z)
    (expected,) = torch.autograd.grad(naive.square().sum(), weight)
    assert_close(grad, expected)


def saved(f: Callable[[], Tensor]) -> list[tuple[torch.dtype, int]]:
    """dtype and number of elements of everything that autograd keeps for a backward pass."""
    kept: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        f()
    return kept


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_autograd_keeps_one_byte_per_activation(name: str, inplace: bool) -> None:
    pieces = Pieces(torch.randn(5, 7), **PIECES[name])
    region = gates.find_regions(pieces)
    z = torch.randn(5, 7, requires_grad=True) + 0
    kept = saved(lambda: gates.apply(Pieces(z, inplace, **PIECES[name]), region))
    assert kept == [(torch.uint8, 35)]


def test_autograd_keeps_the_preactivation_for_prelu_only_once() -> None:
    z, weight = torch.randn(5, 7, requires_grad=True), torch.full((1,), 0.2, requires_grad=True)
    kept = saved(lambda: gates.apply(Pieces(z, slope=weight), gates.find_regions(Pieces(z))))
    assert sorted(kept, key=str) == sorted([(torch.float32, 35), (torch.uint8, 35), (torch.float32, 1)], key=str)


def test_a_gated_forward_keeps_no_more_floats_than_the_plain_one() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 2))
    dual, x = DualCopy(net), torch.randn(3, 6)
    floats = [n for dtype, n in saved(lambda: dual(x)) if dtype != torch.uint8]
    plain = [n for _, n in saved(lambda: net(x))]
    assert sum(floats) < sum(plain)


@pytest.mark.parametrize("name", PIECES)
def test_regions_take_one_byte_each(name: str) -> None:
    region = gates.find_regions(Pieces(torch.randn(5, 7), **PIECES[name]))
    assert (region.dtype, tuple(region.shape)) == (torch.uint8, (5, 7))

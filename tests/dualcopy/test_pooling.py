"""Max-pooling under the structural copy's choice: numbers by hand, any geometry, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import pooling
from fedsq_plugin.dualcopy.pooling import Pool, decode, encode, find_windows
from fedsq_plugin.dualcopy.wrapper import Pooling
from fedsq_plugin.errors import GateError

from .nets import Scaled


def negated(f: Callable[[Tensor], Any], pooling: Pooling = "structural") -> DualCopy:
    """f(x) chooses, f(-x) is routed."""
    dual = DualCopy(Scaled(f), pooling=pooling)
    with torch.no_grad():
        dual.quantitative.get_parameter("scale").fill_(-1)
    return dual


def line(*values: float) -> Tensor:
    """One sample, one channel."""
    return torch.tensor([[list(values)]], dtype=torch.float32)


# Module, x, and what is picked from -x: minus the maxima of x.
BY_HAND: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    # windows 1 5 | 2 0
    "plain": (nn.MaxPool1d(2), line(1, 5, 2, 0), line(-5, -2)),
    # windows (outside) 4 1 | 1 2 7
    "padding": (nn.MaxPool1d(3, 2, padding=1), line(4, 1, 2, 7), line(-4, -7)),
    # windows 1 2 | 5 0
    "dilation": (nn.MaxPool1d(2, 1, dilation=2), line(1, 5, 2, 0), line(-2, -5)),
    # windows 3 1 | 4 1 | 5
    "ceil_mode": (nn.MaxPool1d(2, ceil_mode=True), line(3, 1, 4, 1, 5), line(-3, -4, -5)),
    # windows 2 9 | 9 4 | 4 1
    "overlapping": (nn.MaxPool1d(2, 1), line(2, 9, 4, 1), line(-9, -9, -4)),
    # windows 2 9 | 9 4 1 | 1 5, of 2, 3 and 2 entries
    "adaptive": (nn.AdaptiveMaxPool1d(3), line(2, 9, 4, 1, 5), line(-9, -9, -5)),
    # one sample of (1 channel, 2 rows, 4 columns); windows 1 2 4 0 | 0 3 5 1
    "2d": (nn.MaxPool2d(2), torch.tensor([[[[1.0, 2, 0, 3], [4, 0, 5, 1]]]]), torch.tensor([[[[-4.0, -5]]]])),
    # upper rows, left and right columns: 1 9 4 5 | 9 3 5 6; lower rows: 4 5 7 2 | 5 6 2 8
    "2d adaptive": (
        nn.AdaptiveMaxPool2d(2),
        torch.tensor([[[[1.0, 9, 3], [4, 5, 6], [7, 2, 8]]]]),
        torch.tensor([[[[-9.0, -9], [-7, -8]]]]),
    ),
    # all eight entries
    "3d": (nn.MaxPool3d(2), torch.arange(8.0).reshape(1, 1, 2, 2, 2), torch.tensor([[[[[-7.0]]]]])),
    # (1 channel, 4), without a batch
    "unbatched": (nn.MaxPool1d(2), line(1, 5, 2, 0)[0], line(-5, -2)[0]),
}
each_by_hand = pytest.mark.parametrize("name", BY_HAND)


@each_by_hand
def test_routing_by_hand(name: str) -> None:
    f, x, expected = BY_HAND[name]
    assert_close(negated(f)(x), expected)


@each_by_hand
def test_equal_copies_pool_as_torch(name: str) -> None:
    f, x, _ = BY_HAND[name]
    assert torch.equal(DualCopy(nn.Sequential(f))(x), f(x))


def test_gradient_by_hand() -> None:
    f, x, _ = BY_HAND["adaptive"]
    x = x.clone().requires_grad_()
    negated(f)(x).sum().backward()
    # The 9 was picked twice, the 5 once; each through the factor -1.
    assert_close(x.grad, line(0, -2, 0, 0, -1))


def test_own_pooling_leaves_the_choice_to_the_quantitative_copy() -> None:
    net = nn.Sequential(nn.MaxPool1d(2), nn.ReLU())
    # -x = -1 -5 | -2 0, so -1 and 0; of x, 5 and 2 are above 0, so both gates are open.
    assert_close(negated(net, pooling="own")(line(1, 5, 2, 0)), line(-1, 0))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_own_pooling_is_torchs(dims: int, adaptive: bool) -> None:
    pool = getattr(nn, f"{'Adaptive' * adaptive}MaxPool{dims}d")(2)
    net, x = nn.Sequential(nn.ReLU(), pool), torch.randn(2, 1, *[6] * dims)
    assert torch.equal(DualCopy(net, pooling="own")(x), net(x))


def test_own_pooling_leaves_no_pooling_gate() -> None:
    net = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2))
    assert len(DualCopy(net, pooling="own").gates(torch.randn(1, 1, 4))) == 1


def test_returned_indices_are_the_structural_copys() -> None:
    _, index = negated(nn.MaxPool1d(2, return_indices=True))(line(1, 5, 2, 0))
    assert index.tolist() == [[[1, 2]]]


def test_returned_indices_are_int64() -> None:
    _, index = negated(nn.AdaptiveMaxPool1d(2, return_indices=True))(line(1, 5, 2, 0))
    assert index.dtype == torch.int64


def test_unpooling_puts_values_where_the_structural_copy_took_them() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        return F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)

    assert_close(negated(there_and_back)(line(1, 5, 2, 0)), line(0, -5, -2, 0))


# Each gives maxima of (1, 1, 4, 4), (1, 1, 4) or (1, 1, 4, 4, 4) input that are negated when routed.
SPELLINGS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "F keyword": (2, lambda x: F.max_pool2d(input=x, kernel_size=2)),
    "F every option": (2, lambda x: F.max_pool2d(x, (3, 2), [2, 1], (1, 1), (1, 1), ceil_mode=True)),
    "F one-element lists": (2, lambda x: F.max_pool2d(x, [2], [1], [1], [1])),
    "F indices": (2, lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "F with_indices": (2, lambda x: F.max_pool2d_with_indices(x, 2)[0]),
    "F adaptive None": (2, lambda x: F.adaptive_max_pool2d(x, (None, 3))),
    "F adaptive indices": (2, lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[0]),
    "F adaptive_with_indices": (2, lambda x: F.adaptive_max_pool2d_with_indices(x, 3)[0]),
    "torch 2d": (2, lambda x: torch.max_pool2d(x, 2)),
    "torch 2d empty stride": (2, lambda x: torch.max_pool2d(x, kernel_size=[2, 2], stride=[])),
    "torch 1d": (1, lambda x: torch.max_pool1d(x, 2, 1)),
    "torch 1d with_indices": (1, lambda x: torch.max_pool1d_with_indices(x, 2)[0]),
    "torch 1d adaptive": (1, lambda x: torch.adaptive_max_pool1d(x, 3)[0]),
    "torch 3d": (3, lambda x: torch.max_pool3d(x, 2)),
    "F 3d adaptive": (3, lambda x: F.adaptive_max_pool3d(x, (1, 2, 3))),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    dims, f = SPELLINGS[spelling]
    x = torch.randn(1, 1, *[4] * dims, generator=torch.Generator().manual_seed(0))
    assert torch.equal(negated(f)(x), -f(x))


class Geometry:
    """A random pooling call and an input for it."""

    def __init__(self, x: Tensor, dims: int, options: dict[str, Any], adaptive: bool) -> None:
        self.x, self.dims, self.options, self.adaptive = x, dims, options, adaptive

    def __repr__(self) -> str:
        return f"Geometry(shape={tuple(self.x.shape)}, adaptive={self.adaptive}, {self.options})"

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        name = f"{'adaptive_' * self.adaptive}max_pool{self.dims}d"
        pooled: tuple[Tensor, Tensor] = getattr(F, name)(x, **self.options, return_indices=True)
        return pooled

    def pool(self, x: Tensor) -> Pool:
        return Pool(x, self.dims, self.options, self.adaptive, return_indices=False)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    dims = draw(st.integers(1, 3))
    adaptive = draw(st.booleans())

    def each(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(strategy) for _ in range(dims))

    sizes = each(st.integers(1, 9 if dims < 3 else 5))
    options: dict[str, Any]
    if adaptive:
        options = {"output_size": each(st.integers(1, 6))}
    else:
        kernel, dilation = each(st.integers(1, 4)), each(st.integers(1, 3))
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        stride = draw(st.none() | st.tuples(*[st.integers(1, 3)] * dims))
        assume(all(d * (k - 1) + 1 <= n + 2 * p for n, k, d, p in zip(sizes, kernel, dilation, padding, strict=True)))
        options = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": draw(st.booleans()),
        }
    leading = draw(st.sampled_from([(2, 2), (1, 1), (3,), (0, 2)]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        x = torch.randint(0, 3, (*leading, *sizes), generator=random).double()  # many ties
    else:
        x = torch.randn((*leading, *sizes), generator=random, dtype=torch.float64)
    return Geometry(x, dims, options, adaptive)


any_geometry = settings(max_examples=150, derandomize=True)


@any_geometry
@given(geometries())
def test_encode_and_decode_are_inverse(geometry: Geometry) -> None:
    _, index = geometry.plain(geometry.x)
    at = find_windows(geometry.pool(geometry.x), index.shape[-geometry.dims :])
    assert torch.equal(decode(encode(index, at), at), index)


@any_geometry
@given(geometries())
def test_choosing_gives_torchs_values(geometry: Geometry) -> None:
    values, _ = pooling.choose(geometry.pool(geometry.x))
    assert torch.equal(values, geometry.plain(geometry.x)[0])


@any_geometry
@given(geometries())
def test_routing_picks_what_torchs_indices_pick(geometry: Geometry) -> None:
    _, code = pooling.choose(geometry.pool(geometry.x))
    other = torch.rand_like(geometry.x)
    _, index = geometry.plain(geometry.x)
    expected = other.flatten(-geometry.dims).gather(-1, index.flatten(-geometry.dims))
    assert torch.equal(pooling.route(geometry.pool(other), code), expected.view(index.shape))


@any_geometry
@given(geometries())
def test_gradient_of_routing_is_torchs(geometry: Geometry) -> None:
    x = geometry.x.requires_grad_()
    _, code = pooling.choose(geometry.pool(x.detach()))
    values, _ = geometry.plain(x)
    upstream = torch.rand_like(values)
    (grad,) = torch.autograd.grad(pooling.route(geometry.pool(x), code), x, upstream)
    (expected,) = torch.autograd.grad(values, x, upstream)
    assert_close(grad, expected)


@pytest.mark.parametrize(("kernel", "dtype"), [(16, torch.uint8), (17, torch.int16), (182, torch.int32)])
def test_a_code_takes_as_few_bytes_as_the_window_allows(kernel: int, dtype: torch.dtype) -> None:
    options = {"kernel_size": kernel, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    _, code = pooling.choose(Pool(torch.zeros(1, 1, kernel, kernel), 2, options, False, False))
    assert code.dtype == dtype


@pytest.mark.parametrize("kernel", [16, 17, 182])
def test_the_last_entry_of_a_large_window_can_be_chosen(kernel: int) -> None:
    x = torch.zeros(1, 1, kernel, kernel)
    x[..., -1, -1] = 1
    assert negated(nn.MaxPool2d(kernel))(x).item() == -1


def test_ties_go_to_the_entry_that_torch_takes() -> None:
    x = torch.zeros(1, 1, 4, 4)
    dual = negated(nn.MaxPool2d(2, return_indices=True))
    assert torch.equal(dual(x)[1], F.max_pool2d(x, 2, return_indices=True)[1])


def test_windows_of_minus_infinity() -> None:
    x = torch.full((1, 1, 4, 4), float("-inf"))
    net = nn.Sequential(nn.MaxPool2d(3, 2, padding=1))
    assert torch.equal(DualCopy(net)(x), net(x))


def test_not_a_number_is_passed_on() -> None:
    net, x = nn.Sequential(nn.MaxPool1d(2)), line(1, float("nan"), 2, 0)
    assert_close(DualCopy(net)(x), net(x), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "2d adaptive", "3d"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    f, x, expected = BY_HAND[name]
    assert torch.equal(negated(f).to(dtype)(x.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("name", ["2d", "2d adaptive"])
def test_channels_last_input(name: str) -> None:
    f = BY_HAND[name][0]
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert torch.equal(negated(f)(x), -f(x))


@pytest.mark.parametrize("adaptive", [False, True])
def test_input_that_is_not_contiguous(adaptive: bool) -> None:
    f = nn.AdaptiveMaxPool2d(2) if adaptive else nn.MaxPool2d(2)
    x = torch.randn(2, 6, 3, 12).transpose(1, 2)[..., ::2]
    assert torch.equal(negated(f)(x), -f(x))


@pytest.mark.parametrize("adaptive", [False, True])
def test_autograd_keeps_one_byte_per_output(adaptive: bool) -> None:
    options: dict[str, Any] = {"output_size": 2}
    if not adaptive:
        options = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False}
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    _, code = pooling.choose(Pool(x.detach(), 2, options, adaptive, False))
    kept: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooling.route(Pool(x, 2, options, adaptive, False), code)
    assert kept == [(torch.uint8, 2 * 3 * 2 * 2)]


def routed(z: Tensor) -> Tensor:
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}
    chosen_from = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    _, code = pooling.choose(Pool(chosen_from, 2, options, False, False))
    out: Tensor = pooling.route(Pool(z, 2, options, False, False), code)
    return out


def test_gradcheck() -> None:
    assert gradcheck(routed, torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True))


def test_gradgradcheck() -> None:
    z = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda z: routed(z) ** 2, z)


def test_windows_first_used_in_inference_mode_serve_training() -> None:
    pooling._windows.cache_clear()
    dual, x = negated(nn.MaxPool1d(2)), line(1, 5, 2, 0)
    with torch.inference_mode():
        dual(x)
    dual(x).sum().backward()
    assert_close(dual.get_parameter("scale").grad, torch.tensor(7.0))


@pytest.mark.parametrize("size", [4, 9, 12])
def test_gates_of_another_input_size_are_refused(size: int) -> None:
    dual = DualCopy(nn.Sequential(nn.MaxPool2d(2)))
    gates = dual.gates(torch.randn(1, 1, 8, 8))
    with pytest.raises(GateError, match="8x8"):
        dual.gated(gates, torch.randn(1, 1, size, size))


def test_pooled_values_may_be_written_into() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2))
    x, outputs = torch.randn(3, 1, 8, 8), []
    for model in (net, DualCopy(net)):
        net.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        outputs.append(net[0].weight.grad.clone())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])

"""The streaming weighted mean, against numbers worked out by hand."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.mean import MeanOfDifferences, WeightedMean


def mean_of(*weighted: tuple[Tensor, float]) -> Tensor:
    mean = WeightedMean()
    for value, weight in weighted:
        mean.add({"x": value}, weight)
    return mean.result()["x"]


def test_mean_is_weighted_by_samples() -> None:
    # (1·[1, 10] + 3·[5, -2]) / 4 = [16, 4] / 4
    value = mean_of((torch.tensor([1.0, 10.0]), 1), (torch.tensor([5.0, -2.0]), 3))
    assert value.tolist() == [4.0, 1.0]


def test_mean_of_three_with_a_fractional_weight() -> None:
    # (0.5·8 + 1·2 + 2.5·4) / 4 = (4 + 2 + 10) / 4
    value = mean_of((torch.tensor(8.0), 0.5), (torch.tensor(2.0), 1), (torch.tensor(4.0), 2.5))
    assert value.item() == 4.0


def test_keys_keep_their_order() -> None:
    mean = WeightedMean()
    mean.add(OrderedDict(b=torch.zeros(1), a=torch.zeros(1)), 1)
    mean.add(OrderedDict(a=torch.zeros(1), b=torch.zeros(1)), 1)
    assert list(mean.result()) == ["b", "a"]


def test_every_key_is_averaged_by_its_name_and_not_its_position() -> None:
    mean = WeightedMean()
    mean.add(OrderedDict(b=torch.tensor(1.0), a=torch.tensor(10.0)), 1)
    mean.add(OrderedDict(a=torch.tensor(20.0), b=torch.tensor(3.0)), 1)
    assert {key: value.item() for key, value in mean.result().items()} == {"b": 2.0, "a": 15.0}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (10, 13, 12),  # (10 + 3·13) / 4 = 12.25
        (10, 11, 11),  # (10 + 3·11) / 4 = 10.75
        (-10, -11, -11),  # -10.75
    ],
)
def test_counters_are_rounded_to_integers(first: int, second: int, expected: int) -> None:
    assert mean_of((torch.tensor(first), 1), (torch.tensor(second), 3)).item() == expected


def test_counters_stay_integers() -> None:
    assert mean_of((torch.tensor(1), 1), (torch.tensor(2), 3)).dtype is torch.int64


def test_boolean_entry_is_the_majoritys() -> None:
    # Weights 2 and 1: 2/3 rounds to 1.
    assert mean_of((torch.tensor(True), 2), (torch.tensor(False), 1)).item() is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_entries_keep_their_dtype(dtype: torch.dtype) -> None:
    assert mean_of((torch.ones(1, dtype=dtype), 1), (torch.ones(1, dtype=dtype), 2)).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_on_the_way(dtype: torch.dtype) -> None:
    # The weighted sum, 1e5 times the largest number, is beyond the dtype; the mean is not.
    largest = torch.full((1,), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(mean_of((largest, 1e5), (largest, 1e5)), largest)


def test_complex_entries_keep_their_imaginary_part() -> None:
    # (1·(1+2j) + 3·(5-2j)) / 4 = (16 - 4j) / 4
    value = mean_of((torch.tensor([1 + 2j]), 1), (torch.tensor([5 - 2j]), 3))
    assert (value.dtype, value.tolist()) == (torch.complex64, [4 - 1j])


def test_sums_are_kept_in_float64() -> None:
    # 64 clients of equal weight: one has 2^24, 32 have 1, 31 have 0. The mean is
    # (2^24 + 32) / 64 = 262144.5. In float32 2^24 + 1 = 2^24, so that a float32 sum gives 262144.
    values = [torch.tensor(2.0**24)] + [torch.tensor(1.0)] * 32 + [torch.tensor(0.0)] * 31
    naive = torch.tensor(0.0)
    for value in values:
        naive = naive + value
    assert ((naive / 64).item(), mean_of(*((value, 1) for value in values)).item()) == (262144.0, 262144.5)


def test_float64_entries_are_not_shared_with_the_state() -> None:
    value = torch.ones(1, dtype=torch.float64)
    mean = WeightedMean()
    mean.add({"x": value}, 1)
    value.fill_(9)
    assert mean.result()["x"].item() == 1.0


def test_parameters_that_require_grad_give_a_mean_that_does_not() -> None:
    assert not mean_of((torch.ones(1, requires_grad=True), 1)).requires_grad


def test_result_gives_up_the_sums() -> None:
    """They are as large as two float32 models, and the mean is a third."""
    mean = WeightedMean()
    mean.add({"x": torch.tensor(2.0)}, 1)
    mean.result()
    with pytest.raises(UpdateError, match="no update to average"):
        mean.result()


def test_weight_is_the_sum_of_the_weights() -> None:
    mean = WeightedMean()
    mean.add({"x": torch.zeros(1)}, 2)
    mean.add({"x": torch.zeros(1)}, 0.5)
    assert mean.weight == 2.5


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weight_must_be_above_zero_and_finite(weight: float) -> None:
    with pytest.raises(UpdateError, match="weight of a state in a mean is"):
        WeightedMean().add({"x": torch.zeros(1)}, weight)


def test_refused_weight_leaves_the_mean_as_it_was() -> None:
    mean = WeightedMean()
    mean.add({"x": torch.tensor(2.0)}, 1)
    with pytest.raises(UpdateError):
        mean.add({"x": torch.tensor(100.0)}, 0)
    assert (mean.result()["x"].item(), mean.weight) == (2.0, 1)


def test_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(UpdateError, match="no update to average"):
        WeightedMean().result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_states_are_not_kept(dtype: torch.dtype) -> None:
    mean, alive = WeightedMean(), []
    for _ in range(3):
        value = torch.ones(4, dtype=dtype)
        alive.append(weakref.ref(value))
        mean.add({"x": value}, 1)
        del value
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def test_accumulators_are_the_only_tensors_kept() -> None:
    mean = WeightedMean()
    gc.collect()
    before = sum(type(thing) is Tensor for thing in gc.get_objects())
    for _ in range(5):
        mean.add({"x": torch.ones(4), "y": torch.ones(2)}, 1)
    gc.collect()
    assert sum(type(thing) is Tensor for thing in gc.get_objects()) - before == 2


numbers = st.floats(-1e6, 1e6, width=32)
weights = st.floats(0.01, 1e4)
states = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.tuples(st.lists(numbers, min_size=size, max_size=size), weights), min_size=1)
)


def mean_of_lists(pairs: list[tuple[list[float], float]], scale: float = 1.0) -> Tensor:
    return mean_of(*((torch.tensor(values), weight * scale) for values, weight in pairs))


def assert_close(one: Tensor, other: Tensor) -> None:
    # One float32 rounding apart (2^-23 = 1.2e-7); float64 sums of up to 1e6 err by far less than 1e-8.
    torch.testing.assert_close(one, other, rtol=1.3e-7, atol=1e-8)


@settings(max_examples=50)
@given(states, st.randoms(use_true_random=False))
def test_order_of_states_does_not_matter(pairs: list[tuple[list[float], float]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_close(mean_of_lists(pairs), mean_of_lists(shuffled))


@settings(max_examples=50)
@given(states, st.floats(1e-3, 1e3))
def test_scale_of_the_weights_does_not_matter(pairs: list[tuple[list[float], float]], scale: float) -> None:
    assert_close(mean_of_lists(pairs), mean_of_lists(pairs, scale))


@settings(max_examples=50)
@given(st.lists(numbers, min_size=1, max_size=4), st.lists(weights, min_size=1))
def test_mean_of_equal_states_is_that_state_exactly(values: list[float], amounts: list[float]) -> None:
    assert mean_of(*((torch.tensor(values), weight) for weight in amounts)).tolist() == values


@settings(max_examples=50)
@given(states)
def test_mean_lies_between_the_least_and_the_greatest(pairs: list[tuple[list[float], float]]) -> None:
    mean, stacked = mean_of_lists(pairs), torch.tensor([values for values, _ in pairs])
    assert bool(((stacked.amin(0) <= mean) & (mean <= stacked.amax(0))).all())


def test_mean_of_differences_is_the_start_moved_by_their_mean() -> None:
    # 1 + (1·(3 - 1) + 3·(7 - 1)) / 4 = 1 + 20 / 4
    mean = MeanOfDifferences({"x": torch.tensor(1.0), "n": torch.tensor(5)})
    mean.add(OrderedDict(n=torch.tensor(10), x=torch.tensor(3.0)), 1)
    mean.add(OrderedDict(n=torch.tensor(13), x=torch.tensor(7.0)), 3)
    found = mean.result()
    assert list(found) == ["n", "x"]
    assert found["x"].item() == 6.0
    assert found["n"].item() == 12  # (10 + 3·13) / 4 = 12.25, as WeightedMean has it


def test_mean_of_differences_rounds_as_float32_does() -> None:
    start = {"x": torch.tensor([0.1, 2.0])}
    states = [torch.tensor([0.7, 2.1]), torch.tensor([0.3, -5.3])]
    mean = MeanOfDifferences(start)
    for state, weight in zip(states, (199, 30), strict=True):
        mean.add({"x": state}, weight)
    array = [state.numpy() - start["x"].numpy() for state in states]
    total = (array[0] * np.float32(199) + array[1] * np.float32(30)) / np.float32(229)
    assert torch.equal(mean.result()["x"], torch.from_numpy(start["x"].numpy() + total))


def test_mean_of_differences_of_counters_alone_and_of_nothing() -> None:
    mean = MeanOfDifferences({"n": torch.tensor(0)})
    with pytest.raises(UpdateError, match="no update"):
        mean.result()
    mean.add({"n": torch.tensor(4)}, 2)
    assert mean.result()["n"].item() == 4


# Integers, exactly

BIG = [2**62 + 1, 2**53 + 1, -(2**61) - 3, -(2**63), 2**63 - 1]


def test_equal_integers_stay_bit_for_bit() -> None:
    value = torch.tensor(BIG)
    assert mean_of(*((value, weight) for weight in (16, 24, 40))).tolist() == BIG


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_equal_integers_of_every_dtype_stay(dtype: torch.dtype) -> None:
    limits = [0, 1] if dtype is torch.bool else [torch.iinfo(dtype).min, torch.iinfo(dtype).max]
    found = mean_of(*((torch.tensor([limits], dtype=dtype), weight) for weight in (0.1, 3, 1e9)))
    assert (found.dtype, found.tolist()) == (dtype, [limits])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (2**62 + 1, 2**62 + 5, 2**62 + 4),  # a quarter of 1 and three of 5
        (-(2**63), 2**63 - 1, 2**62 - 1),  # (-2^63 + 3·(2^63 - 1)) / 4 = 2^62 - 0.75
        (0, 2, 2),  # 1.5, to even
        (2, 4, 4),  # 3.5, to even
        (-2, 0, 0),  # -0.5, to even
    ],
)
def test_mean_of_integers_is_exact_and_then_rounded_half_to_even(one: int, other: int, expected: int) -> None:
    assert mean_of((torch.tensor(one), 1), (torch.tensor(other), 3)).item() == expected


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2), st.integers(1, 10**9)), min_size=1
    )
)
def test_mean_of_integers_is_that_of_fractions(pairs: list[tuple[list[int], int]]) -> None:
    total = sum(weight for _, weight in pairs)
    expected = [round(Fraction(sum(w * values[i] for values, w in pairs), total)) for i in range(2)]
    assert mean_of(*((torch.tensor(values), weight) for values, weight in pairs)).tolist() == expected


def test_mean_of_differences_leaves_integers_exact() -> None:
    mean = MeanOfDifferences({"n": torch.tensor(BIG)})
    for weight in (16, 24):
        mean.add({"n": torch.tensor(BIG)}, weight)
    assert mean.result()["n"].tolist() == BIG


# What is not finite, everywhere the same

INF = float("inf")


@pytest.mark.parametrize("make", [WeightedMean, lambda: MeanOfDifferences({"x": mask()})], ids=["mean", "differences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constant_that_is_not_finite_stays(make: Any, dtype: torch.dtype) -> None:
    mean = make()
    for weight in (16, 24, 40):
        mean.add({"x": mask().to(dtype)}, weight)
    torch.testing.assert_close(mean.result()["x"], mask().to(dtype), rtol=0, atol=0, equal_nan=True)


def mask() -> Tensor:
    return torch.tensor([0.0, -INF, INF, float("nan"), 2.5])


def test_complex_infinity_stays() -> None:
    value = torch.tensor([complex(INF, 0), complex(1, -INF), 1 + 2j])
    found = mean_of((value, 3), (value, 4))
    assert torch.equal(torch.view_as_real(found), torch.view_as_real(value))


def test_entries_beside_an_infinite_one_are_averaged() -> None:
    mean = MeanOfDifferences({"x": torch.tensor([-INF, 0.0])})
    mean.add({"x": torch.tensor([-INF, 4.0])}, 1)
    mean.add({"x": torch.tensor([-INF, 8.0])}, 3)
    assert mean.result()["x"].tolist() == [-INF, 7.0]  # (4 + 3·8) / 4

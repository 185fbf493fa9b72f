"""Model states: independent copies, their size and their name."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.federation.state import (
    check_finite,
    clone,
    extras_of,
    fingerprint,
    nbytes,
    put_extras,
    same_values,
    state_of,
    with_extras,
)

NAN, INF = float("nan"), float("inf")


def test_state_of_is_the_state_dict() -> None:
    model = nn.BatchNorm1d(3)
    state, expected = state_of(model), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_state_of_is_an_ordered_dict() -> None:
    # FedML tells one model from a dict of models by this type.
    assert type(state_of(nn.Linear(1, 1))) is OrderedDict


def test_state_of_shares_nothing_with_the_model() -> None:
    model = nn.BatchNorm1d(3)
    state = state_of(model)
    pointers = {value.data_ptr() for value in model.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in state.values()}


def test_state_of_requires_no_grad() -> None:
    assert not any(value.requires_grad for value in state_of(nn.Linear(1, 1)).values())


def test_tied_tensors_become_two() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    state = state_of(nn.Sequential(first, second))
    state["0.weight"].zero_()
    assert not torch.equal(state["0.weight"], state["1.weight"])


def test_clone_is_independent() -> None:
    state = {"x": torch.ones(2)}
    copied = clone(state)
    copied["x"].zero_()
    assert state["x"].tolist() == [1.0, 1.0]


def test_nbytes_by_hand() -> None:
    # Linear(3, 2): (6 + 2)·4; BatchNorm1d(2): 4 vectors of 2·4, and a counter of 8.
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert nbytes(model.state_dict()) == 32 + 32 + 8


def test_nbytes_counts_each_dtype_by_its_size() -> None:
    # 5·2 + 3·8 + 7·1
    state = {
        "half": torch.zeros(5, dtype=torch.float16),
        "double": torch.zeros(3, dtype=torch.float64),
        "bool": torch.zeros(7, dtype=torch.bool),
    }
    assert nbytes(state) == 41


BASE = OrderedDict(a=torch.tensor([1.0, 2.0]), b=torch.tensor([[3, 4]]))


def changed(**entries: Tensor) -> OrderedDict[str, Tensor]:
    return OrderedDict({**BASE, **entries})


def test_fingerprint_is_the_sha256_of_names_types_shapes_and_bytes() -> None:
    # 1.0 is 0x3f800000, little endian; 2.0 is 0x40000000.
    content = b"a|torch.float32|(2,)|" + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\x40"
    assert fingerprint({"a": torch.tensor([1.0, 2.0])}) == hashlib.sha256(content).hexdigest()


def test_fingerprint_of_equal_states_is_equal() -> None:
    assert fingerprint(clone(BASE)) == fingerprint(BASE)


@pytest.mark.parametrize(
    "other",
    [
        changed(a=torch.tensor([1.0, 2.0 + 2**-22])),  # the last bit of the mantissa
        changed(a=torch.tensor([1.0, 2.0], dtype=torch.float64)),
        changed(b=torch.tensor([[3], [4]])),
        changed(b=torch.tensor([[3, 4]], dtype=torch.int32)),
        changed(c=torch.zeros(0)),
        OrderedDict(reversed(BASE.items())),
        OrderedDict(a=BASE["a"], c=BASE["b"]),
        OrderedDict(a=BASE["a"]),
    ],
    ids=["one bit", "dtype", "shape", "integer dtype", "empty entry", "key order", "name", "fewer"],
)
def test_fingerprint_changes_with(other: OrderedDict[str, Tensor]) -> None:
    assert fingerprint(other) != fingerprint(BASE)


def test_fingerprint_tells_zero_from_minus_zero() -> None:
    assert fingerprint({"x": torch.tensor(0.0)}) != fingerprint({"x": torch.tensor(-0.0)})


def test_fingerprint_does_not_depend_on_the_memory_layout() -> None:
    value = torch.arange(6.0).view(2, 3)
    assert fingerprint({"x": value.t().contiguous().t()}) == fingerprint({"x": value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_fingerprint_takes_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = fingerprint({"x": torch.ones(shape, dtype=dtype)})
    same_as_zeros = found == fingerprint({"x": torch.zeros(shape, dtype=dtype)})
    assert same_as_zeros is (0 in shape)


def test_fingerprint_takes_a_parameter() -> None:
    assert fingerprint({"x": nn.Parameter(torch.ones(1))}) == fingerprint({"x": torch.ones(1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_sees_one_bad_entry(bad: float) -> None:
    assert not check_finite(torch.tensor([0.0, bad, 1.0]))


def test_check_finite_sees_infinities_of_both_signs_that_would_cancel() -> None:
    assert not check_finite(torch.tensor([float("inf"), float("-inf")]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_finite_takes_the_largest_numbers(dtype: torch.dtype) -> None:
    # The entries' own sum would overflow.
    assert check_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))


def test_check_finite_takes_an_empty_tensor() -> None:
    assert check_finite(torch.zeros(0))


# Entries that are no tensors


class Extra(nn.Linear):
    """Keeps a dictionary, or a tensor, beside its weights."""

    def __init__(self, note: Any) -> None:
        super().__init__(2, 2)
        self.note = note

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


NOTES: list[Any] = [{"step": 3}, "words", None, torch.ones(2)]


@pytest.mark.parametrize("note", NOTES)
def test_extra_state_is_no_part_of_a_state(note: Any) -> None:
    assert list(state_of(nn.Sequential(Extra(note)))) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("wrap", [nn.Sequential, lambda one: one], ids=["inside", "the model itself"])
def test_state_is_loaded_beside_the_extra_state(note: Any, wrap: Any) -> None:
    model, other = wrap(Extra(note)), wrap(Extra("another"))
    model.load_state_dict(with_extras(model, state_of(other)))
    assert all(torch.equal(value, state_of(other)[key]) for key, value in state_of(model).items())
    (layer,) = (one for one in model.modules() if isinstance(one, Extra))
    assert layer.note is note


def test_extra_state_can_be_put_back() -> None:
    layer = Extra({"step": 3})
    extras = extras_of(layer)
    for _ in range(2):
        layer.note["step"] = 9
        put_extras(layer, extras)
        assert layer.note == {"step": 3}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1.0, NAN], [1.0, NAN], True), ([NAN], [1.0], False), ([1.0], [1.0, 1.0], False), ([-INF], [-INF], True)],
)
def test_same_values(one: list[float], other: list[float], expected: bool) -> None:
    assert same_values(torch.tensor(one), torch.tensor(other)) is expected

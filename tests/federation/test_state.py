"""Model states: independent copies, their size and their name."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.federation.state import clone, fingerprint, nbytes, state_of


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

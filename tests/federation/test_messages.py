"""What passes between server and clients comes back as it was."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.messages import RESERVED, Announcement, Assignment, packed, unpacked, update_of, with_sums
from fedsq_plugin.federation.state import State, fingerprint, nbytes, state_of

tensors = st.one_of(
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
    st.integers(-(2**63), 2**63 - 1).map(torch.tensor),
    st.booleans().map(torch.tensor),
)
# A state dict's keys: attribute names joined by dots, but also what a parametrisation may add.
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda k: not k.startswith(RESERVED))
states = st.dictionaries(keys, tensors, max_size=5).map(OrderedDict)
hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
announcements = st.one_of(
    st.just(Announcement(None)), st.builds(Announcement, hexadecimal, st.one_of(st.none(), states.filter(bool)))
)


def same(one: State | None, other: State | None) -> bool:
    """Keys, their order, types, shapes and values, NaN included."""
    if one is None or other is None:
        return one is other
    return fingerprint(one) == fingerprint(other)


@given(states, st.one_of(st.none(), announcements))
def test_assignment_comes_back(state: State, told: Announcement | None) -> None:
    back = unpacked(packed(Assignment(state, told)))
    assert same(back.state, state)
    if told is None:
        assert back.structural is None
    else:
        assert back.structural is not None
        assert back.structural.fingerprint == told.fingerprint
        assert same(back.structural.state, told.state)


@given(states, st.dictionaries(keys, tensors, max_size=4), st.integers(0, 99), st.floats(0.5, 1e6))
def test_update_comes_back(state: State, sums: dict[str, Tensor], silo: int, samples: float) -> None:
    back = update_of(silo, samples, with_sums(state, sums))
    assert (back.silo, back.samples) == (silo, samples)
    assert same(OrderedDict(back.state), state)
    assert same(OrderedDict(back.sums), OrderedDict(sums))


def state() -> State:
    return state_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_plain_assignment_is_the_plain_state() -> None:
    given_state = state()
    assert same(packed(Assignment(given_state)), given_state)


def test_plain_update_is_the_plain_state() -> None:
    given_state = state()
    message = with_sums(given_state, {})
    assert list(message) == list(given_state)
    assert all(message[key] is value for key, value in given_state.items())


def test_tensors_are_not_copied() -> None:
    given_state, structural = state(), state()
    message = packed(Assignment(given_state, Announcement("ab", structural)))
    assert all(message[key] is value for key, value in given_state.items())
    back = unpacked(message)
    assert back.structural is not None
    assert back.structural.state is not None
    assert all(back.structural.state[key] is value for key, value in structural.items())


def test_packing_leaves_the_state_alone() -> None:
    given_state = state()
    packed(Assignment(given_state, Announcement("ab", state())))
    with_sums(given_state, {"a": torch.ones(1)})
    assert list(given_state) == list(state())


def test_announcement_costs_its_fingerprint() -> None:
    message = packed(Assignment(state(), Announcement("f" * 64)))
    assert nbytes(message) == nbytes(state()) + 64


def test_unfrozen_gates_cost_nothing() -> None:
    assert nbytes(packed(Assignment(state(), Announcement(None)))) == nbytes(state())


def test_every_key_beside_the_state_is_reserved() -> None:
    message = packed(Assignment(state(), Announcement("ab", state())))
    beside = [key for key in message if key not in state()]
    assert len(beside) == 1 + len(state())
    assert all(key.startswith(RESERVED) for key in beside)


@pytest.mark.parametrize("key", ["fedsq:fingerprint", "fedsq:structural:0.weight", "fedsq:anything"])
def test_update_with_a_foreign_reserved_key_is_refused(key: str) -> None:
    message = with_sums(state(), {"a": torch.ones(1)})
    message[key] = torch.ones(1)
    with pytest.raises(UpdateError) as caught:
        update_of(3, 1, message)
    assert str(caught.value) == f"the update of silo 3 has the key '{key}', which only the server may send"


def test_update_with_sums_alone_has_an_empty_state() -> None:
    found = update_of(0, 1, with_sums({}, {"a": torch.ones(2)}))
    assert (list(found.state), list(found.sums)) == ([], ["a"])

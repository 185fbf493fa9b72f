"""The server's memory: what is written is what is read."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsq_plugin.errors import WeightsError
from fedsq_plugin.federation import state_files
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint


def state(value: float) -> State:
    """Neither sorted by name nor by size, with slashes in no key and a counter."""
    return OrderedDict(
        [
            ("fc.weight", torch.full((2, 3), value)),
            ("bn.num_batches_tracked", torch.tensor(int(value))),
            ("bias", torch.tensor(value)),
        ]
    )


FULL = ServerState(
    model=state(1),
    slots=tuple(state(10 + n) for n in range(12)),  # "slot 10" sorts before "slot 2"
    memory={"first moment": state(30), "second moment": state(31), "structural": state(32)},
    structural=state(2),
    structural_version=4,
    told={7: 4, 0: 3},
    round=6,
)


def assert_same(one: ServerState, other: ServerState) -> None:
    assert fingerprint(one.tensors()) == fingerprint(other.tensors())
    assert one.about() == other.about()
    assert (one.round, one.structural_version, one.told) == (other.round, other.structural_version, other.told)
    assert fingerprint(one.model) == fingerprint(other.model)
    assert [fingerprint(slot) for slot in one.slots] == [fingerprint(slot) for slot in other.slots]
    assert {k: fingerprint(v) for k, v in one.memory.items()} == {k: fingerprint(v) for k, v in other.memory.items()}
    assert (one.structural is None) == (other.structural is None)
    assert fingerprint(one.structural or {}) == fingerprint(other.structural or {})


VARIANTS = {
    "full": FULL,
    "first": ServerState(state(1)),
    "unfrozen": replace(FULL, structural=None),
    "no slots": replace(FULL, slots=()),
    "one slot": replace(FULL, slots=(state(5),)),
    "no memory": replace(FULL, memory={}),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_state_comes_back_from_its_parts(name: str) -> None:
    given_state = VARIANTS[name]
    assert_same(ServerState.of(given_state.tensors(), given_state.about()), given_state)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_state_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    given_state = VARIANTS[name]
    state_files.save(tmp_path / "server.safetensors", given_state.tensors(), given_state.about())
    assert_same(ServerState.of(*state_files.load(tmp_path / "server.safetensors")), given_state)


@given(
    st.integers(0, 13),
    st.lists(st.sampled_from(["momentum", "slot 1", "memory", "model", "own name"]), unique=True),
    st.booleans(),
    st.dictionaries(st.integers(0, 999), st.integers(0, 99), max_size=5),
    st.integers(0, 99),
    st.integers(0, 999),
)
def test_any_state_comes_back(
    slots: int, memory: list[str], structural: bool, told: dict[int, int], version: int, round: int
) -> None:
    given_state = ServerState(
        state(1),
        tuple(state(100 + n) for n in range(slots)),
        {name: state(200 + n) for n, name in enumerate(memory)},
        state(2) if structural else None,
        version,
        told,
        round,
    )
    assert_same(ServerState.of(given_state.tensors(), given_state.about()), given_state)


def test_slots_that_share_their_tensors_come_back(tmp_path: Path) -> None:
    # FedMR's first stage: every slot is the model.
    shared = state(1)
    given_state = ServerState(shared, slots=(shared, shared), structural=shared)
    state_files.save(tmp_path / "server.safetensors", given_state.tensors(), given_state.about())
    assert_same(ServerState.of(*state_files.load(tmp_path / "server.safetensors")), given_state)


def test_order_of_the_keys_comes_back() -> None:
    found = ServerState.of(FULL.tensors(), FULL.about())
    assert list(found.model) == ["fc.weight", "bn.num_batches_tracked", "bias"]


def test_names_of_the_tensors_are_flat_and_their_own() -> None:
    names = list(FULL.tensors())
    assert len(names) == len(set(names)) == 3 * (1 + 12 + 3 + 1)
    assert {"model/bias", "structural/bias", "slot 11/bias", "memory first moment/bias"} <= set(names)


def test_description_by_hand() -> None:
    assert FULL.about() == {"round": 6, "clients": 0, "structural_version": 4, "told": {"7": 4, "0": 3}}


def without(part: str) -> dict[str, Tensor]:
    return {name: value for name, value in FULL.tensors().items() if not name.startswith(f"{part}/")}


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        (without("model"), FULL.about()),
        (without("slot 3"), FULL.about()),
        ({}, FULL.about()),
        (FULL.tensors(), {}),
        (FULL.tensors(), {**FULL.about(), "round": "third"}),
        (FULL.tensors(), {**FULL.about(), "round": None}),
        (FULL.tensors(), {**FULL.about(), "told": [1, 2]}),
        (FULL.tensors(), {**FULL.about(), "told": {"silo": 1}}),
        (FULL.tensors(), None),
        ({**FULL.tensors(), "optimizer/bias": torch.zeros(())}, FULL.about()),
        (state(1), FULL.about()),
    ],
    ids=[
        "no model",
        "slot missing",
        "empty",
        "no description",
        "round",
        "null round",
        "told",
        "told by name",
        "null",
        "unknown part",
        "a plain model",
    ],
)
def test_foreign_content_is_an_error(tensors: dict[str, Tensor], about: Any) -> None:
    with pytest.raises(WeightsError, match="this is no server state") as caught:
        ServerState.of(tensors, about)
    assert "\n" not in str(caught.value)


# Where clients begin


def test_clients_begin_with_the_model() -> None:
    first = ServerState(state(1))
    assert all(first.begins(position) is first.model for position in range(3))


def test_clients_begin_with_the_slot_of_their_position() -> None:
    assert [FULL.begins(position) for position in range(12)] == list(FULL.slots)


def test_more_clients_than_slots_begin_with_the_first_again() -> None:
    assert FULL.begins(13) is FULL.slots[1]


def test_state_is_not_written_into() -> None:
    with pytest.raises(AttributeError):
        FULL.round = 7  # type: ignore[misc]

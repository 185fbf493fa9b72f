"""The server's rules, against numbers worked out by hand."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedsq_plugin.algorithms.options import Options
from fedsq_plugin.algorithms.server import SERVERS, Average
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.state import State
from fedsq_plugin.federation.updates import Update

ROLES = {
    "weight": Role.BODY,
    "norm": Role.NORM_PARAMETER,
    "mean": Role.NORM_BUFFER,
    "count": Role.COUNTER,
    "head": Role.HEAD,
}


def state(weight: float, norm: float, mean: float, count: int, head: float) -> dict[str, Tensor]:
    return {
        "weight": torch.tensor([weight]),
        "norm": torch.tensor([norm]),
        "mean": torch.tensor([mean]),
        "count": torch.tensor(count),
        "head": torch.tensor([head]),
    }


SERVER = state(100, 100, 100, 100, 100)


def averaged(buffers: Literal["average", "keep"]) -> State:
    """Clients of one and three samples."""
    rule = Average(SERVER, ROLES, Options(buffers=buffers))
    rule.add(Update(0, 1, state(0, 4, 8, 10, -4)))
    rule.add(Update(1, 3, state(4, 8, -8, 13, 4)))
    return rule.finish()


def plain(found: State) -> dict[str, float]:
    return {key: value.item() for key, value in found.items()}


def test_everything_is_averaged_by_samples() -> None:
    # (0 + 3·4)/4, (4 + 3·8)/4, (8 - 3·8)/4, (10 + 3·13)/4 = 12.25, (-4 + 3·4)/4
    assert plain(averaged("average")) == {"weight": 3.0, "norm": 7.0, "mean": -4.0, "count": 12, "head": 2.0}


def test_kept_buffers_and_counters_are_the_servers() -> None:
    assert plain(averaged("keep")) == {"weight": 3.0, "norm": 7.0, "mean": 100.0, "count": 100, "head": 2.0}


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_order_and_types_are_the_states(buffers: Literal["average", "keep"]) -> None:
    found = averaged(buffers)
    assert [(key, value.dtype) for key, value in found.items()] == [
        (key, value.dtype) for key, value in SERVER.items()
    ]


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_result_is_an_ordered_dict(buffers: Literal["average", "keep"]) -> None:
    assert type(averaged(buffers)) is OrderedDict


def test_kept_buffers_are_copies() -> None:
    averaged("keep")["mean"].zero_()
    assert SERVER["mean"].item() == 100.0


def test_kept_buffers_hide_what_clients_made_of_them() -> None:
    rule = Average(SERVER, ROLES, Options(buffers="keep"))
    rule.add(Update(0, 1, state(1, 1, float("nan"), 1, 1)))
    assert rule.finish()["mean"].item() == 100.0


def test_single_update_is_the_next_state() -> None:
    rule = Average(SERVER, ROLES, Options())
    rule.add(Update(0, 7, state(1, 2, 3, 4, 5)))
    assert plain(rule.finish()) == {"weight": 1.0, "norm": 2.0, "mean": 3.0, "count": 4, "head": 5.0}


def test_no_update_is_an_error() -> None:
    with pytest.raises(UpdateError, match="no update to average"):
        Average(SERVER, ROLES, Options()).finish()


def test_updates_are_not_held_together() -> None:
    rule, alive = Average(SERVER, ROLES, Options()), []
    for client in range(3):
        update = Update(client, 1, state(1, 1, 1, 1, 1))
        alive += [weakref.ref(value) for value in update.state.values()]
        rule.add(update)
        del update
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_servers_have_their_names() -> None:
    assert dict(SERVERS) == {"average": Average}

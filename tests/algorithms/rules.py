"""A server of five entries, one of each role, and the updates of two silos, for rules worked out by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsq_plugin.algorithms import Algorithm, ServerRule
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State

from .task import AllOptions, values

ROLES = {
    "weight": Role.BODY,
    "norm": Role.NORM_PARAMETER,
    "mean": Role.NORM_BUFFER,
    "count": Role.COUNTER,
    "head": Role.HEAD,
}
PARAMETERS = ["weight", "norm", "head"]
RULES: dict[str, ServerRule] = values("server")
EXCHANGES = values("exchange")


def state(weight: float, norm: float, mean: float, count: int, head: float) -> State:
    return OrderedDict(
        weight=torch.tensor([float(weight)]),
        norm=torch.tensor([float(norm)]),
        mean=torch.tensor([float(mean)]),
        count=torch.tensor(count),
        head=torch.tensor([float(head)]),
    )


SERVER = state(100, 100, 100, 100, 100)
SILOS = (Update(0, 1, state(0, 4, 8, 10, -4)), Update(1, 3, state(4, 8, -8, 13, 4)))
"""Of one and three samples."""


def server(
    rule: str | ServerRule = "average",
    options: Any | None = None,
    exchange: str = "all",
    model: State = SERVER,
    seed: int = 0,
) -> Server:
    """Of an algorithm with this server rule and this exchange."""
    chosen = RULES[rule] if isinstance(rule, str) else rule
    own = Algorithm("Own", "nowhere", server=chosen, exchange=EXCHANGES[exchange])
    return Server(own, options or AllOptions(), model, ROLES, seed)


def step(found: Server, *updates: Update) -> ServerState:
    """The server's state after a round of these updates, which it has then."""
    gathering = found.begin([update.silo for update in updates])
    for update in updates:
        gathering.add(replace(update, state=found.travelling(update.state)))
    gathering.finish()
    return found.state


def plain(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in found.items()}

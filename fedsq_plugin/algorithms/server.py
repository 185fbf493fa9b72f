"""Server: how the updates of a round become the next model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from ..federation.mean import WeightedMean
from ..federation.roles import Role
from ..federation.state import State
from ..federation.updates import Update
from .options import Options


class Round(Protocol):
    """Takes the updates of one round one by one, so that they need not be held together."""

    def add(self, update: Update) -> None: ...

    def finish(self) -> State:
        """The next global state. Raises UpdateError when no update was added."""


class Average:
    """The sample-weighted mean of the updates (FedAvg, McMahan et al. 2017, arXiv 1602.05629).

    Buffers are averaged too, or kept as the server has them, as the option `buffers` says. Counters
    are averaged and rounded.
    """

    def __init__(self, state: Mapping[str, Tensor], roles: Mapping[str, Role], options: Options) -> None:
        self._state, self._roles, self._options = state, roles, options
        self._mean = WeightedMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.samples)

    def finish(self) -> State:
        mean = self._mean.result()
        if self._options.buffers == "average":
            return mean
        kept = (Role.NORM_BUFFER, Role.COUNTER)
        return OrderedDict(
            (key, self._state[key].clone() if self._roles[key] in kept else value)
            for key, value in mean.items()
        )


SERVERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Role], Options], Round]] = {
    "average": Average
}

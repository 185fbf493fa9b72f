"""The table of algorithms: each a row of five choices, by its published name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError, nearest
from .exchange import EXCHANGES
from .objective import OBJECTIVES
from .phases import PHASES
from .server import SERVERS
from .view import VIEWS


@dataclass(frozen=True)
class Algorithm:
    """Five choices and where they come from. A value that its choice does not know is an error."""

    name: str
    source: str
    view: str = "plain"
    objective: str = "none"
    phases: str = "all"
    exchange: str = "all"
    server: str = "average"

    def __post_init__(self) -> None:
        for choice, values in CHOICES.items():
            value = getattr(self, choice)
            if value not in values:
                raise ConfigError(f"{self.name}: {choice} is '{value}'{nearest(value, values)}")


CHOICES: dict[str, Mapping[str, object]] = {
    "view": VIEWS,
    "objective": OBJECTIVES,
    "phases": PHASES,
    "exchange": EXCHANGES,
    "server": SERVERS,
}

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("FedAvg", "McMahan et al. 2017, arXiv 1602.05629"),
        Algorithm("FedProx", "Li et al. 2020, arXiv 1812.06127", objective="proximal"),
        Algorithm("FedSQ", "arXiv 2604.02990", view="dualcopy"),
    )
}


def algorithm(name: str) -> Algorithm:
    """The row of that name. Raises ConfigError with the nearest name."""
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm '{name}'{nearest(name, ALGORITHMS)}")
    return ALGORITHMS[name]

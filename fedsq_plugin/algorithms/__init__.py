"""The algorithms, one file each. `registry` finds them, and those of other packages."""

from ..federation.algorithm import (
    Algorithm,
    Exchange,
    ExtraOptions,
    FederationOptions,
    Objective,
    Phases,
    ServerRule,
    View,
)
from .registry import algorithm, algorithms, find, known

__all__ = [
    "Algorithm",
    "Exchange",
    "ExtraOptions",
    "FederationOptions",
    "Objective",
    "Phases",
    "ServerRule",
    "View",
    "algorithm",
    "algorithms",
    "find",
    "known",
]

"""The options that the five choices read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    epochs: int = 1
    fedprox_mu: float = 0.01
    gate_accept: tuple[str, ...] = ()
    gate_pooling: Literal["structural", "own"] = "structural"
    buffers: Literal["average", "keep"] = "average"

"""The options that the five choices read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..dualcopy.precision import Precision


@dataclass(frozen=True)
class Options:
    """What each means stands in `fedsq_plugin.config`."""

    epochs: int = 1
    head: str | None = None
    fedprox_mu: float = 0.01
    gate_accept: tuple[str, ...] = ()
    gate_pooling: Literal["structural", "own"] = "structural"
    structural_precision: Precision = "fp32"
    structural_copy: Literal["fixed", "refresh", "ema", "unfreeze"] = "fixed"
    structural_rounds: int = 1
    structural_decay: float = 0.9
    buffers: Literal["average", "keep"] = "average"
    head_epochs: int = 1
    probe_rounds: int = 1
    frozen_modules: tuple[str, ...] = ()
    server_lr: float | None = None
    server_momentum: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    fedmr_unit: Literal["key", "module"] = "key"
    first_stage_bound: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Options of third-party values."""

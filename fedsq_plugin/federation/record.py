"""What a host reports of a round."""

from __future__ import annotations

from dataclasses import dataclass, field

from .evaluate import Metrics


@dataclass
class RoundRecord:
    """What a round did. `metrics` is None in rounds without an evaluation."""

    round: int
    """1-based."""
    seconds: float = 0.0
    """Wall clock of training and aggregation."""
    seconds_evaluation: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: Metrics | None = None
    released: Metrics | None = None
    """The quantitative copy alone, with its own gates; equals `metrics` for a plain model."""
    silos: Metrics | None = None
    """Every silo's own model on its own test data, over all their samples."""
    by_silo: dict[int, Metrics] = field(default_factory=dict)
    """The same, silo by silo."""
    silos_tuned: Metrics | None = None
    """The same after the final fine-tuning."""
    notes: list[str] = field(default_factory=list)
    """Clients skipped, updates refused."""

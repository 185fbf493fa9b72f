"""The record of a round: what hosts report and metrics.csv holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from .evaluate import Metrics


@dataclass
class RoundRecord:
    """One round. `metrics` is None in a round that is not evaluated."""

    round: int
    """1-based."""
    seconds: float = 0.0
    """Wall-clock time of training and aggregation."""
    seconds_evaluation: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: Metrics | None = None
    released: Metrics | None = None
    """Metrics of the quantitative copy alone, with its own gates. For a plain model they equal `metrics`."""
    silos: Metrics | None = None
    """Every silo's own model on its own test data, over all their samples."""
    by_silo: dict[int, Metrics] = field(default_factory=dict)
    """The same, by silo."""
    silos_tuned: Metrics | None = None
    """The same after the final fine-tuning."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: silos that were skipped, updates that were refused."""

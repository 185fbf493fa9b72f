"""A plain network turned into a DualCopy: gates, wrapper, validation, gate cache."""

from .cache import GateCache
from .passes import Gate
from .validation import Finding, validate
from .wrapper import DualCopy

__all__ = ["DualCopy", "Finding", "Gate", "GateCache", "validate"]

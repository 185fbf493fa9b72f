"""FLamby as a host. Importing this imports neither FLamby nor torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "strategy_class":
        from .strategy import strategy_class

        return strategy_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

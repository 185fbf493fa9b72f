"""FLamby as a host. Nothing here is mathematics, and FLamby is imported only when asked for."""

from .strategy import strategy_class

__all__ = ["strategy_class"]

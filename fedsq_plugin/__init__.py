"""FedSQ for FedML and FLamby. Importing this package imports neither host, nor torchvision."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models
    from .dualcopy import DualCopy, validate
    from .hosts import register

__version__ = "0.1.0"
__all__ = ["DualCopy", "__version__", "models", "register", "validate"]

_HOME = {"DualCopy": ".dualcopy", "validate": ".dualcopy", "register": ".hosts"}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module(".models", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

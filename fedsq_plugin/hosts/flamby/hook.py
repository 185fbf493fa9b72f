"""Registers our algorithms in FLamby: adds them to its strategies, and lets its benchmark find their results.

Both happen when FLamby is imported by whoever uses it. Its import takes seconds, and needs packages (opacus,
tensorboard) that some machines do not have.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ...algorithms import algorithm, algorithms
from ...errors import ConfigError

STRATEGIES, BENCHMARK = "flamby.strategies", "flamby.benchmarks.benchmark_utils"
PREFIX = "Plugin"
"""What the names of our algorithms begin with where FLamby has a strategy of that name: PluginFedAvg, beside its
FedAvg."""

_registered = False


def register() -> None:
    """Turn the plugin on in FLamby where it is installed, once per process: now, or when it is imported."""
    global _registered
    if _registered or importlib.util.find_spec("flamby") is None:
        return
    changes = {STRATEGIES: add_strategies, BENCHMARK: find_ours}
    for name, change in changes.items():
        if name in sys.modules:
            change(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(changes))
    _registered = True


class _AfterImport(importlib.abc.MetaPathFinder):
    """Changes a module right after Python has executed it."""

    def __init__(self, changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if change else None
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def add_strategies(module: ModuleType) -> None:
    """Add our algorithms to `flamby.strategies` as classes. Those joined by `+` are made when they are asked for."""
    from .strategy import Strategy, make_strategy

    made: dict[str, type[Strategy]] = {}
    for name, one in algorithms().items():
        key = PREFIX + name if hasattr(module, name) else name
        made[key] = make_strategy(one, key)
    for key, cls in made.items():
        setattr(module, key, cls)

    def composed(name: str) -> Any:
        try:
            if "+" not in name:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            made[name] = made.get(name) or make_strategy(algorithm(name))
        except ConfigError as error:
            raise AttributeError(str(error)) from None
        return made[name]

    module.__getattr__ = composed  # type: ignore[method-assign]


def find_ours(module: ModuleType) -> None:
    """Let the benchmark find the results of our strategies among those of its file.

    FLamby's function refuses unknown names, fails on text columns that are empty so far, and overlooks options that
    only the other experiment was given. Everything else that makes two experiments equal is left to it.
    """
    original, always = module.find_xps_in_df, {"Test", "Method", "Metric", "seed"}

    def find_xps_in_df(df: Any, hyperparameters: Mapping[str, Any], sname: str, num_updates: int) -> Any:
        values = {key: float("nan") if value is None else value for key, value in hyperparameters.items()}
        text = [key for key, value in values.items() if not isinstance(value, (int, float))]
        method, known = f"{sname}{num_updates}", f"FedAvg{num_updates}"
        same = df["Method"] == method
        if _is_ours(sname):
            same &= df[[key for key in df.columns if key not in always | set(values)]].isna().all(axis=1)
        seen = df.astype(dict.fromkeys(text, object))
        seen["Method"] = [known if one else "another" for one in same]
        return original(seen, values, "FedAvg", num_updates)

    module.find_xps_in_df = find_xps_in_df  # type: ignore[attr-defined]


def _is_ours(name: str) -> bool:
    from .strategy import Strategy

    found = getattr(sys.modules.get(STRATEGIES), name, None)
    return isinstance(found, type) and issubclass(found, Strategy)

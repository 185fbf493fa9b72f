"""What `register()` adds to FLamby, on stand-ins for FLamby's modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsq_plugin.algorithms import algorithm, algorithms
from fedsq_plugin.hosts.flamby import hook
from fedsq_plugin.hosts.flamby.strategy import Strategy


@pytest.fixture
def flamby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package called flamby with strategies and a benchmark of the same names."""
    for path, text in (
        ("__init__", ""),
        ("strategies/__init__", "class FedAvg: pass"),
        ("benchmarks/__init__", ""),
        ("benchmarks/benchmark_utils", "def find_xps_in_df(df, hp, sname, n): return df, hp, sname, n"),
    ):
        file = tmp_path / "flamby" / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "flamby"}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(hook, "_registered", False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "flamby"]:
        del sys.modules[name]
    sys.modules.update(kept)


def imported(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.usefixtures("flamby")
@pytest.mark.parametrize("before", [False, True])
def test_strategies_are_there_however_flamby_is_imported(before: bool) -> None:
    if before:
        imported("flamby.strategies")
    hook.register()
    hook.register()
    assert before or "flamby.strategies" not in sys.modules
    strategies = imported("flamby.strategies")
    assert issubclass(strategies.FedSQ, Strategy)
    assert strategies.FedSQ.algorithm is algorithm("FedSQ")
    assert not issubclass(strategies.FedAvg, Strategy)
    assert strategies.PluginFedAvg.algorithm is algorithm("FedAvg")
    assert {name if name != "FedAvg" else "PluginFedAvg" for name in algorithms()} <= vars(strategies).keys()


@pytest.mark.usefixtures("flamby")
def test_algorithms_joined_by_plus_are_strategies_too() -> None:
    hook.register()
    strategies = imported("flamby.strategies")
    both = getattr(strategies, "FedSQ+FedMR")
    assert both.algorithm == algorithm("FedSQ+FedMR")
    assert getattr(strategies, "FedSQ+FedMR") is both
    for name in ("FedSQ+Fed", "Nothing"):
        with pytest.raises(AttributeError, match=r"unknown|has no attribute"):
            getattr(strategies, name)


@pytest.mark.usefixtures("flamby")
def test_the_benchmark_is_changed_when_it_is_imported() -> None:
    hook.register()
    from_module = imported("flamby.benchmarks.benchmark_utils").find_xps_in_df
    _, _, name, updates = from_module(pd.DataFrame({"Method": ["FedSQ100"]}), {}, "FedSQ", 100)
    assert (name, updates) == ("FedAvg", 100)


def found(df: pd.DataFrame, values: dict[str, Any], name: str) -> list[int]:
    """What the benchmark finds, where its own function compares plainly as text."""

    def original(df: pd.DataFrame, values: dict[str, Any], name: str, updates: int) -> Any:
        assert name == "FedAvg"
        same = df["Method"] == f"{name}{updates}"
        for key, value in values.items():
            if isinstance(value, float):
                assert df[key].dtype != object or df[key].isna().all()
                same &= np.isclose(df[key].astype(float), value, equal_nan=True)
            else:
                assert df[key].dtype == object
                same &= df[key].astype(str) == str(value)
        return df.index[same]

    module = ModuleType("benchmark_utils")
    module.find_xps_in_df = original  # type: ignore[attr-defined]
    hook.find_ours(module)
    return list(module.find_xps_in_df(df, values, name, 100))  # type: ignore[attr-defined]


def test_results_are_found_by_name_and_options() -> None:
    df = pd.DataFrame(
        {"Method": ["FedAvg100", "FedSQ100", "FedSQ100", "FedSQ200"], "seed": [0.0, 0.0, 1.0, 0.0], "mu": [np.nan] * 4}
    )
    assert found(df, {"seed": 0.0, "mu": None}, "FedSQ") == [1]
    assert found(df, {"seed": 0.0, "mu": None}, "FedAvg") == [0]


def test_an_option_of_text_that_no_row_has_yet_breaks_nothing() -> None:
    df = pd.DataFrame({"Method": ["FedSQ100"], "structural_copy": [np.nan]})
    assert found(df, {"structural_copy": "ema"}, "FedSQ") == []


@pytest.mark.usefixtures("flamby")
def test_an_experiment_with_an_option_is_not_the_one_without() -> None:
    hook.register()
    imported("flamby.strategies")
    df = pd.DataFrame(
        {"Method": ["FedSQ100"] * 2, "Metric": [0.5, 0.6], "structural_copy": ["ema", np.nan], "seed": [0.0] * 2}
    )
    assert found(df, {"seed": 0.0}, "FedSQ") == [1]


def test_without_flamby_registering_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_registered", False)
    monkeypatch.setattr(hook.importlib.util, "find_spec", lambda name: None)
    before = list(sys.meta_path)
    hook.register()
    assert sys.meta_path == before

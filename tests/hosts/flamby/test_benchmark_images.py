"""FLamby's own benchmark from its command to its CSV, on random files in the layouts of its data sets.

Real are FLamby's loaders, collate functions, networks, losses, metrics and its script; in the copy of it that
is used here a round is two updates, where it says 100.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from . import standins

pytestmark = standins.needs_flamby
ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes" / "flamby"
LIMIT_S = 800
"""For one command."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("FLamby")
    standins.copied(folder)
    script = folder / "flamby" / "benchmarks" / "fed_benchmark.py"
    source = script.read_text()
    assert source.count("run_num_updates = [100]") == 1
    script.write_text(source.replace("run_num_updates = [100]", "run_num_updates = [2]"))
    return folder


def benchmark(checkout: Path, config: Path, results: Path, backbone: str) -> str:
    """What it said at its end, where it failed."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(checkout)]),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    command = [sys.executable, "-m", "fedsq_plugin.hosts.flamby", "fed_benchmark", "--config", str(config)]
    command += ["--results-file-path", str(results), "--backbone", backbone, "--cpu-only", "--debug"]
    folder = results.parent
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    return done.stderr[-3000:] if done.returncode else ""


IMAGES = [
    ("fed_isic2019", standins.isic, "isic2019.json", "resnet18", 6),
    ("fed_ixi", standins.ixi, "ixi.json", "baseline", 3),
    ("fed_kits19", standins.kits, "kits19.json", "baseline", 6),
    ("fed_camelyon16", standins.camelyon, "camelyon16.json", "baseline", 2),
]


@pytest.mark.parametrize("row", IMAGES, ids=lambda row: row[0])
@pytest.mark.timeout(1800)
def test_a_round_of_every_strategy_of_a_recipe(
    checkout: Path, plain_path: Path, tmp_path: Path, row: tuple[str, Callable[[Path, Path], None], str, str, int]
) -> None:
    dataset, make, recipe, backbone, centres = row
    datasets, data = checkout / "flamby" / "datasets", plain_path / "data"
    data.mkdir()
    make(datasets, data)
    standins.locate(datasets, dataset, data)
    results = tmp_path / "results.csv"
    for _ in range(2):  # what is there already is not run again
        assert not benchmark(checkout, RECIPES / recipe, results, backbone)
    found = pd.read_csv(results)
    rows: dict[str, Any] = json.loads((RECIPES / recipe).read_text())["strategies"]
    methods = {"Pooled Training", *(f"Local {n}" for n in range(centres)), *(f"{name}2" for name in rows)}
    assert set(found["Method"]) == methods
    tests = {"Pooled Test", *(f"client_test_{n}" for n in range(centres))}
    assert all(set(one["Test"]) == tests and len(one) == centres + 1 for _, one in found.groupby("Method"))
    assert found["Metric"].dropna().between(0, 1).all() and found["Metric"].notna().any()

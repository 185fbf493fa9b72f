"""The README's example of a third party's algorithm, as a package that pip installs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which the package that the README shows is installed."""
    text = (ROOT / "README.md").read_text()
    source, installed = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "fedmedian.py"):
        found = re.search(rf"^`{re.escape(name)}`\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert found, f"the README shows no {name}"
        (source / name).write_text(found[1])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(installed), str(source)], check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}


def fedsq(environment: dict[str, str], *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fedsq_plugin.cli", *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_lists_it(environment: dict[str, str], tmp_path: Path) -> None:
    lines = fedsq(environment, "algorithms", cwd=tmp_path).splitlines()
    assert any(line.split() == ["FedMedian", "plain", "none", "all", "all", "median"] for line in lines)


def test_it_runs_in_a_comparison_alone_and_with_fedsq(environment: dict[str, str], tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "lambda_gelu" / "gelunet.yaml").read_text())
    recipe["warm_start_args"].update(
        {"warm_start_epochs": 2, "relu_ise_learn_epochs": 0, "relu_ise_harden_epochs": 1},
        warm_start_cache_dir=str(tmp_path / "cache"),
    )
    recipe["train_args"]["comm_round"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    names = ["FedMedian", "FedSQ+FedMedian"]
    fedsq(environment, "compare", "recipe.yaml", "--algorithms", ",".join(names), "--out", "out", cwd=tmp_path)
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == names
    assert all(float(row.split(",")[5]) > 0.3 for row in rows)

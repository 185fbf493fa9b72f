"""Two silos on a GPU, by `fedsq run`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
PYTHON = (sys.executable, "-m", "fedsq_plugin.cli")
TWO_SILOS = ("client_num_in_total=2", "client_num_per_round=2", "comm_round=2", "using_gpu=true")


def fedsq(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("options", [(), ("precision=bf16", "channels_last=true"), ("precision=fp16", "compile=true")])
def test_two_silos_in_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "run"
    settings = [part for option in (*TWO_SILOS, *options) for part in ("--set", option)]
    done = fedsq("run", str(RECIPE), *settings, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["device"].startswith("cuda:0 (")
    assert pd.read_csv(out / "metrics.csv").query("split == 'test'").accuracy.iloc[-1] > 0.5


def test_two_silos_over_mpi(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [part for option in (*TWO_SILOS, "backend=MPI") for part in ("--set", option)]
    done = fedsq("launch", str(RECIPE), *settings, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(out / "metrics.csv").query("split == 'test'")) == 2


def test_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = fedsq("run", str(RECIPE), "--set", "using_gpu=true", "--set", "gpu_id=99", "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gpu_id is 99, but this machine has" in done.stderr

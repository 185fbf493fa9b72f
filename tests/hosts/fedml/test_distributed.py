"""Runs over several real processes: the same figures as in one, and an end whatever happens to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedsq_plugin import launch
from fedsq_plugin.config import OPTIONS, family_of

from .several import rows

ALGORITHMS = ("FedAvg", "FedSQ", "FedMR", "FedRep", "FedNCM", "FedBABU")
ROADS = {"GRPC": "cross_silo", "MPI": "simulation"}
LIMIT_S = 150
"""For any one step of a test; nothing may hang."""
PYTHON = (sys.executable, "-m", "fedsq_plugin.cli")


def recipe(cache: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """A GELU network on digits, so that clients must follow the server's warm start and ReLUs."""
    families: dict[str, dict[str, Any]] = {
        "common_args": {"training_type": "simulation", "random_seed": 0},
        "data_args": {"dataset": "digits", "partition_method": "hetero", "partition_alpha": 0.5},
        "model_args": {"model": "gelunet"},
        "train_args": {
            **{"federated_optimizer": "FedSQ", "client_num_in_total": 3, "client_num_per_round": 3},
            **{"comm_round": 2, "epochs": 1, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.9},
        },
        "comm_args": {"backend": "sp"},
        "tracking_args": {"enable_wandb": False},
        "fedsq_args": {"threads": 1, "min_client_samples": 10},
        "warm_start_args": {
            **{"warm_start": "public", "warm_start_epochs": 2, "warm_start_learning_rate": 0.02},
            **{"relu_ise": True, "relu_ise_learn_epochs": 1, "relu_ise_harden_epochs": 1},
            "warm_start_cache_dir": str(cache),
        },
    }
    for key, value in options.items():
        families[family_of(key) if key in OPTIONS else "train_args"][key] = value
    return families


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True)


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def in_one_process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("sp") / "fedml.log"
    return {name: rows(recipe(cache, federated_optimizer=name), log) for name in ALGORITHMS}


@pytest.mark.parametrize("backend", ROADS)
def test_the_figures_are_those_of_one_process(
    backend: str, in_one_process: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """Three silos on two client processes."""
    for number, name in enumerate(ALGORITHMS):
        families = recipe(
            cache, federated_optimizer=name, backend=backend, training_type=ROADS[backend], worker_num=2
        )
        if backend == "GRPC":
            table = tmp_path / f"{number}.csv"
            table.write_text(launch._table(2))
            families["comm_args"]["grpc_ipconfig_path"] = str(table)
        (tmp_path / f"{backend}-{name}.yaml").write_text(yaml.safe_dump(families))
    command = (sys.executable, "-m", "tests.hosts.fedml.several", str(tmp_path), backend)
    if backend == "GRPC":
        processes = [start(*command, str(rank)) for rank in range(3)]
    else:
        mpirun = Path(sys.executable).with_name("mpirun")
        options = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "3")
        processes = [start(str(mpirun), *options, *command)]
    with ended(*processes):
        said = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    found = json.loads((tmp_path / f"{backend}.json").read_text())
    assert found == json.loads(json.dumps(in_one_process))


def launched(tmp_path: Path, families: Any, *options: str) -> tuple[subprocess.Popen[str], Path]:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(families))
    return start(*PYTHON, "launch", str(path), "--out", str(out), *options), out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)


def process_of(rank: int, out: Path) -> int:
    """The process id of a rank of a launched GRPC run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "node" in words and str(out) in words and words[words.index("--rank") + 1] == str(rank):
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_launch_over_mpi(in_one_process: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    process, out = launched(tmp_path, recipe(cache, backend="MPI"), "--clients", "1")
    with ended(process):
        said, wrong = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, wrong
    assert "round 2/2" in said and wrong == ""
    metrics = pd.read_csv(out / "metrics.csv", float_precision="round_trip")
    expected = [[row[1][1], row[1][0]] for row in in_one_process["FedSQ"]]
    assert metrics[["accuracy", "loss"]].to_numpy().tolist() in (
        expected,
        [pair[::-1] for pair in expected],
    )
    assert {"client-1.log", "fedml.log", "summary.json", "FedSQ-seed0.safetensors"} <= {
        path.name for path in out.iterdir()
    }


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_client_that_is_killed(cache: Path, tmp_path: Path) -> None:
    """With a quorum the run goes on without it; without one it ends with a line. Both at once, because
    both must wait for the silence."""
    runs = []
    for name, options in (("quorum", {"min_clients": 1}), ("none", {})):
        (tmp_path / name).mkdir()
        families = recipe(
            cache, backend="GRPC", training_type="cross_silo", comm_round=5, epochs=20, **options
        )
        runs.append(launched(tmp_path / name, families, "--clients", "2"))
    with ended(*(process for process, _ in runs)):
        for process, out in runs:
            wait_for((out / "metrics.csv").exists, process)
            os.kill(process_of(2, out), signal.SIGKILL)
        said = [process.communicate(timeout=LIMIT_S) for process, _ in runs]
    assert [process.returncode for process, _ in runs] == [0, 2], said
    assert all("client process 2 was ended by signal 9" in wrong for _, wrong in said)
    rounds = [len(pd.read_csv(out / "metrics.csv")) for _, out in runs]
    assert rounds[0] == 5 > rounds[1]
    assert "rank 2 is lost" in said[0][0] and "silo 1 is not there" in said[0][0]
    assert "1 of 2 client processes are left, 2 are needed (fedsq_args.min_clients)" in said[1][1]
    assert "Traceback" not in "".join(map("".join, said))


def test_a_recipe_that_disagrees_and_a_server_that_ended(cache: Path, tmp_path: Path) -> None:
    """Each of two processes on its own recipe, as across silos."""
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text(launch._table(1))
    processes = []
    for rank, rate in ((0, 0.02), (1, 0.03)):
        families = recipe(cache, backend="GRPC", training_type="cross_silo", learning_rate=rate, worker_num=1)
        families["comm_args"]["grpc_ipconfig_path"] = str(table)
        path = tmp_path / f"{rank}.yaml"
        path.write_text(yaml.safe_dump(families))
        processes.append(start(*PYTHON, "node", str(path), "--rank", str(rank), "--out", str(out)))
    with ended(*processes):
        said = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    reason = "rank 1 cannot take part: its recipe has learning_rate 0.03 instead of 0.02"
    assert [process.returncode for process in processes] == [2, 2]
    assert reason in said[0] and f"fedsq: error: the server ended the run: {reason}" in said[1]
    assert [text.count("\n") for text in said] == [1, 1]


def test_run_says_launch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, backend="MPI")))
    done = subprocess.run([*PYTHON, "run", str(path)], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "fedsq: error: training_type simulation with backend MPI takes several processes: use `fedsq launch`"
    )


if shutil.which("mpirun") is None and not Path(sys.executable).with_name("mpirun").exists():
    ROADS.pop("MPI")

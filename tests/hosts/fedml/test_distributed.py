"""Runs over several real processes: the same figures as in one, and an end whatever happens to them."""

from __future__ import annotations

import json
import logging
import os
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

from fedsq_plugin.federation.seeding import sample_clients
from fedsq_plugin.hosts.fedml.local import free_addresses
from fedsq_plugin.settings.config import OPTIONS, family_of

from . import golden, several
from .cases import CASES, Case
from .conftest import HEAD, MPIRUN, NORM, WHOLE, environment, turn_off_security
from .several import SEED, rows, script

ALGORITHMS = ("FedSQ", "FedRep")
ROADS = {"GRPC": "cross_silo", "MPI": "simulation"}
FINGERPRINT = 64
"""Bytes of a structural copy's announcement."""
WRONG_WORLD = "train_args.worker_num is 3, and this run has 2 client processes: start it with mpirun -np worker_num + 1"
LIMIT_S = 150
"""For any one step of a test; nothing may hang."""
FEDSQ = ("-m", "fedsq_plugin.cli")
"""Of the fixture `python`; of sys.executable where a test is of a process from its very start."""


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


def start(*command: str | Path, **variables: str) -> subprocess.Popen[str]:
    pipe, known = subprocess.PIPE, {**environment(), **variables}
    return subprocess.Popen(command, env=known, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def ended(*processes: subprocess.Popen[Any]) -> Iterator[None]:
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


@pytest.fixture(scope="module")
def scripts_in_one_process(
    fedml: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[list[Any], str]]]:
    folder, argv, root = tmp_path_factory.mktemp("scripts"), sys.argv, list(logging.root.handlers)
    yield {name: script(case, folder, number=n) for n, (name, case) in enumerate(CASES.items())}
    sys.argv, logging.root.handlers = argv, root
    turn_off_security()


def test_the_figures_are_those_that_were_written_down(scripts_in_one_process: Any) -> None:
    """Equal in every digit on a machine like the one that wrote them, nearly equal elsewhere."""
    written = json.loads(golden.FILE.read_text())
    found = json.loads(json.dumps(scripts_in_one_process))
    assert found.keys() == written["runs"].keys()
    if golden.machine() == written["machine"]:
        assert found == written["runs"]
        return
    for name, (rounds, _) in written["runs"].items():
        assert len(found[name][0]) == len(rounds), name
        for ours, theirs in zip(found[name][0], rounds, strict=True):
            assert (ours["bytes"], ours["notes"]) == (theirs["bytes"], theirs["notes"]), name
            for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
                assert one == (other and pytest.approx(other, abs=golden.TOLERANCE, nan_ok=True)), name


@pytest.mark.parametrize("backend", ROADS)
def test_the_figures_are_those_of_one_process(
    backend: str, in_one_process: Any, scripts_in_one_process: Any, python: Path, cache: Path, tmp_path: Path
) -> None:
    """On two client processes, recipes of `fedsq run` and scripts of a user's own, under the launcher."""
    for number, name in enumerate(ALGORITHMS):
        families = recipe(cache, federated_optimizer=name, backend=backend, training_type=ROADS[backend], worker_num=2)
        if backend == "GRPC":
            table = tmp_path / f"{number}.csv"
            table.write_text(free_addresses(3))
            families["comm_args"]["grpc_ipconfig_path"] = str(table)
        (tmp_path / f"{backend}-{name}.recipe").write_text(yaml.safe_dump(families))
    for number in range(len(CASES)):
        (tmp_path / f"table-{number}.csv").write_text(free_addresses(3))
    command = (str(python), "-m", "fedsq_plugin", str(several.__file__), str(tmp_path), backend)
    if backend == "GRPC":
        commands = [(*command, str(rank)) for rank in range(3)]
    else:
        options = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "3")
        commands = [(str(MPIRUN), *options, *command)]
    said = tmp_path / "said.txt"  # a pipe that nobody reads would fill, and stop its process
    with said.open("w") as out:
        processes = [subprocess.Popen(command, env=environment(), stdout=out, stderr=out) for command in commands]
    with ended(*processes):
        for process in processes:
            process.wait(timeout=3 * LIMIT_S)  # over sixty runs
    assert [process.returncode for process in processes] == [0] * len(processes), said.read_text()[-3000:]
    recipes, scripts, _ = json.loads((tmp_path / f"{backend}-0.json").read_text())
    assert scripts_in_one_process.keys() <= scripts.keys()
    assert recipes == json.loads(json.dumps(in_one_process))
    for name, (found, found_print) in scripts.items():
        known = name.partition(", across silos")[0]
        (rounds, print_of), case = scripts_in_one_process[known], CASES[known]
        assert (name, found_print) == (name, print_of)
        expected = json.loads(json.dumps(rounds))
        notes = [note for record in expected for note in record["notes"]]
        assert (name, notes) == (name, list(case.notes))
        more = [there["bytes"].pop() - here["bytes"].pop() for there, here in zip(found, expected, strict=True)]
        assert (name, found) == (name, expected)
        assert (name, more) == (name, more_bytes_down(case))
    for rank in range(3):
        first, *second = json.loads((tmp_path / f"{backend}-{rank}.json").read_text())[2]
        assert first == (
            "FedSQ: between processes, only the plugin's own trainer and aggregator send the structural "
            "copy; pass none, or use backend: sp"
        )
        assert second == ([WRONG_WORLD] if backend == "MPI" else [])


def more_bytes_down(case: Case) -> list[int]:
    """Between processes, a silo's first message is the whole model, with the fingerprint of the structural
    copy, and the copy as well where it is another one than the model by then."""
    name, options = str(case.options["federated_optimizer"]), {"comm_round": 2, **case.options}
    apart = HEAD if name in ("FedRep", "FedBABU") else NORM if "FedBN" in name else 0
    silos = [silo for silo, size in enumerate(case.sizes) if size]
    known: set[int] = set()
    more = []
    for round_idx in range(options["comm_round"]):
        wanted = options.get("client_num_per_round", len(case.sizes))
        new = set(sample_clients(len(case.sizes), wanted, round_idx, SEED)).intersection(silos) - known
        known |= new
        # What changes in a later round is told to everybody, on every road.
        unchanged = options.get("structural_copy", "fixed") == "fixed" or round_idx < 2
        copy = FINGERPRINT + (WHOLE if round_idx else 0) if "FedSQ" in name and unchanged else 0
        more.append(len(new) * (apart + copy))
    return more


def launched(
    tmp_path: Path, families: Any, *options: str, python: str | Path = sys.executable
) -> tuple[subprocess.Popen[str], Path]:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(families))
    return start(python, *FEDSQ, "launch", path, "--out", out, *options), out


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
    assert metrics[["accuracy", "loss"]].to_numpy().tolist() in (expected, [pair[::-1] for pair in expected])
    assert {"client-1.log", "fedml.log", "summary.json", "FedSQ-seed0.safetensors"} <= {
        path.name for path in out.iterdir()
    }


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_client_that_is_killed(python: Path, cache: Path, tmp_path: Path) -> None:
    """With a quorum the run goes on without it; without one it ends with a line. Both at once, because
    both must wait for the silence."""
    runs = []
    for name, options in (("quorum", {"min_clients": 1}), ("none", {})):
        (tmp_path / name).mkdir()
        road = {"backend": "GRPC", "training_type": "cross_silo"}
        few = {"comm_round": 5, "epochs": 20, "warm_start_public": 0.85}
        families = recipe(cache, **road, **few, **options)
        runs.append(launched(tmp_path / name, families, "--clients", "2", python=python))
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


def test_a_recipe_that_disagrees_and_a_server_that_ended(python: Path, cache: Path, tmp_path: Path) -> None:
    """Each of two processes on its own recipe, as across silos."""
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text(free_addresses(2))
    processes = []
    for rank, rate in ((0, 0.02), (1, 0.03)):
        families = recipe(cache, backend="GRPC", training_type="cross_silo", learning_rate=rate, worker_num=1)
        families["comm_args"]["grpc_ipconfig_path"] = str(table)
        path = tmp_path / f"{rank}.yaml"
        path.write_text(yaml.safe_dump(families))
        processes.append(start(python, *FEDSQ, "node", path, "--rank", str(rank), "--out", out))
    with ended(*processes):
        said = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    reason = "rank 1 cannot take part: its recipe has learning_rate 0.03 instead of 0.02"
    assert [process.returncode for process in processes] == [2, 2]
    assert reason in said[0] and f"fedsq: error: the server ended the run: {reason}" in said[1]
    assert [text.count("\n") for text in said] == [1, 1], said


def test_run_says_launch(python: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, backend="MPI")))
    with ended(process := start(python, *FEDSQ, "run", path)):
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert said.startswith(
        "fedsq: error: training_type simulation with backend MPI takes several processes: use `fedsq launch`"
    )


if MPIRUN is None:
    ROADS.pop("MPI")

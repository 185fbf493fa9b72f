"""Client processes that are left over from a run whose server is gone, beside another run on the same addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedsq_plugin.errors import EndedByServer, RunError
from fedsq_plugin.hosts.fedml.local import free_addresses
from fedsq_plugin.launch import node
from fedsq_plugin.run import ending

from .test_distributed import FEDSQ, LIMIT_S, ended, recipe, start, wait_for


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clients_of_a_lost_run_take_no_part_in_the_next_one(python: Path, cache: Path, tmp_path: Path) -> None:
    """One has trained for the lost server, the other one found it gone when it came. The second run has the same
    recipe, addresses and processes, and another folder."""
    few = {"comm_round": 3, "epochs": 10, "server_return_s": 90.0}
    families = recipe(cache, backend="GRPC", training_type="cross_silo", worker_num=2, **few)
    table = tmp_path / "table.csv"
    table.write_text(free_addresses(3))
    families["comm_args"]["grpc_ipconfig_path"] = str(table)
    lost, out = tmp_path / "lost", tmp_path / "out"

    def command(rank: int, folder: Path, run: str) -> Any:
        path = tmp_path / f"run-{run}.yaml"
        path.write_text(yaml.safe_dump({**families, "run_args": {"run_id": run}}))
        return start(python, *FEDSQ, "node", path, "--out", folder, "--rank", str(rank))

    server, veteran, other = (command(rank, lost, "1") for rank in range(3))
    with ended(server, veteran, other):
        wait_for((lost / "metrics.csv").exists, server)
        for process in (server, other):
            process.kill()
            process.communicate(timeout=LIMIT_S)
        late = command(2, lost, "2")  # of a third run, whose server never came
        with ended(late, server := command(0, out, "1")):
            said = [process.communicate(timeout=LIMIT_S)[1] for process in (veteran, late)]
            assert [process.returncode for process in (veteran, late)] == [2, 2], said
            assert "it took part in a run whose server is gone, and this one is new" in said[0]
            assert "its run_id is 2 instead of 1" in said[1]
            assert sorted(path.name for path in out.iterdir() if path.name.startswith("client")) == []
            before = contents(lost)
            clients = [command(rank, out, "1") for rank in (1, 2)]
            with ended(*clients):
                said = [process.communicate(timeout=LIMIT_S) for process in (server, *clients)]
    assert [process.returncode for process in (server, *clients)] == [0, 0, 0], said
    assert list(pd.read_csv(out / "metrics.csv")["round"]) == [1, 2, 3]
    assert contents(lost) == before


def begun(folder: Path) -> None:
    with ending.recorded(folder, 0):
        ending.begin()


def test_a_client_process_waits_for_its_own_runs_server_alone(tmp_path: Path) -> None:
    """The folder has another run's config.yaml by then; nothing is written there."""
    out, own = tmp_path / "out", tmp_path / "own"
    out.mkdir()
    (out / "config.yaml").write_text("{}")
    families: Any = {"train_args": {"federated_optimizer": "FedAvg"}}
    with pytest.raises(RunError, match=r"^the run that this process was started for is over$"):
        node(families, 1, out, None, False, own)  # type: ignore[arg-type]
    own.mkdir()
    with pytest.raises(KeyboardInterrupt), ending.recorded(own, 0):
        raise KeyboardInterrupt
    with pytest.raises(EndedByServer, match="interrupted"):
        node(families, 1, out, None, False, own)  # type: ignore[arg-type]
    assert contents(out) == {"config.yaml": b"{}"}
    assert not ending.has_begun(own / "..")
    begun(own)
    assert ending.has_begun(own)

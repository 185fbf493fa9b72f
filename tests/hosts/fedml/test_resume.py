"""A run that is cut off and goes on ends as one that was not, bit for bit."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from fedsq_plugin import cli
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, RunError, WeightsError
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.hosts.fedml import execute as fedml_runs
from fedsq_plugin.hosts.fedml.execute import execute
from fedsq_plugin.hosts.fedml.local import free_addresses
from fedsq_plugin.run.compare import compare
from fedsq_plugin.run.host import Outcome

from .test_distributed import FEDSQ, LIMIT_S, ROADS, ended, recipe, start, wait_for

ROUNDS = 4
LITTLE = {"warm_start_public": 0.85}
"""Is left to train on, where nothing is killed while it trains: two or three batches of a silo."""
CASES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {},
    "FedSQ": {},
    "FedSQ, refreshed": {"structural_copy": "refresh", "structural_rounds": 2},
    "FedSQ, ema": {"structural_copy": "ema"},
    "FedSQ, unfrozen": {"structural_copy": "unfreeze", "structural_rounds": 2},
    "FedSQ, two of three silos": {"client_num_per_round": 2},
    "FedMR": {},
    "FedSQ+FedMR": {"client_num_per_round": 2},
    "FedAvgM": {},
    "FedSQ+FedAdam": {},
    "FedYogi": {},
    "FedBN": {"client_num_per_round": 2},
    "FedRep": {},
    "FedBABU": {},
    "LP-FT": {},
    "FedNCM": {},
    "FedSQ+FedBN": {"structural_copy": "unfreeze", "structural_rounds": 2},
    "FedSQ+FedRep": {"structural_copy": "refresh"},
}


class Cut(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def the_recipe(cache: Path, name: str, **options: Any) -> Any:
    return recipe(cache, federated_optimizer=name.partition(",")[0], comm_round=ROUNDS, **LITTLE, **options)


def figures(records: list[RoundRecord]) -> str:
    """All of a record but what a clock measured; NaN equals NaN."""
    timeless = (replace(record, seconds=0.0, seconds_evaluation=0.0) for record in records)
    return "\n".join(map(repr, timeless))


def run(
    families: Any, folder: Path, cut_after: int | None = None, **settings: Any
) -> tuple[list[RoundRecord], Outcome | None]:
    """The rounds of a run, and what is left of it; None where it was cut off after a round."""
    families["fedsq_args"].update(checkpoint_dir=str(folder), **settings)
    records: list[RoundRecord] = []

    def on_round(record: RoundRecord) -> None:
        records.append(record)
        if record.round == cut_after:
            raise Cut

    try:
        return records, execute(families, folder.with_suffix(".log"), lambda start: None, on_round)
    except RunError as error:
        assert isinstance(error.__cause__, Cut), error
        return records, None


def everything(outcome: Outcome | None) -> str:
    """Of the model with its structural copy, and of what stayed with the silos."""
    assert outcome is not None
    model = outcome.model
    whole: dict[str, Tensor] = dict(model.full_state_dict() if isinstance(model, DualCopy) else model.state_dict())
    return fingerprint({**whole, **outcome.silos})


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(name: str, cache: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**16)
    draw = random.Random(seed)
    cut, every = draw.randint(1, ROUNDS), draw.randint(1, 2)
    options = {**CASES[name], "checkpoint_every": every}
    expected, whole = run(the_recipe(cache, name, **options), tmp_path / "whole")
    before, nothing = run(the_recipe(cache, name, **options), tmp_path / "cut", cut)
    # The cut comes after the round, before its checkpoint.
    saved = (cut - 1) // every * every
    after, outcome = run(the_recipe(cache, name, **options), tmp_path / "cut", resume=True)
    said = f"seed {seed}: cut after round {cut}, a checkpoint every {every}"
    assert nothing is None
    assert [record.round for record in after] == list(range(saved + 1, ROUNDS + 1)), said
    assert figures(before[:saved] + after) == figures(expected), said
    assert everything(outcome) == everything(whole), said


TIMES = ["seconds", "seconds_evaluation"]


def timeless(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "metrics.csv", float_precision="round_trip").drop(columns=TIMES)


def kill(out: Path) -> None:
    """Every process of a run, at once and by force."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if str(out) in words:
            os.kill(int(folder.name), signal.SIGKILL)


NAME = "FedSQ+FedRep"
"""Heads stay with the silos: between processes, each client process has its own."""


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], str]:
    """Loss and accuracy of every round's tests, and the model's fingerprint, of a run in one process."""
    families = recipe(cache, federated_optimizer=NAME, comm_round=ROUNDS, epochs=10)
    records, outcome = run(families, tmp_path_factory.mktemp("whole") / "run")
    tested = [[found.loss, found.accuracy] for r in records for found in (r.metrics, r.silos) if found]
    assert outcome is not None and isinstance(outcome.model, DualCopy)
    return tested, fingerprint(outcome.model.full_state_dict())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("backend", ["sp", *ROADS])
def test_processes_that_were_killed(
    backend: str, uninterrupted: Any, python: Path, cache: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed := random.SystemRandom().randrange(2**16))
    options = {"backend": backend, "training_type": ROADS.get(backend, "simulation"), "epochs": 10}
    families = recipe(cache, federated_optimizer=NAME, comm_round=ROUNDS, **options)
    path, out = tmp_path / "recipe.yaml", tmp_path / "cut"
    path.write_text(yaml.safe_dump(families))
    command = ("run",) if backend == "sp" else ("launch", "--clients", "2")
    rows_wanted = draw.randint(1, ROUNDS - 1)
    with ended(process := start(python, *FEDSQ, *command, path, "--out", out)):
        metrics = out / "metrics.csv"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("test") >= rows_wanted, process)
        time.sleep(draw.random())
        kill(out)
        process.communicate(timeout=LIMIT_S)
    with ended(process := start(python, *FEDSQ, command[0], "--resume", out)):
        said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, (seed, said)
    assert "the run goes on after round" in said[0], (seed, said)
    tested, model = uninterrupted
    assert timeless(out)[["loss", "accuracy"]].to_numpy().tolist() == tested, seed
    assert json.loads((out / f"{NAME}-seed0.json").read_text())["sha256"] == model, seed
    assert not (out / "checkpoints").exists()


def test_a_server_that_comes_back_finds_its_clients(
    uninterrupted: Any, python: Path, cache: Path, tmp_path: Path
) -> None:
    """The clients are not started anew: they wait, and take back what their silos did since the
    checkpoint."""
    draw = random.Random(seed := random.SystemRandom().randrange(2**16))
    options = {"backend": "GRPC", "training_type": "cross_silo", "worker_num": 2, "server_return_s": 60.0}
    families = recipe(cache, federated_optimizer=NAME, comm_round=ROUNDS, epochs=10, **options)
    table, path, out = tmp_path / "table.csv", tmp_path / "recipe.yaml", tmp_path / "out"
    table.write_text(free_addresses(3))
    families["comm_args"]["grpc_ipconfig_path"] = str(table)
    path.write_text(yaml.safe_dump(families))
    node = (python, *FEDSQ, "node", path, "--out", out, "--rank")
    server, *clients = (start(*node, str(rank)) for rank in range(3))
    with ended(server, *clients):
        rows_wanted, metrics = draw.randint(1, ROUNDS - 1), out / "metrics.csv"
        wait_for(lambda: metrics.exists() and metrics.read_text().count(",test,") >= rows_wanted, server)
        time.sleep(draw.random())
        server.kill()
        server.communicate(timeout=LIMIT_S)
        with ended(server := start(*node, "0", "--resume")):
            said = [process.communicate(timeout=LIMIT_S) for process in (server, *clients)]
    assert [process.returncode for process in (server, *clients)] == [0, 0, 0], (seed, said)
    assert "the run goes on after round" in said[0][0], (seed, said)
    assert timeless(out)[["loss", "accuracy"]].to_numpy().tolist() == uninterrupted[0], seed


def test_what_cannot_be_resumed_is_refused(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    run(the_recipe(cache, "FedSQ"), folder, cut_after=3)
    with pytest.raises(ConfigError, match=r"cut holds round 2 of a run: set fedsq_args.resume: true"):
        execute(with_folder(cache, folder), tmp_path / "log", lambda start: None, lambda record: None)
    for options, line in (
        ({"learning_rate": 0.5}, r"it is of a run with learning_rate 0.02 \(here 0.5\)"),
        ({"federated_optimizer": "FedAvg"}, "it is of a run with federated_optimizer 'FedSQ'"),
    ):
        with pytest.raises(WeightsError, match=line):
            families = with_folder(cache, folder, resume=True, **options)
            execute(families, tmp_path / "log", lambda start: None, lambda record: None)
    newest = folder / "server-round00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"not a whole checkpoint .* remove it to go on from round 1"):
        run(the_recipe(cache, "FedSQ"), folder, resume=True)
    newest.with_suffix(".json").unlink()
    records, outcome = run(the_recipe(cache, "FedSQ"), folder, resume=True)
    assert outcome is not None and [record.round for record in records] == [2, 3, 4]


def with_folder(cache: Path, folder: Path, **options: Any) -> Any:
    return recipe(cache, **{"comm_round": ROUNDS, "checkpoint_dir": str(folder), **LITTLE, **options})


def test_a_comparison_that_was_interrupted_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three runs, after its second round; the first is not run again."""
    console, families = Console(file=io.StringIO()), recipe(cache, comm_round=3, **LITTLE)
    compared = (families, ["FedAvg", "FedSQ:structural_copy=ema", "FedBABU"], [1])
    compare(*compared, tmp_path / "whole", console)

    def interrupted(families: Any, log: Path, on_start: Any, on_round: Any) -> Outcome:
        def cut(record: RoundRecord) -> None:
            on_round(record)
            if record.round == 2 and families["train_args"]["federated_optimizer"] == "FedSQ":
                raise KeyboardInterrupt

        return execute(families, log, on_start, cut)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fedml_runs, "execute", interrupted)
        compare(*compared, tmp_path / "cut", console)
    assert f"--resume {tmp_path / 'cut'} goes on" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    begun = pd.read_csv(tmp_path / "cut" / "metrics.csv")
    assert len(begun) == (3 + 3 + 1) + (2 + 2)  # silos are tested and tuned, too, for FedBABU's sake
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["fedsq", "compare", "--resume", str(tmp_path / "cut")])
        cli.main()
    pd.testing.assert_frame_equal(timeless(tmp_path / "cut"), timeless(tmp_path / "whole"), check_exact=True)
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert {key: both[0][key] for key in ("warm_start", "seeds", "relu_ise")} == {
        key: both[1][key] for key in ("warm_start", "seeds", "relu_ise")
    }
    assert both[1]["ended_early"] == []

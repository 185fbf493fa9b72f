"""One process of several runs, one after the other: `several.py FOLDER BACKEND [RANK]`.

Starting a process with FedML takes seconds, a run of the tests' size less than one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.state import fingerprint, state_of
from fedsq_plugin.hosts.fedml.execute import execute, serve
from fedsq_plugin.settings.config import OPTIONS, family_of
from tests.hosts.fedml.cases import CASES, Case
from tests.hosts.fedml.conftest import BASE, network, silos

ROADS = {"GRPC": "cross_silo", "MPI": "simulation", "sp": "simulation"}
SEED = 3
ACROSS_SILOS = ("FedSQ partial", "FedSQ+FedMR partial", "FedRep partial", "FedSQ, local privacy")
"""Run also across silos over MPI."""


def described(record: Any) -> dict[str, Any]:
    """What metrics.csv and the end of a run would say of a round."""
    tested = (record.metrics, record.released, record.silos, record.silos_tuned)
    return {
        "round": record.round,
        "metrics": [metrics and list(metrics) for metrics in tested],
        "bytes": [record.bytes_up, record.bytes_down],
        "notes": record.notes,
    }


def rows(families: Any, log: Path) -> list[list[Any]]:
    """The figures of the rounds of a recipe."""
    found: list[list[Any]] = []

    def on_round(record: Any) -> None:
        tested = (record.metrics, record.released, record.silos, record.silos_tuned)
        found.append([record.round, *(metrics and list(metrics) for metrics in tested)])

    execute(families, log, lambda start: None, on_round)
    return found


def script(
    case: Case, folder: Path, backend: str = "sp", number: int = 0, rank: int = 0, training_type: str = "",
    data: Any = None, model: Any = None,
) -> Any:  # fmt: skip
    """What a user's main.py does, with a model and data of its own: the rounds, and the final model's
    fingerprint; None in a client process."""
    import fedml

    families = {family: dict(options) for family, options in BASE.items()}
    road = {"training_type": training_type or ROADS[backend], "backend": backend, "worker_num": 2}
    road["grpc_ipconfig_path"] = str(folder / f"table-{number}.csv")
    own = {"head": "4", "fedsq_own_rows": True, "threads": 1, "random_seed": SEED}
    for key, value in {**road, **own, **case.options}.items():
        home = family_of(key) if key in OPTIONS else "other_args"
        for options in families.values():
            options.pop(key, None)
        families.setdefault(home, {})[key] = value
    path = folder / f"{backend}-{number}-{rank}.yaml"
    path.write_text(yaml.safe_dump(families))
    role = "client" if rank else "server"
    sys.argv = ["main.py", "--cf", str(path), "--rank", str(rank), "--role", role, "--run_id", "1"]
    args, model = fedml.init(), network() if model is None else model
    listens = folder / f"{backend}-{number}.listens"
    if rank and backend == "GRPC":
        while not listens.exists():  # gRPC tries anew only after a second
            time.sleep(0.005)
    runner = fedml.FedMLRunner(
        args, torch.device("cpu"), silos(case.sizes) if data is None else data, model,
        **own_parts(case.parts, args, model),
    )  # fmt: skip
    if rank:
        runner.run()
        return None
    listens.touch()
    records: list[Any] = []
    runner.runner.on_round = records.append
    runner.run()
    return [list(map(described, records)), fingerprint(state_of(runner.runner.aggregator.model))]


def own_parts(kind: str, args: Any, model: Any) -> dict[str, Any]:
    """A user's trainer and aggregator, derived from FedML's or from ours: one adds noise to what it trained,
    the other goes half the way."""
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator, FedSQTrainer
    from fedsq_plugin.hosts.fedml.arguments import config_of
    from fedsq_plugin.run.plan import plan_of

    class Noisy:
        """Draws from the global generators, as a user's code may."""

        def on_after_local_training(self, *about: Any) -> None:
            super().on_after_local_training(*about)  # type: ignore[misc]
            with torch.no_grad():
                for weight in self.model.parameters():  # type: ignore[attr-defined]
                    weight += 0.01 * torch.randn(weight.shape)

    class Halving:
        def on_after_aggregation(self, result: Any) -> Any:
            after = super().on_after_aggregation(result)  # type: ignore[misc]
            before = self.get_model_params()  # type: ignore[attr-defined]
            return {key: (value + before[key]) / 2 if value.is_floating_point() else value
                    for key, value in after.items()}  # fmt: skip

    if not kind:
        return {}
    if kind == "foreign":
        trainer = type("Trainer", (Noisy, ModelTrainerCLS), {})(model, args)
        return {
            "client_trainer": trainer,
            "server_aggregator": type("Aggregator", (Halving, DefaultServerAggregator), {})(model, args),
        }
    plan = plan_of(config_of(args), model)
    return {
        "client_trainer": type("Trainer", (Noisy, FedSQTrainer), {})(model, args, plan),
        "server_aggregator": type("Aggregator", (Halving, FedSQAggregator), {})(model, args, plan),
    }


def refused(case: Case, folder: Path, backend: str, rank: int, **road: str) -> str:
    """What a run that cannot be gets to hear."""
    try:
        script(case, folder, backend, rank=rank, **road)
    except ConfigError as error:
        return str(error)
    return "nothing"


def main(folder: Path, backend: str, rank: int | None = None) -> None:
    torch.set_num_threads(1)
    if rank is None:
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.Get_rank()
    recipes, scripts = {}, {}
    for path in sorted(folder.glob(f"{backend}-*.recipe")):
        log = folder / f"{path.stem}-{rank}.log"
        families = yaml.safe_load(path.read_text())
        if rank:
            serve(families, log, rank)
        else:
            recipes[path.stem.partition("-")[2]] = rows(families, log)
    for number, (name, case) in enumerate(CASES.items()):
        scripts[name] = script(case, folder, backend, number, rank)
    said = [refused(Case({"federated_optimizer": "FedSQ"}, parts="foreign"), folder, backend, rank)]
    if backend == "MPI":
        for name in ACROSS_SILOS:
            found = script(CASES[name], folder, backend, 0, rank, "cross_silo")
            scripts[f"{name}, across silos"] = found
        short = Case({"federated_optimizer": "FedSQ", "worker_num": 3})
        said.append(refused(short, folder, backend, rank, training_type="cross_silo"))
    (folder / f"{backend}-{rank}.json").write_text(json.dumps([recipes, scripts, said]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))

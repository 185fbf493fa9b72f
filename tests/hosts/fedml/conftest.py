"""Real FedML, imported once for all host tests; small data and networks, so that a run takes a second."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import fedsq_plugin
from fedsq_plugin.federation.state import State, clone, state_of
from fedsq_plugin.settings.config import OPTIONS, family_of
from fedsq_plugin.wire import certificates

from . import nursery

BASE: dict[str, dict[str, Any]] = {
    "common_args": {"training_type": "simulation", "random_seed": 0},
    "data_args": {"dataset": "digits", "partition_method": "homo", "partition_alpha": 0.5},
    "model_args": {"model": "resnet18"},
    "train_args": {
        "federated_optimizer": "FedSQ",
        "client_id_list": "[]",
        "client_num_in_total": 3,
        "client_num_per_round": 3,
        "comm_round": 2,
        "epochs": 1,
        "batch_size": 8,
        "client_optimizer": "sgd",
        "learning_rate": 0.05,
    },
    "validation_args": {"frequency_of_the_test": 1},
    "device_args": {"using_gpu": False, "gpu_id": 0},
    "comm_args": {"backend": "sp"},
    "tracking_args": {"enable_wandb": False},
}

WHOLE, NORM, HEAD = 916, 16 * 4 * 4 + 8, (16 * 3 + 3) * 4
"""Bytes of conftest's network: 227 floats and one int64; of its normalisation layer; of its head."""

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

MakeArgs = Callable[..., Any]


@pytest.fixture(scope="session")
def fedml() -> Any:
    fedsq_plugin.register()
    import fedml

    return fedml


def environment() -> dict[str, str]:
    """Of a process that imports this tree, and shares the machine."""
    here = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `python` whose processes have FedML imported from the start, where Linux has what that takes."""
    if not Path("/proc").is_dir():
        yield Path(sys.executable)
        return
    with nursery.opened(tmp_path_factory.mktemp("nursery"), environment(), MPIRUN) as python:
        yield python


@pytest.fixture
def make_args(fedml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeArgs]:
    """FedML's own arguments, from a YAML file and its own `fedml.init`."""
    handlers, level = list(logging.root.handlers), logging.root.level

    def make(**overrides: Any) -> Any:
        families = {family: dict(options) for family, options in BASE.items()}
        for key, value in overrides.items():
            home = family_of(key) if key in OPTIONS else "other_args"
            for options in families.values():
                options.pop(key, None)
            families.setdefault(home, {})[key] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(families))
        monkeypatch.setattr(sys, "argv", ["main.py", "--cf", str(path)])
        return fedml.init()

    yield make
    logging.root.handlers, logging.root.level = handlers, level


@pytest.fixture
def run(fedml: Any, make_args: MakeArgs) -> Callable[..., Any]:
    """A finished run of our own loop, by default FedAvg, on data and a model of the test's own, with its notes."""

    def run(data: Any, model: nn.Module, name: str = "FedAvg", stop: int = 0, **options: Any) -> Any:
        own = {"own_algorithms": True, "threads": 1, "federated_optimizer": name, "dataset": "own", "model": "own"}
        runner = fedml.FedMLRunner(make_args(**{**own, **options}), torch.device("cpu"), data, model)
        simulation = runner.runner
        simulation.records, simulation.notes = [], runner.notes

        def on_round(record: Any) -> None:
            simulation.records.append(record)
            if record.round == stop:
                raise KeyboardInterrupt

        simulation.on_round = on_round
        runner.run()
        return simulation

    return run


@pytest.fixture
def steps() -> Iterator[list[int]]:
    """An entry for every step of an optimizer."""
    taken: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    yield taken
    hook.remove()


def network(seed: int = 0) -> nn.Module:
    """A small network with everything that matters to a host: normalisation, its counter, a gate."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


PARAMETERS = [name for name, _ in network().named_parameters()]
COUNTER, MODULES = "1.num_batches_tracked", ("0", "1", "4")
"""Of `network`: the entry that counts batches; the modules that have entries."""


def changed(one: State, other: State) -> set[str]:
    """The modules whose entries differ."""
    return {key.partition(".")[0] for key in one if not torch.equal(one[key], other[key])}


def silos(sizes: tuple[int, ...] = (16, 24, 40), seed: int = 1) -> list[Any]:
    """FedML's 8-tuple: three separable classes of points."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, 6, generator=generator)

    def batches(samples: int, shuffle: bool) -> DataLoader[Any]:
        labels = torch.randint(3, (samples,), generator=generator)
        points = centres[labels] + torch.randn(samples, 6, generator=generator)
        return DataLoader(TensorDataset(points, labels), batch_size=8, shuffle=shuffle and samples > 0)

    train = {silo: batches(size, True) for silo, size in enumerate(sizes)}
    test = batches(60, False)
    tests = dict.fromkeys(train, test)
    return [sum(sizes), 60, train[0], test, dict(enumerate(sizes)), train, tests, 3]


def poisoned(silo: int) -> list[Any]:
    data = silos()
    data[5][silo].dataset.tensors[0][0, 0] = float("nan")
    return data


def prepare(fedml: Any, args: Any, data: Any = None, model: Any = None, **parts: Any) -> Any:
    """FedMLRunner, as a main.py makes it; its simulation keeps the records of its rounds."""
    runner = fedml.FedMLRunner(
        args, torch.device("cpu"), silos() if data is None else data, model or network(), **parts
    )
    runner.runner.records = []
    runner.runner.on_round = runner.runner.records.append
    return runner


def simulate(fedml: Any, args: Any, data: Any = None, model: Any = None, **parts: Any) -> Any:
    """A finished simulation, with its records."""
    runner = prepare(fedml, args, data, model, **parts)
    runner.run()
    return runner.runner


def final(simulation: Any) -> State:
    return state_of(simulation.aggregator.model)


class Began(NamedTuple):
    """What a silo began a round (0-based) with, and what it sent."""

    round: int
    client: int
    received: State
    sent: State


def args_for(make_args: MakeArgs, name: str, **options: Any) -> Any:
    """Arguments for an algorithm on conftest's network, whose head is '4'."""
    known: dict[str, Any] = {"head": "4", "fedsq_own_rows": True, "comm_round": 3}
    if "FrozenEarly" in name:
        known["frozen_modules"] = ["0", "1"]
    return make_args(federated_optimizer=name, **{**known, **options})


def watched(simulation: Any) -> list[Began]:
    """Filled while the simulation runs, by listening to its trainer."""
    trainer, seen, received = simulation.model_trainer, [], [State()]
    take, give = trainer.set_model_params, trainer.get_model_params

    def set_model_params(state: State) -> None:
        received[0] = clone(state)
        take(state)

    def get_model_params() -> State:
        sent: State = give()
        seen.append(Began(simulation.args.round_idx, trainer.id, received[0], clone(sent)))
        return sent

    trainer.set_model_params, trainer.get_model_params = set_model_params, get_model_params
    return seen


def watch_rounds(simulation: Any, look: Any) -> list[Any]:
    """What `look(simulation)` gives after every round; the records are kept as well."""
    found: list[Any] = []

    def on_round(record: Any) -> None:
        simulation.records.append(record)
        found.append(look(simulation))

    simulation.on_round = on_round
    return found


def follow(simulation: Any, schedule: Sequence[Sequence[int]]) -> None:
    """Let these silos take part, round by round."""
    simulation.draw = lambda round_idx: list(schedule[round_idx])


SECURITY: dict[str, dict[str, Any]] = {
    "norm clipping": {"enable_defense": True, "defense_type": "norm_diff_clipping", "norm_bound": 0.1},
    "krum": {
        "enable_defense": True,
        "defense_type": "krum",
        "byzantine_client_num": 1,
        "client_num_in_total": 5,
        "client_num_per_round": 5,
    },
    "trimmed mean": {"enable_defense": True, "defense_type": "trimmed_mean", "beta": 0.4},
    "rfa": {"enable_defense": True, "defense_type": "rfa"},
    "central privacy": {
        "enable_dp": True,
        "dp_solution_type": "cdp",
        "mechanism_type": "gaussian",
        "epsilon": 0.9,
        "delta": 0.1,
        "sensitivity": 0.01,
        "max_grad_norm": 100.0,
    },
    "local privacy": {
        "enable_dp": True,
        "dp_solution_type": "ldp",
        "mechanism_type": "gaussian",
        "epsilon": 0.9,
        "delta": 0.1,
        "sensitivity": 0.01,
    },
    "byzantine attack": {
        "enable_attack": True,
        "attack_type": "byzantine",
        "attack_mode": "zero",
        "byzantine_client_num": 1,
    },
}


@pytest.fixture
def unsecured() -> Any:
    """FedML's security code is a process-wide singleton; leave it off."""
    yield
    turn_off_security()


def turn_off_security() -> None:
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
    from fedml.core.security.fedml_attacker import FedMLAttacker
    from fedml.core.security.fedml_defender import FedMLDefender

    for part in (FedMLAttacker, FedMLDefender, FedMLDifferentialPrivacy):
        part.get_instance().is_enabled = False


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "tls"
    certificates.write(folder, clients=2, days=1)
    return folder


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another authority."""
    folder = tmp_path_factory.mktemp("others") / "tls"
    certificates.write(folder, clients=2, days=1)
    return folder


@pytest.fixture(scope="session")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expired") / "tls"
    certificates.write(folder, clients=2, days=0)
    return folder

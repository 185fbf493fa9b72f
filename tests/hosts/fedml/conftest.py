"""Real FedML, imported once for all host tests; small data and networks, so that a run takes a second."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedsq_plugin
from fedsq_plugin.config import OPTIONS, family_of

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

MakeArgs = Callable[..., Any]


@pytest.fixture(scope="session")
def fedml() -> Any:
    fedsq_plugin.register()
    import fedml

    return fedml


@pytest.fixture
def make_args(fedml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeArgs]:
    """FedML's own arguments, from a YAML file and its own `fedml.init`."""
    handlers, level = list(logging.root.handlers), logging.root.level

    def make(**overrides: Any) -> Any:
        families = {family: dict(options) for family, options in BASE.items()}
        for key, value in overrides.items():
            home = family_of(key) if key in OPTIONS else "other_args"
            families.setdefault(home, {})[key] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(families))
        monkeypatch.setattr(sys, "argv", ["main.py", "--cf", str(path)])
        return fedml.init()

    yield make
    logging.root.handlers, logging.root.level = handlers, level


def network(seed: int = 0) -> nn.Module:
    """A small network with everything that matters to a host: normalisation, its counter, a gate."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


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

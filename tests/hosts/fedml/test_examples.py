"""The models and data sets of FedML's own examples, through its own loaders, under FedSQ."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.errors import ConfigError, GateError

from .conftest import MakeArgs, network, prepare, silos, simulate

SCRIPT = Path(__file__).parents[3] / "recipes" / "fedml_examples.py"
CLIENTS = 8


@pytest.fixture(scope="module")
def examples() -> Any:
    spec = importlib.util.spec_from_file_location("fedml_examples", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(examples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    examples.make_data(folder)
    return folder


@pytest.fixture
def loaded(fedml: Any, make_args: MakeArgs, data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """FedML's arguments, data and model of a recipe; its loaders insist on fewer clients."""
    from fedml.data.fed_cifar100 import data_loader as fed_cifar100
    from fedml.data.FederatedEMNIST import data_loader as femnist
    from torchvision.datasets import cifar

    for module in (fed_cifar100, femnist):
        monkeypatch.setattr(module, "DEFAULT_TRAIN_CLIENTS_NUM", CLIENTS)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())

    def load(dataset: str, model: str, **options: Any) -> tuple[Any, Any, nn.Module]:
        args = make_args(
            **{"dataset": dataset, "model": model, "data_cache_dir": str(data / dataset), "comm_round": 1},
            **{"client_num_in_total": CLIENTS, "client_num_per_round": 1, "partition_method": "hetero"},
            **options,
        )
        content, classes = fedml.data.load(args)
        return args, content, fedml.model.create(args, classes)

    return load


@pytest.mark.parametrize(
    ("dataset", "model", "note"),
    [
        ("cifar10", "resnet56", None),
        ("cinic10", "mobilenet", None),
        ("fed_cifar100", "resnet18_gn", "has 1000 outputs for 100 classes: .* about ln 1000 = 6.9"),
        ("femnist", "cnn", "silo 0 has 2 samples, its loader has 20: updates are weighted by"),
    ],
)
def test_it_runs(
    dataset: str, model: str, note: str | None, fedml: Any, loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    args, content, network = loaded(dataset, model)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with caplog.at_level(logging.WARNING, "fedsq_plugin"):
        simulation = simulate(fedml, args, content, network)
    (record,) = simulation.records
    assert record.metrics.samples > 0 and math.isfinite(record.metrics.loss)
    assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())
    said = " ".join(entry.getMessage() for entry in caplog.records)
    assert note is None or re.search(note, said), said


def test_a_backbone_that_cannot_be_gated_ends_before_the_first_round(fedml: Any, loaded: Any) -> None:
    with pytest.raises(GateError) as refusal:
        prepare(fedml, *loaded("cifar100", "mobilenet_v3"))
    line = str(refusal.value)
    assert line.startswith("cannot gate this model: init_conv.2: hidden swish")
    assert "(and 20 more like it, all of them: fedsq_args.gate_accept: ['*:swish'])" in line


def test_its_line_names_what_accepts_it(fedml: Any, loaded: Any) -> None:
    parts = loaded("cifar100", "mobilenet_v3", gate_accept=["*:swish"])
    assert prepare(fedml, *parts).runner.plan.algorithm.name == "FedSQ"


# What is tried before the first round


def test_a_model_that_does_not_run_on_the_data_is_one_line(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(model="resnet56", dataset="cifar10")
    with pytest.raises(ConfigError, match="resnet56 does not run on samples of cifar10, of shape 6: "):
        prepare(fedml, args, model=nn.Sequential(nn.Linear(5, 3), nn.ReLU()))


def test_a_test_set_without_a_batch_is_said(fedml: Any, make_args: MakeArgs, caplog: pytest.LogCaptureFixture) -> None:
    content = silos()
    few = TensorDataset(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))
    content[3] = DataLoader(few, batch_size=8, drop_last=True)
    prepare(fedml, make_args(), content)
    assert "the test set gives no batch: accuracies will be nan" in caplog.text


def test_what_goes_together_is_not_mentioned(fedml: Any, make_args: MakeArgs, caplog: pytest.LogCaptureFixture) -> None:
    prepare(fedml, make_args(model="mine", dataset="cifar10"))
    assert caplog.text == ""


def test_trying_changes_nothing(fedml: Any, make_args: MakeArgs) -> None:
    args, model, content = make_args(model="mine", dataset="cifar10"), network(), silos()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    prepare(fedml, args, content, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training

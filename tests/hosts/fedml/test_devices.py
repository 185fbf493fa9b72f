"""The device of a process, on a machine whose GPUs are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.hosts.fedml.devices import device_name, gpus
from fedsq_plugin.hosts.fedml.names import with_host_defaults
from fedsq_plugin.settings.agreement import MUST_AGREE

from .conftest import MakeArgs, simulate

MPI = {"training_type": "simulation", "backend": "MPI", "using_gpu": True}
SILOS = {"training_type": "cross_silo", "backend": "GRPC", "using_gpu": True}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that were made current."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    return chosen


@pytest.fixture
def mapping(tmp_path: Path) -> str:
    path = tmp_path / "gpu_mapping.yaml"
    content = {"three": {"host1": [1, 1], "host2": [0, 1]}, "far": {"host1": [1, 1, 1]}, "odd": {"host1": [1, -1]}}
    path.write_text(yaml.safe_dump({**content, "list": [1, 2]}))
    return str(path)


def refused(values: dict[str, Any], *place: int) -> str:
    with pytest.raises(ConfigError) as error:
        device_name(values, *place)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("gpu_id", "expected"), [(None, "cuda:0"), (0, "cuda:0"), (1, "cuda:1")])
@pytest.mark.parametrize("backend", ["sp", "MPI"])
def test_gpu_id_is_every_processes_gpu(two_gpus: Any, backend: str, gpu_id: int | None, expected: str) -> None:
    values = {"training_type": "simulation", "backend": backend, "using_gpu": True, "gpu_id": gpu_id}
    assert [device_name(values, rank, 3) for rank in range(3)] == [expected] * 3


@pytest.mark.parametrize("road", [MPI, SILOS])
def test_mapping_counts_processes_per_gpu_host_after_host(two_gpus: Any, mapping: str, road: Any) -> None:
    values = {**road, "gpu_mapping_file": mapping, "gpu_mapping_key": "three"}
    assert [device_name(values, rank, 3) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:1"]


def test_mapping_is_that_of_fedml(fedml: Any, mapping: str, two_gpus: Any) -> None:
    from fedml.device.gpu_mapping_mpi import mapping_processes_to_gpu_device_from_yaml_file_mpi as theirs

    values = {**MPI, "gpu_mapping_file": mapping, "gpu_mapping_key": "three"}
    args = type("Args", (), {"using_gpu": True})()
    for rank in range(3):
        assert device_name(values, rank, 3) == str(theirs(rank, 3, mapping, "three", args=args))


def test_mapping_in_the_recipe_itself(two_gpus: Any) -> None:
    assert gpus({**MPI, "gpu_util_parse": "host1:1,2;host2:1"}) == [0, 1, 1, 0]


def test_sp_goes_by_gpu_id_whatever_mapping_there_is(two_gpus: Any) -> None:
    values = {"backend": "sp", "using_gpu": True, "gpu_id": 1, "gpu_mapping_file": "nowhere.yaml"}
    assert device_name(values) == "cuda:1"


def test_without_using_gpu_it_is_the_cpu(two_gpus: Any) -> None:
    assert device_name({"backend": "sp", "using_gpu": False, "gpu_id": 1}) == "cpu"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"gpu_id": 2}, "device_args: gpu_id is 2, but this machine has 2 GPUs, 0 to 1"),
        ({"device_type": "cpu"}, "device_args.using_gpu is true and device_type is 'cpu'; set using_gpu: false"),
        ({"gpu_mapping_file": "no.yaml"}, "device_args.gpu_mapping_file no.yaml: No such file or directory"),
        ({"gpu_util_parse": "host1"}, "device_args.gpu_util_parse: 'host1' must be a host and its processes"),
    ],
)
def test_what_is_not_there_is_one_line(two_gpus: Any, options: Any, line: str) -> None:
    assert refused({**MPI, **options}).startswith(line)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("thre", "device_args.gpu_mapping_key 'thre' is not in {}; did you mean 'three'?"),
        ("list", "device_args.gpu_mapping_file {}: list must be a mapping of hosts to numbers of processes"),
        ("odd", "device_args.gpu_mapping_file {}: odd: host1 has [1, -1]; it must list the number of processes"),
        ("three", "device_args.gpu_mapping_file {}: three has places for 3 processes, this run has 5 (the server"),
    ],
)
def test_wrong_mapping_is_one_line(two_gpus: Any, mapping: str, key: str, line: str) -> None:
    values = {**MPI, "gpu_mapping_file": mapping, "gpu_mapping_key": key}
    assert refused(values, 0, 5).startswith(line.format(mapping))


def test_mapped_gpu_that_is_not_there_is_one_line(two_gpus: Any, mapping: str) -> None:
    values = {**MPI, "gpu_mapping_file": mapping, "gpu_mapping_key": "far"}
    line = "device_args: the GPU mapping puts process 2 on GPU 2, but this machine has 2 GPUs, 0 to 1"
    assert refused(values, 2, 3) == line


def test_gpu_id_beside_a_mapping_across_silos_is_refused(two_gpus: Any, mapping: str) -> None:
    values = {**SILOS, "gpu_mapping_file": mapping, "gpu_mapping_key": "three", "gpu_id": 0}
    assert refused(values, 1, 3).startswith("device_args has gpu_id and gpu_mapping_file")


def test_mapping_gets_no_default_gpu_id_beside_it() -> None:
    device = with_host_defaults({"device_args": {"gpu_mapping_file": "x.yaml"}})["device_args"]
    assert "gpu_id" not in device
    assert with_host_defaults({})["device_args"]["gpu_id"] == 0


def test_file_that_is_no_mapping_is_one_line(two_gpus: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("{")
    assert refused({**MPI, "gpu_mapping_file": str(path)}).endswith("broken.yaml: no valid YAML")


# Through FedML


def test_fedml_gives_the_device_that_was_asked_for(fedml: Any, make_args: MakeArgs, two_gpus: Any) -> None:
    args = make_args(using_gpu=True, gpu_id=1)
    assert str(fedml.device.get_device(args)) == "cuda:1"
    assert two_gpus == ["cuda:1"]


def test_fedml_does_not_fall_back_to_the_cpu(fedml: Any, make_args: MakeArgs, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = make_args(using_gpu=True)
    with pytest.raises(ConfigError, match="using_gpu is true, but no GPU is available; set using_gpu: false"):
        fedml.device.get_device(args)


def test_fedmls_own_algorithms_keep_its_way(fedml: Any, make_args: MakeArgs, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = make_args(using_gpu=True, federated_optimizer="SCAFFOLD")
    assert str(fedml.device.get_device(args)) == "cpu"


def test_what_gates_depend_on_must_agree_and_precision_need_not() -> None:
    assert {"structural_precision", "channels_last", "compile"} <= set(MUST_AGREE)
    assert "precision" not in MUST_AGREE


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16"}, {"structural_precision": "bf16"}, {"channels_last": True}]
)
def test_a_run_with_options_of_a_gpu_node(fedml: Any, make_args: MakeArgs, options: Any) -> None:
    run = simulate(fedml, make_args(comm_round=2, **options))
    model = run.aggregator.model
    assert isinstance(model, DualCopy)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.records[-1].metrics.accuracy > 0.5
    plain = simulate(fedml, make_args(comm_round=2))
    assert [r.bytes_up for r in run.records] == [r.bytes_up for r in plain.records]
    assert run.server.structural_fingerprint == plain.server.structural_fingerprint
    known = {"fp32": None, "bf16": torch.bfloat16}[options.get("structural_precision", "fp32")]
    assert model.gate_dtype == known


def test_a_run_with_compile_needs_a_model_that_can_be_compiled(fedml: Any, make_args: MakeArgs) -> None:
    from torch import nn

    class Branches(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum().item() > 0 else -x)

    args = make_args(comm_round=1, compile=True)
    with pytest.raises(ConfigError, match=r"torch.compile does not take this model as a whole"):
        simulate(fedml, args, model=Branches(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def test_lost_steps_are_said(fedml: Any, make_args: MakeArgs, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedsq_plugin.federation.local.SCALE", 2.0**40)
    simulate(fedml, make_args(comm_round=1, precision="fp16"))
    assert any("steps to an overflow in fp16" in message for message in caplog.messages)

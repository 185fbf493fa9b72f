"""States on disk: what is read is what was written, or an error."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import resnet18

from fedsq_plugin.errors import ConfigError, WeightsError
from fedsq_plugin.federation import state_files
from fedsq_plugin.federation.state import fingerprint, state_of

# Neither sorted by name nor by size of the type, which is how safetensors lays entries out.
STATE = OrderedDict(
    weight=torch.tensor([[1.0, -2.0], [float("inf"), 4.0]]),
    count=torch.tensor(7),
    bias=torch.tensor([0.5, 2**-20], dtype=torch.float16),
    flag=torch.tensor([True, False]),
    coarse=torch.tensor([1.5], dtype=torch.bfloat16),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "state.safetensors"
    state_files.save(file, STATE, {"round": 3, "name": "FedSQ"})
    return file


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        state_files.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_come_back_bit_for_bit_in_their_order(path: Path) -> None:
    tensors, _ = state_files.load(path)
    assert list(tensors) == list(STATE)
    assert fingerprint(tensors) == fingerprint(STATE)


def test_description_comes_back_as_given(path: Path) -> None:
    assert state_files.load(path)[1] == {"round": 3, "name": "FedSQ"}


def test_resnet18_comes_back(tmp_path: Path) -> None:
    state = state_of(resnet18(num_classes=3))
    state_files.save(tmp_path / "a.safetensors", state, {})
    assert fingerprint(state_files.load(tmp_path / "a.safetensors")[0]) == fingerprint(state)


def test_json_names_the_content(path: Path) -> None:
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == fingerprint(STATE)


def test_only_the_two_files_are_left(path: Path) -> None:
    assert sorted(os.listdir(path.parent)) == ["state.json", "state.safetensors"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "state.safetensors"
    state_files.save(file, STATE, {})
    assert list(state_files.load(file)[0]) == list(STATE)


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    # safetensors itself refuses them.
    value = torch.arange(6.0)
    state = {"all": value, "tail": value[3:], "columns": value.view(2, 3).t()}
    state_files.save(tmp_path / "a.safetensors", state, {})
    assert fingerprint(state_files.load(tmp_path / "a.safetensors")[0]) == fingerprint(state)


def test_parameter_that_requires_grad_is_written(tmp_path: Path) -> None:
    state_files.save(tmp_path / "a.safetensors", {"w": torch.ones(2, requires_grad=True)}, {})
    assert state_files.load(tmp_path / "a.safetensors")[0]["w"].tolist() == [1.0, 1.0]


def test_empty_state_comes_back(tmp_path: Path) -> None:
    state_files.save(tmp_path / "a.safetensors", {}, {"round": 0})
    assert state_files.load(tmp_path / "a.safetensors") == ({}, {"round": 0})


def test_older_checkpoint_is_replaced(path: Path) -> None:
    state_files.save(path, {"x": torch.ones(1)}, {"round": 4})
    tensors, about = state_files.load(path)
    assert (list(tensors), about) == (["x"], {"round": 4})


def test_description_that_json_lacks_leaves_no_json_of_it(path: Path) -> None:
    with pytest.raises(TypeError):
        state_files.save(path, STATE, {"what": object()})
    assert state_files.load(path)[1] == {"round": 3, "name": "FedSQ"}


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        state_files.save(tmp_path / "file" / "a.safetensors", STATE, {})


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_tensors_are_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a whole checkpoint" in refused(path)


def test_changed_bit_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert refused(path) == f"{path}: its content is not what state.json says"


def other_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({**STATE, **tensors}, path)


def test_other_value_is_refused(path: Path) -> None:
    other_tensors(path, {"count": torch.tensor(8)})
    assert "its content is not what" in refused(path)


def test_additional_tensor_is_refused(path: Path) -> None:
    other_tensors(path, {"extra": torch.zeros(1)})
    assert "its content is not what" in refused(path)


def test_tensor_that_the_json_names_and_the_file_lacks_is_refused(path: Path) -> None:
    save_file({"count": torch.tensor(7)}, path)
    assert "not a whole checkpoint" in refused(path)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_missing_file_is_refused(path: Path, name: str) -> None:
    (path.parent / name).unlink()
    assert "not a whole checkpoint" in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"round": 3',
        b"\xff\xfe",
        b"{}",
        b'{"sha256": "00"}',
        b'{"keys": []}',
        b'{"keys": 5, "sha256": "00"}',
        b'{"keys": [[]], "sha256": "00"}',
        b'["keys", "sha256"]',
        b"null",
        b"3",
        b'"text"',
    ],
    ids=repr,
)
def test_json_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.with_suffix(".json").write_bytes(content)
    assert "not a whole checkpoint" in refused(path)


def test_json_of_another_checkpoint_is_refused(path: Path) -> None:
    about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    assert "its content is not what" in refused(path)


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "not a whole checkpoint" in refused(tmp_path)


def test_versions_of_another_name_do_not_count(tmp_path: Path) -> None:
    state_files.Versions(tmp_path, "silo-1", {}).save(3, {"weight": torch.ones(1)}, {})
    assert state_files.Versions(tmp_path, "silo-11", {}).rounds() == []
    assert state_files.Versions(tmp_path, "silo", {}).rounds() == []

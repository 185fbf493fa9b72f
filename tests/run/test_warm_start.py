"""Warm start on public data: trained once, then read from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.federation.training import LocalTraining
from fedsq_plugin.run.warm_start import public_warm_start

TRAINING = LocalTraining(learning_rate=0.1, momentum=0.9)


def net(seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    with isolated(seed):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), activation(), nn.Dropout(0.2), nn.Linear(8, 2)
        )


class Public:
    """Three batches of four 2x2 images, that count how often they are asked for."""

    def __init__(self) -> None:
        self.asked = 0
        with isolated(9):
            self.batches = [(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])) for _ in range(3)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.asked += 1
            yield batch


def started(cache: Path, model: nn.Module | None = None, **changes: Any) -> tuple[bool, int, str]:
    """Whether it came from the cache, how many batches it took, and the resulting state's name."""
    model, public = net() if model is None else model, Public()
    given = {"content": "public data", "training": TRAINING, "epochs": 2, "seed": 0, **changes}
    cached = public_warm_start(model, public, cache=cache, **given)
    return cached, public.asked, fingerprint(model.state_dict())


def test_first_call_trains(tmp_path: Path) -> None:
    cached, asked, state = started(tmp_path)
    assert (cached, asked) == (False, 2 * 3)
    assert state != fingerprint(net().state_dict())


def test_second_call_reads_the_cache_and_asks_for_no_batch(tmp_path: Path) -> None:
    started(tmp_path)
    assert started(tmp_path)[:2] == (True, 0)


def test_second_call_has_the_same_result_bit_for_bit(tmp_path: Path) -> None:
    assert started(tmp_path)[2] == started(tmp_path)[2]


def test_training_anew_has_the_same_result_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = started(tmp_path / "a")[2]
    torch.manual_seed(2)
    assert started(tmp_path / "b")[2] == first


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    started(tmp_path)
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"content": "other data"},
        {"epochs": 3},
        {"seed": 1},
        *(
            {"training": TRAINING.model_copy(update=change)}
            for change in (
                {"learning_rate": 0.2},
                {"momentum": 0.5},
                {"weight_decay": 0.1},
                {"augmentation": ("flip",)},
            )
        ),
    ],
    ids=["content", "epochs", "seed", "learning rate", "momentum", "weight decay", "augmentation"],
)
def test_entry_is_not_used_for_other(tmp_path: Path, changes: dict[str, Any]) -> None:
    started(tmp_path)
    assert started(tmp_path, **changes)[0] is False


def test_entry_is_not_used_for_other_initial_weights(tmp_path: Path) -> None:
    started(tmp_path)
    assert started(tmp_path, net(seed=1))[0] is False


def test_entry_is_not_used_for_another_model_with_the_same_weights(tmp_path: Path) -> None:
    started(tmp_path)
    other = net(activation=nn.Tanh)
    assert fingerprint(other.state_dict()) == fingerprint(net().state_dict())
    assert started(tmp_path, other)[0] is False


def test_entries_stand_side_by_side(tmp_path: Path) -> None:
    started(tmp_path)
    started(tmp_path, seed=1)
    assert (started(tmp_path)[0], started(tmp_path, seed=1)[0]) == (True, True)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_damaged_entry_is_trained_anew_and_replaced(tmp_path: Path, suffix: str) -> None:
    expected = started(tmp_path)[2]
    (entry,) = tmp_path.glob(f"*{suffix}")
    entry.write_bytes(entry.read_bytes()[:-20])
    assert started(tmp_path) == (False, 6, expected)
    assert started(tmp_path) == (True, 0, expected)


def test_entry_without_its_json_is_trained_anew(tmp_path: Path) -> None:
    expected = started(tmp_path)[2]
    (entry,) = tmp_path.glob("*.json")
    entry.unlink()
    assert started(tmp_path) == (False, 6, expected)


def test_cache_folder_is_made(tmp_path: Path) -> None:
    started(tmp_path / "not" / "there")
    assert started(tmp_path / "not" / "there")[0] is True


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        started(tmp_path / "file")


def test_a_diverged_warm_start_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    batches = [(torch.tensor([[float("inf"), 1.0]]), torch.tensor([0]))]
    with pytest.raises(ConfigError, match=r"the warm start diverged.*lower warm_start_learning_rate"):
        public_warm_start(model, batches, "data", LocalTraining(), 1, 0, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))

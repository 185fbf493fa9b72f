"""Models that cannot be trained and averaged are refused by module or key, whatever the algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.trainable import refuse_untrainable
from tests.algorithms.task import OPTIONS, mlp


def with_buffer(value: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("extra", value)
    return model


class Hooked(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}note"] = "words"


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear}, dtype=torch.qint8)


def statically_quantised() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), torch.ao.nn.quantized.Linear(2, 2))


class Renamed(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net.{key}": value for key, value in super().state_dict(*args, **kwargs).items()}


REFUSED: list[tuple[Any, str]] = [
    (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), r"module '1' \(LazyLinear\) is lazy: .* run a sample"),
    (lambda: nn.Sequential(nn.LazyBatchNorm1d()), r"module '0' \(LazyBatchNorm1d\) is lazy"),
    (lambda: nn.LazyConv2d(3, 1), r"module 'the model itself' \(LazyConv2d\) is lazy"),
    (quantised, r"module '0' \(.*quantized.*\) is quantised, .*quantise it afterwards"),
    (statically_quantised, r"module '1' \(.*quantized.*\) is quantised"),
    (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        "entry '0.extra' is quantised",
    ),
    (lambda: with_buffer(torch.eye(2).to_sparse()), "entry '0.extra' is of the layout torch.sparse_coo"),
    (lambda: with_buffer(torch.empty(2, device="meta")), "entry '0.extra' has no values"),
    (lambda: nn.Sequential(Hooked(2, 2)), "entry '0.note' is a str and no tensor: give it by get_extra_state"),
    (lambda: Renamed(2, 2), r"the model's state_dict\(\) has no entry 'weight', which is the name of a parameter"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_untrainable_model_is_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        refuse_untrainable(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedRep", "FedMR"])
def test_every_algorithm_refuses_it(name: str) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="module '0'"):
        algorithm(name).refuse_misfit(model, OPTIONS)


def test_lazy_model_is_taken_after_a_sample() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    model(torch.zeros(1, 3))
    refuse_untrainable(model)


@pytest.mark.parametrize("make", [mlp, lambda: DualCopy(mlp()), lambda: nn.LSTM(2, 3), lambda: nn.Transformer(4, 2)])
def test_ordinary_models_are_taken(make: Any) -> None:
    refuse_untrainable(make())

"""The core on a GPU, beside the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin import DualCopy, models
from fedsq_plugin.dualcopy import Compiled, Gate, GateCache
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.local import LocalResult, Phase, local_update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.state import state_of
from fedsq_plugin.federation.training import LocalTraining

DISAGREE = 1e-3
"""Share of gates that two devices may find on different sides: pre-activations within rounding of zero."""


@pytest.fixture(autouse=True)
def without_tf32(gpu: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.create("resnet18", 10, small_images=True).eval()


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    labels = torch.randint(10, (32,), generator=torch.Generator().manual_seed(2))
    return [(images()[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)]


def share_that_differs(a: list[Gate], b: list[Gate]) -> float:
    pairs = [(x.region.cpu(), y.region.cpu()) for x, y in zip(a, b, strict=True)]
    return float(sum((x != y).sum() for x, y in pairs) / sum(x.numel() for x, _ in pairs))


def train(model: nn.Module, device: Any, forward: Any = None, **options: Any) -> LocalResult:
    training, phase = LocalTraining(learning_rate=0.01, **options), Phase(1, frozenset(Role))
    known = roles(model)
    return local_update(model, batches(), training, [phase], known, round=0, seed=0, device=device, forward=forward)


def test_output_is_the_plain_models_bit_for_bit(gpu: torch.device) -> None:
    net = resnet().to(gpu)
    dual, x = DualCopy(copy.deepcopy(net), structural_precision="fp32"), images().to(gpu)
    with torch.no_grad():
        assert torch.equal(dual(x), net(x))


def test_both_copies_are_on_the_gpu(gpu: torch.device) -> None:
    dual = DualCopy(resnet()).to(gpu)
    assert {p.device for c in (dual.quantitative, dual.structural) for p in c.parameters()} == {gpu}


@pytest.mark.parametrize("around", [None, torch.bfloat16, torch.float16])
def test_gates_agree_with_the_cpus(gpu: torch.device, around: torch.dtype | None) -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which fp32 gates turn off
    dual, x = DualCopy(resnet(), structural_precision="fp32"), images()
    expected = dual.gates(x)
    dual.to(gpu)
    with torch.autocast("cuda", around, enabled=around is not None):
        found = dual.gates(x.to(gpu))
    assert share_that_differs(found, expected) < DISAGREE


def test_kept_gates_are_the_new_ones(gpu: torch.device) -> None:
    dual, x = DualCopy(resnet(), structural_precision="fp32").to(gpu), images().to(gpu)
    cache = GateCache(dual)
    first = cache.gates(x)
    assert share_that_differs(cache.gates(x), first) == 0
    assert share_that_differs(first, dual.gates(x)) == 0
    assert {gate.region.device for gate in cache.gates(x)} == {gpu}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_local_update_follows_the_cpus(gpu: torch.device, optimizer: Any) -> None:
    # A linear model: nothing in it can turn a rounding into another gate.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    there, here = copy.deepcopy(net), net
    options = {"optimizer": optimizer, "momentum": 0.9, "weight_decay": 1e-3, "augmentation": ("crop", "flip")}
    far, near = train(there, gpu, **options), train(here, "cpu", **options)
    assert far.loss == pytest.approx(near.loss, rel=1e-4)
    for key, value in state_of(here).items():
        torch.testing.assert_close(state_of(there)[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_in_half_precision_comes_near_that_in_fp32(
    gpu: torch.device, precision: Any, channels_last: bool
) -> None:
    half, full = (DualCopy(resnet(), structural_precision="fp32") for _ in range(2))
    if channels_last:
        half.to(memory_format=torch.channels_last)
    found, expected = train(half, gpu, precision=precision), train(full, gpu)
    assert found.lost == 0
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert {value.dtype for value in state_of(half).values() if value.is_floating_point()} == {torch.float32}


def test_a_step_that_overflows_in_fp16_is_lost(gpu: torch.device) -> None:
    model, phase = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), Phase(1, frozenset(Role))
    before = state_of(model)
    training = LocalTraining(precision="fp16")
    result = local_update(
        model, batches(), training, [phase], roles(model), round=0, seed=0, device=gpu,
        loss=lambda output, labels: 1e6 * output.sum(),
    )  # fmt: skip
    assert result.lost == result.steps == 4
    assert all(torch.equal(value, before[key]) for key, value in state_of(model).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training(gpu: torch.device, precision: Any) -> None:
    mine = DualCopy(resnet(), structural_precision="fp32").to(gpu)
    other = copy.deepcopy(mine)
    compiled, x = Compiled(mine), images().to(gpu)
    assert share_that_differs(compiled.gates(x), other.gates(x)) < DISAGREE
    found, expected = train(mine, gpu, compiled, precision=precision), train(other, gpu, precision=precision)
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert list(mine.state_dict()) == list(other.state_dict())


def test_evaluation_follows_the_cpus(gpu: torch.device) -> None:
    net = resnet()
    here = evaluate(net, batches(), "cpu")
    there = evaluate(net, batches(), gpu)
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert abs(there.accuracy - here.accuracy) <= 1 / 32

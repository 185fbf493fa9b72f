"""Gates are kept only where those of a sample depend on the sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import GateCache

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Neighbour(nn.Module):
    """Adds the sample before it, so that only the first one seems alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 0)


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T).softmax(1) @ x


DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm without statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "centred": Centre,
    "the sample before": Neighbour,
    "attention over the batch": Attends,
}
ALONE: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(8),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "zeros": lambda: nn.Threshold(100.0, 0.0),
}


def build(layer: nn.Module) -> DualCopy:
    torch.manual_seed(0)
    dual = DualCopy(nn.Sequential(nn.Linear(6, 8), layer, nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        for p in dual.parameters():
            p += 0.3 * torch.randn_like(p)
    return dual


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependent_gates_are_not_kept(kind: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "BatchNorm without statistics" and size == 1:
        pytest.skip("torch does not take one sample here")
    dual = build(DEPENDENT[kind]())
    cache, plain = GateCache(dual), copy.deepcopy(dual)
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = X[torch.randperm(len(X), generator=order)[:size]]
        torch.testing.assert_close(cache(x), plain(x), rtol=0, atol=0)
    assert cache.nbytes == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "keep_gates" in line and "'2'" in line


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("kind", ALONE)
def test_gates_of_a_sample_alone_are_kept(kind: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = GateCache(build(ALONE[kind]()).eval())
    cache(X[:size])
    cache(X[:size])
    assert cache.hits == size and not caplog.records


def test_whole_numbers_are_tried_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(9, 8), nn.Linear(8, 2)

        def forward(self, ids: Tensor) -> Tensor:
            h: Tensor = torch.relu(self.fc(self.words(ids).mean(1)))
            return h

    cache = GateCache(DualCopy(Words()))
    ids = torch.arange(9).view(3, 3)
    cache(ids)
    cache(ids)
    assert cache.hits == 3

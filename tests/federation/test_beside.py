"""What a model holds beside its state is the same for every silo, in every round."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.federation.beside import Beside
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.training import LocalTraining
from tests.algorithms.task import changed


class Net(nn.Module):
    """Four numbers to three, with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.body(x)))
        return out


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) / self.steps


class Unsaved(Net):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.5 * self.average + 0.5 * x.mean(0)
        return super().forward(x - self.average)


class InPlace(Unsaved):
    def forward(self, x: Tensor) -> Tensor:
        self.average.add_(x.mean(0))
        return Net.forward(self, x - self.average)


class Draws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, generator=self.generator))


class Comes(Net):
    """A value that is None until the first forward."""

    shift: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.shift = None

    def forward(self, x: Tensor) -> Tensor:
        self.shift = x.mean(0) if self.shift is None else self.shift
        return super().forward(x - self.shift)


@pytest.mark.parametrize("make", [Counts, Unsaved, InPlace, Draws, Comes])
def test_what_training_moved_is_put_back(make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model, x = make(), torch.randn(5, 4)
    first = copy.deepcopy(model)(x)
    beside = Beside(model)
    for _ in range(2):
        model(x + 1)
        assert not torch.equal(copy.deepcopy(model)(x), first)
        with caplog.at_level(logging.WARNING):
            beside.put_back()
        assert torch.equal(copy.deepcopy(model)(x), first)
    assert len(caplog.messages) == 1
    assert "moves while the model trains, and is no part of its state" in caplog.messages[0]


def test_a_dual_copys_attributes_are_the_models() -> None:
    model = Counts()
    dual = DualCopy(model)
    beside = Beside(dual)
    dual(torch.randn(5, 4))
    assert model.steps == 1
    beside.put_back()
    assert model.steps == 0


def test_a_view_of_a_weight_moves_with_the_weight(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.register_buffer("first_row", model.body.weight.detach()[0], persistent=False)
    beside = Beside(model)
    with torch.no_grad():
        model.body.weight.add_(1)
    beside.put_back()
    assert torch.equal(model.get_buffer("first_row"), model.body.weight[0])
    assert not caplog.messages


def test_what_stays_as_it_is_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Net(), nn.utils.weight_norm(nn.Linear(3, 3)))
    model.register_buffer("mask", torch.full((3,), torch.nan), persistent=False)
    beside = Beside(model)
    model(torch.randn(5, 4)).sum().backward()
    beside.put_back()
    assert not caplog.messages


def test_a_models_generator_draws_otherwise_in_every_round_and_silo_and_the_same_again() -> None:
    def drawn(silo: int, round: int) -> Tensor:
        model = Draws()
        training = LocalTraining(comm_round=3)
        client = Client(model, algorithm("FedAvg"), changed(head="head"), training, seed=0)
        client.train(silo, [], round)
        return torch.randn(4, generator=model.generator)

    draws = [drawn(silo, round) for silo in (0, 1) for round in (0, 1)]
    assert all(not torch.equal(one, other) for n, one in enumerate(draws) for other in draws[:n])
    assert torch.equal(drawn(1, 1), draws[3])

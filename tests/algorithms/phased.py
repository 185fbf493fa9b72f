"""A network with everything that phases tell apart, and clients that train it by an algorithm's phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import Algorithm
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.state import State
from fedsq_plugin.federation.training import LocalTraining

from .task import AllOptions, values

PHASES = values("phases")


class Net(nn.Module):
    """An early and a late block with statistics, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.late = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.group = nn.GroupNorm(1, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(torch.relu(self.early(x)))
        return self.head(self.dropout(torch.relu(self.group(x))))


def net() -> Net:
    with isolated(0):
        return Net()


def without_dropout() -> nn.Module:
    """Dropout's draws follow the phases."""
    model = net()
    model.dropout = nn.Identity()
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    with isolated(1):
        return [(torch.randn(8, 4) + 1, torch.randint(3, (8,))) for _ in range(3)]


OPTIONS: Any = AllOptions(epochs=2, head="head", head_epochs=3, frozen_modules=("early",))
TRAINING = LocalTraining(learning_rate=0.1)


def client(phases: str, model: nn.Module | None = None, **options: Any) -> Client:
    """A client of an algorithm that differs from FedAvg in its phases alone."""
    own = Algorithm("Own", "nowhere", phases=PHASES[phases])
    given = OPTIONS.model_copy(update=options)
    return Client(net() if model is None else model, own, given, TRAINING, seed=0)


def moved(phases: str, round: int = 0, **options: Any) -> set[str]:
    """The entries, statistics included, that a round of one silo changes."""
    found, start = client(phases, **options), net().state_dict()
    found.train(0, batches(), round)
    return {key for key, value in found.model.state_dict().items() if not torch.equal(value, start[key])}


def equal(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())


STATISTICS = {f"{block}.1.{key}" for block in ("early", "late") for key in
              ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
NORMS = {f"{path}.{key}" for path in ("early.1", "late.1", "group") for key in ("weight", "bias")}
# A bias before a batch normalisation has no gradient; rounding may move it or not.
LINEAR = {"early.0.weight", "late.0.weight"}
BIASES = {"early.0.bias", "late.0.bias"}
HEADS = {"head.weight", "head.bias"}

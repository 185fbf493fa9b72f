"""Small stand-ins for what FLamby gives a strategy: loaders per centre, a loss of probabilities, a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.hosts.flamby.strategy import Strategy, strategy_class
from fedsq_plugin.models.mlp import MLP

SIZES = (19, 30, 7)
UPDATES, ROUNDS = 5, 3


def loaders(classes: int = 1) -> list[Any]:
    with isolated(0):
        sets = []
        for size in SIZES:
            x = torch.randn(size, 6)
            labels = torch.randint(classes, (size,)) if classes > 1 else (torch.rand(size, 1) > 0.5).float()
            sets.append(TensorDataset(x, labels))
    return [DataLoader(data, batch_size=4, shuffle=True) for data in sets]


def model() -> nn.Module:
    with isolated(1):
        return MLP(6, 1, hidden=(8,), sigmoid=True)


def normalised() -> nn.Module:
    """With BatchNorm, two classes, and a head named fc."""
    with isolated(1):
        net = nn.Sequential()
        for name, layer in (
            ("conv", nn.Linear(6, 8)),
            ("bn", nn.BatchNorm1d(8)),
            ("relu", nn.ReLU()),
            ("fc", nn.Linear(8, 2)),
        ):
            net.add_module(name, layer)
        return net


def made(
    name: str = "FedAvg",
    net: nn.Module | None = None,
    loss: Any = None,
    optimizer: Any = torch.optim.SGD,
    cls: Any = None,
    rounds: int = ROUNDS,
    classes: int = 1,
    centres: int = len(SIZES),
    **options: Any,
) -> Strategy:
    """A strategy, made as FLamby's benchmark makes it."""
    cls = cls or strategy_class(name)
    torch.manual_seed(2)
    return cls(
        loaders(classes)[:centres], net or model(), loss or nn.BCELoss(), optimizer, 0.05, UPDATES, rounds, **options
    )


def run(*arguments: Any, **options: Any) -> list[nn.Module]:
    strategy = made(*arguments, **options)
    torch.manual_seed(3)
    return strategy.run()


def on_classes(name: str, **options: Any) -> Strategy:
    """On a model with BatchNorm, and batches that BatchNorm can train on (no centre has 4n + 1 samples)."""
    return made(name, normalised(), nn.CrossEntropyLoss(), classes=2, **options)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def naive_fedavg(optimizer: Any, net: nn.Module) -> list[Tensor]:
    """FedAvg as FLamby's source has it, in a few lines: the mean of float32 differences by numpy, one
    optimizer and one iterator per client for all rounds."""
    import copy

    torch.manual_seed(2)
    sets = loaders()
    nets = [copy.deepcopy(net) for _ in sets]
    iterators = [iter(one) for one in sets]
    optimizers = [optimizer(one.parameters(), 0.05) for one in nets]
    torch.manual_seed(3)
    for _ in range(ROUNDS):
        differences = []
        for i, one in enumerate(nets):
            before = [p.detach().clone().numpy() for p in one.parameters()]
            for _ in range(UPDATES):
                try:
                    x, y = next(iterators[i])
                except StopIteration:
                    iterators[i] = iter(sets[i])
                    x, y = next(iterators[i])
                nn.functional.binary_cross_entropy(one(x), y).backward()
                optimizers[i].step()
                optimizers[i].zero_grad()
            differences.append([p.detach().numpy() - b for p, b in zip(one.parameters(), before, strict=True)])
        for one in nets:
            for k, p in enumerate(one.parameters()):
                step = sum(d[k] * n for d, n in zip(differences, SIZES, strict=True)) / float(sum(SIZES))
                p.data = torch.from_numpy(before[k] + step)
    return [p.detach() for p in nets[0].parameters()]

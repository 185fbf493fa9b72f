"""FedAvg, loss and metric in plain torch, which know nothing of the plugin; and data in FedML's form to try them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SIZES = (16, 24, 40)
RATE = 0.05
Sets = tuple[list[TensorDataset], TensorDataset]
"""The silos' training data, and the test data."""


def points(label: Callable[[Tensor], Tensor], sizes: Sequence[int] = SIZES, seed: int = 1) -> Sets:
    """Points of six features, and what `label` makes of them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, 6, generator=generator) for size in (*sizes, 20)]
    *train, test = [TensorDataset(x, label(x)) for x in drawn]
    return train, test


def eight(sets: Any, outputs: int, **loader: Any) -> list[Any]:
    """FedML's 8-tuple: loaders that do not shuffle, of batches of eight."""
    loader = {"batch_size": 8, **loader}
    train = {silo: DataLoader(one, **loader) for silo, one in enumerate(sets[0])}
    test = None if sets[1] is None else DataLoader(sets[1], batch_size=8, collate_fn=loader.get("collate_fn"))
    sizes = {silo: len(one) for silo, one in enumerate(sets[0])}
    held = 0 if sets[1] is None else len(sets[1])
    return [sum(sizes.values()), held, train[0], test, sizes, train, dict.fromkeys(train, test), outputs]


class Shaped(Dataset[Any]):
    """Samples in another form."""

    def __init__(self, plain: TensorDataset, form: Callable[[Tensor, Tensor, int], Any]) -> None:
        self.plain, self.form = plain, form

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> Any:
        return self.form(*self.plain[index], index)


def fedavg(
    model: nn.Module,
    silos: Sequence[Sequence[tuple[Tensor, Tensor]]],
    weights: Sequence[int],
    loss: Callable[[Any, Tensor], Tensor],
    rounds: int = 2,
    kept: str = "-",
) -> dict[str, Any]:
    """The global state after some rounds of one epoch. A silo that has no batch has no part. Entries with `kept` in
    their name stay at their silo, and are in no mean."""
    model, mine = copy.deepcopy(model), {}
    for _ in range(rounds):
        states, shares = [], []
        for silo, batches in enumerate(silos):
            if not batches:
                continue
            local = copy.deepcopy(model)
            local.load_state_dict({**local.state_dict(), **mine.get(silo, {})})
            local.train()
            optimizer = torch.optim.SGD([p for p in local.parameters() if p.requires_grad], RATE)
            for x, y in batches:
                optimizer.zero_grad()
                loss(local(x), y).backward()
                optimizer.step()
            states.append(local.state_dict())
            shares.append(weights[silo])
            mine[silo] = {key: value for key, value in states[-1].items() if kept in key}
        means = {key: mean([state[key] for state in states], shares) for key in states[0] if kept not in key}
        model.load_state_dict({**model.state_dict(), **means})
    return model.state_dict()


def mean(values: Sequence[Any], weights: Sequence[int]) -> Any:
    """Of integers exactly, to the nearest; of what is no tensor, the first."""
    first, whole = values[0], sum(weights)
    if not isinstance(first, Tensor):
        return first
    if first.is_floating_point():
        total = sum((weight * value.double() for weight, value in zip(weights, values, strict=True)), torch.tensor(0.0))
        return (total / whole).to(first.dtype)
    columns = zip(*(value.flatten().tolist() for value in values), strict=True)
    found = [round(sum(Fraction(w * v, whole) for w, v in zip(weights, column, strict=True))) for column in columns]
    return torch.tensor(found, dtype=first.dtype).reshape(first.shape)


def pairs(sets: Sequence[TensorDataset], size: int = 8) -> list[list[tuple[Tensor, Tensor]]]:
    """The silos' batches."""
    return [list(zip(*(t.split(size) for t in one.tensors), strict=True)) for one in sets]


def net(outputs: int = 3, *middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), nn.Linear(12, outputs))


def assert_same(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert found.keys() == right.keys()
    for key, value in right.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}")
        elif isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def of_sets(model: nn.Module, sets: Sets, loss: Any = F.cross_entropy, **how: Any) -> dict[str, Any]:
    """FedAvg on data in the order of loaders that do not shuffle."""
    return fedavg(model, pairs(sets[0]), [len(one) for one in sets[0]], loss, **how)


class Figures(NamedTuple):
    loss: float
    metric: float


class Kind(NamedTuple):
    """Targets, and what is right for them. The loss and the metric are of one sample."""

    label: Callable[[Tensor], Tensor]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor] | None
    """None: the coefficient of determination."""

    def over(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, sample by sample."""
        return torch.stack([self.loss(one, y) for one, y in zip(outputs, targets, strict=True)]).mean()

    def figures(self, outputs: Tensor, targets: Tensor) -> Figures:
        loss = float(self.over(outputs, targets))
        if self.metric is not None:
            found = [float(self.metric(one, y)) for one, y in zip(outputs, targets, strict=True)]
            return Figures(loss, sum(found) / len(found))
        outputs, targets = outputs.reshape(len(outputs), -1).double(), targets.reshape(len(targets), -1).double()
        errors = float((outputs - targets).square().sum())
        return Figures(loss, 1 - errors / float((targets - targets.mean(0)).square().sum()))


def three(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def _entropy(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(0)[int(y)]


def _soft_entropy(z: Tensor, y: Tensor) -> Tensor:
    return -(y * z.log_softmax(0)).sum()


def _binary(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-F.logsigmoid(a if b else -a) for a, b in zip(z, y, strict=True)]).mean()


def _right(z: Tensor, y: Tensor) -> Tensor:
    return (z.argmax() == (y.argmax() if y.numel() > 1 else y)).double().mean()


def decided(z: Tensor, y: Tensor) -> Tensor:
    return ((z > 0) == (y > 0.5)).double().mean()


def _squared(z: Tensor, y: Tensor) -> Tensor:
    return (z.flatten() - y.flatten()).square().mean()


KINDS = {
    "class numbers": Kind(three, 3, _entropy, _right),
    "class numbers of eight bits": Kind(lambda x: three(x).to(torch.uint8), 3, _entropy, _right),
    "a column of class numbers": Kind(lambda x: three(x)[:, None], 3, _entropy, _right),
    "class numbers as floats": Kind(lambda x: three(x).float(), 3, _entropy, _right),
    "probabilities": Kind(lambda x: x[:, :3].softmax(1), 3, _soft_entropy, _right),
    "one-hot integers": Kind(lambda x: F.one_hot(three(x), 3), 3, _soft_entropy, _right),
    "several labels": Kind(lambda x: (x[:, :4] > 0).float(), 4, _binary, decided),
    "several labels as integers": Kind(lambda x: (x[:, :4] > 0).long(), 4, _binary, decided),
    "several labels as truth values": Kind(lambda x: x[:, :4] > 0, 4, _binary, decided),
    "real values": Kind(lambda x: x.sum(1), 1, _squared, None),
    "a column of real values": Kind(lambda x: x[:, :2].sum(1, keepdim=True), 1, _squared, None),
    "real values in double precision": Kind(lambda x: x[:, :2].double(), 2, _squared, None),
}

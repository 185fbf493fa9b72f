"""The dry run in front of a strategy's first round: what it refuses in one line, and that it changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedsq_plugin.algorithms import algorithm, algorithms
from fedsq_plugin.errors import FedSQError
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.hosts.flamby.dry_run import two_batches
from fedsq_plugin.hosts.flamby.strategy import Strategy, strategy_class

from .task import UPDATES, loaders, made, model, normalised

X, Y = torch.randn(9, 6), torch.arange(9) % 2


class Counted(torch.optim.SGD):
    """Counts the steps of all optimizers."""

    steps = 0

    def step(self, *given: Any) -> Any:
        Counted.steps += 1
        return super().step(*given)


def strategy_of(
    data: list[Any],
    net: nn.Module,
    loss: Any,
    name: str = "FedAvg",
    updates: int = UPDATES,
    rounds: int = 1,
    **more: Any,
) -> Strategy:
    return strategy_class(name)(data, net, loss, Counted, 0.05, updates, rounds, **more)


def on(labels: Tensor, x: Tensor = X, size: int = 3, **how: Any) -> list[Any]:
    return [DataLoader(TensorDataset(x, labels), size, shuffle=True, **how) for _ in range(2)]


def of_two(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def by_hand(outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.tensor(float((outputs.argmax(1) != labels).float().mean()))


class Keyed(nn.Module):
    """Fails with what is no RuntimeError."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Any) -> Tensor:
        return self.layer(x.pixels)  # type: ignore[no-any-return]


CROSS = nn.CrossEntropyLoss()
WRONG: dict[str, tuple[Any, Any, Any, str]] = {
    "loss of other outputs": (
        lambda: on(Y),
        model,
        nn.BCELoss(),
        r"silo 0: the loss BCELoss does not take outputs 3x1 float32 with labels 3 int64 \(.*\); give a loss that does",
    ),
    "label outside": (
        lambda: on(Y + 5),
        normalised,
        CROSS,
        r"silo 0: the loss CrossEntropyLoss .*Target \d.*labels that fit",
    ),
    "labels of another dtype": (
        lambda: on(Y.float()),
        normalised,
        CROSS,
        r"silo 0: the loss CrossEntropyLoss .*3 float32",
    ),
    "loss per sample": (lambda: on(Y), normalised, of_two, "silo 0: the loss of_two gives 3 float32, not one number"),
    "loss without gradient": (lambda: on(Y), normalised, by_hand, "silo 0: the loss by_hand has no gradient"),
    "other features": (
        lambda: on(Y, torch.randn(9, 5)),
        normalised,
        CROSS,
        r"silo 0: the model does not run on a batch of the shape 3x5: mat1 and mat2 .*; give a model that takes such",
    ),
    "inputs of another kind": (
        lambda: on(Y),
        Keyed,
        CROSS,
        "silo 0: the model does not run on a batch of the shape 3x6: ",
    ),
    "batch of one": (
        lambda: on(Y, size=4),
        normalised,
        CROSS,
        r"silo 0: the model does not train on a batch of the shape 1x6: Expected more than 1 value.*drop_last=True",
    ),
    "no batch": (
        lambda: on(Y, size=10, drop_last=True),
        normalised,
        CROSS,
        r"FedAvg: no silo of training_dataloaders gives a batch: lower the batch_size, or .*drop_last=False",
    ),
    "batch of one part": (lambda: [DataLoader(X)], normalised, CROSS, "silo 0: .*batch"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_go_together_is_one_line_before_any_step(kind: str) -> None:
    data, net, loss, line = WRONG[kind]
    strategy = strategy_of(data(), net(), loss)
    Counted.steps = 0
    with pytest.raises(FedSQError, match=f"^{line}") as error:
        strategy.run()
    assert "\n" not in str(error.value) and Counted.steps == 0
    with pytest.raises(FedSQError, match=f"^{line}"):
        strategy.perform_round()


def test_the_silo_whose_data_are_wrong_is_named() -> None:
    data = [*on(Y)[:1], *on(Y, torch.randn(9, 5))[:1]]
    with pytest.raises(FedSQError, match=r"^silo 1: the model does not run on a batch of the shape 3x5"):
        strategy_of(data, normalised(), CROSS).run()


def test_data_that_cannot_be_read_are_named() -> None:
    class Gone(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise OSError("no such scan")

    with pytest.raises(FedSQError, match=r"^silo 0 cannot be read \(OSError: no such scan\)"):
        strategy_of([DataLoader(Gone(X, Y), 3)], normalised(), CROSS).run()


def test_batch_of_one_that_never_comes_is_not_refused() -> None:
    """Nine samples in batches of four: the third batch is one sample, and a silo trains on two batches."""
    strategy_of(on(Y, size=4), normalised(), CROSS, updates=2).run()
    assert [len(one.batch[1]) for one in two_batches("FedAvg", on(Y, size=4), [2, 2])] == [4, 4]
    assert [len(one.batch[1]) for one in two_batches("FedAvg", on(Y, size=4), [2, 3])] == [1, 4]


def test_without_a_step_nothing_is_tried() -> None:
    strategy_of(on(Y.float()), normalised(), CROSS, rounds=0).run()


def test_labels_are_the_losses_own_business() -> None:
    """Volumes with a channel, as FLamby's segmentations, and a loss that knows them."""
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 1), nn.Sigmoid())

    def dice(outputs: Tensor, masks: Tensor) -> Tensor:
        return 1 - 2 * (outputs * masks).sum() / (outputs.sum() + masks.sum() + 1)

    masks = (torch.rand(4, 1, 4, 4, 4) > 0.5).float()
    data = [DataLoader(TensorDataset(torch.randn(4, 1, 4, 4, 4), masks), 2)]
    assert len(strategy_of(data, net, dice, "FedSQ").run()) == 1


# That it changes nothing


class Drawing(Dataset[Any]):
    """Draws from its own generators, and from the global ones."""

    def __init__(self, seed: int) -> None:
        self.torch, self.numpy = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.python, self.held = random.Random(seed), Holder(seed)

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(6, generator=self.torch) + float(self.numpy.random()) + self.python.random()
        noise += torch.rand(6) + random.random() + float(np.random.rand()) + self.held.generator.random()
        return noise, index % 2


class Holder:
    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)


class Own:
    """A loader of a user's own, which counts its passes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.passes = dataset, 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from [(X[:4] + self.passes, Y[:4]), (X[4:] + self.passes, Y[4:])]


LOADERS: dict[str, Any] = {
    "FLamby's": lambda: loaders(2),
    "own generator": lambda: on(Y, generator=torch.Generator().manual_seed(7)),
    "drawing": lambda: [DataLoader(Drawing(n), 4, shuffle=True) for n in range(3)],
    "counting": lambda: [Own(range(9)), Own(range(9))],
}


def dropping() -> nn.Module:
    net = normalised()
    net.add_module("drop", nn.Dropout(0.3))
    return net


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def ended(kind: str, name: str, tried: bool) -> tuple[str, list[Any]]:
    """The server's model and the generators after two rounds."""
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    head = {"head": "fc"} if algorithm(name).needs_head else {}
    own = {"frozen_modules": ["conv"]} if name == "FrozenEarly" else {}
    data, adam = LOADERS[kind](), torch.optim.Adam
    strategy = strategy_class(name)(data, dropping(), CROSS, adam, 0.05, UPDATES, 2, **head, **own)
    before = states()
    if tried:
        strategy.try_batches()
        assert states() == before
    else:
        strategy._dry_run = None
    models = strategy.run()
    prints = [fingerprint(strategy.server.state.tensors()), *(fingerprint(one.state_dict()) for one in models)]
    return " ".join(prints), states()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["FedAvg", "FedSQ"])
def test_a_run_is_that_without_a_dry_run_bit_for_bit(kind: str, name: str) -> None:
    assert ended(kind, name, tried=True) == ended(kind, name, tried=False)


@pytest.mark.parametrize("name", [name for name in algorithms() if name not in ("FedAvg", "FedSQ")])
def test_so_is_that_of_every_algorithm(name: str) -> None:
    assert ended("own generator", name, tried=True) == ended("own generator", name, tried=False)


def test_model_and_loss_of_the_user_stay_as_they_were() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            self.seen += 1
            return nn.functional.cross_entropy(outputs, labels)

    loss, net = Remembers(), normalised()
    before = copy.deepcopy(net.state_dict())
    strategy = strategy_of(on(Y), net, loss)
    strategy.try_batches()
    assert not loss.seen and fingerprint(net.state_dict()) == fingerprint(before)
    assert [client.client.loss.seen.item() for client in strategy.models_list] == [0, 0]  # type: ignore[attr-defined]
    for client in strategy.models_list:
        assert fingerprint(client.model.state_dict()) == fingerprint(before)


def test_batches_are_tried_once() -> None:
    strategy = made("FedAvg")
    strategy.perform_round()
    strategy.training_dataloaders_with_memory[0].loader.dataset.tensors = None  # a second one could not read it
    strategy.try_batches()

"""Batches taken from loaders of many kinds: what is taken, and that the loader is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from fedsq_plugin.data.loaders import make_loader
from fedsq_plugin.data.silos import SilosData
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.reading import Reading
from fedsq_plugin.run.first_batches import shown_labels, smallest_batch, take, two_batches

X, Y = torch.arange(22.0).view(11, 2), torch.arange(11) % 3
PLAIN = TensorDataset(X, Y)


class Drawing(Dataset[Any]):
    """Draws from generators of its own, and counts how often."""

    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.old, self.count = np.random.RandomState(0), 0

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.count += 1
        noise = (
            float(torch.rand(1, generator=self.torch)) + self.numpy.random() + self.python.random() + self.old.rand()
        )
        return torch.tensor([noise + torch.rand(1).item(), self.count]), index % 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(PLAIN, 4),
    "shuffled": lambda: DataLoader(PLAIN, 4, shuffle=True),
    "own generator": lambda: DataLoader(PLAIN, 4, shuffle=True, generator=generator()),
    "own sampler": lambda: DataLoader(PLAIN, 4, sampler=RandomSampler(PLAIN, generator=generator())),
    "own batch sampler": lambda: DataLoader(
        PLAIN, batch_sampler=BatchSampler(RandomSampler(PLAIN, generator=generator()), 4, False)
    ),
    "drawing": lambda: DataLoader(Drawing(), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "ours": lambda: make_loader(PLAIN, 4, shuffle=True),
    "list": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
}


def content(loader: Any) -> list[Any]:
    torch.manual_seed(3)
    return [tensor.tolist() for batch in loader for tensor in batch]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("smallest", [False, True])
def test_a_loader_gives_afterwards_what_it_would_have_given(kind: str, smallest: bool) -> None:
    touched, drawn = LOADERS[kind](), torch.get_rng_state()
    (batch,) = take(touched, "silo 0", smallest)
    assert torch.equal(torch.get_rng_state(), drawn)
    wanted = 3 if smallest and kind not in ("stream", "list") else 4
    assert [len(part) for part in batch] == [wanted, wanted]
    assert content(touched) == content(LOADERS[kind]())


def test_workers_are_not_started() -> None:
    loader = DataLoader(PLAIN, 4, True, generator=generator(), num_workers=1, persistent_workers=True)
    assert len(take(loader, "silo 0")) == 1
    assert loader._iterator is None and torch.equal(loader.generator.get_state(), generator().get_state())


@pytest.mark.parametrize("nothing", [None, [], iter([(X, Y)]), DataLoader(TensorDataset(X[:0], Y[:0])), 3])
def test_where_there_is_no_batch_none_is_taken(nothing: Any) -> None:
    assert take(nothing, "silo 0") == []
    if isinstance(nothing, Iterator):
        assert next(nothing)  # it was left alone


def test_a_batch_of_thousands_is_cut() -> None:
    (batch,) = take(DataLoader(TensorDataset(torch.zeros(5000, 1), torch.zeros(5000)), 5000), "silo 0")
    assert len(batch[0]) == 32


def test_a_data_set_that_cannot_be_read_is_named() -> None:
    class Broken(Drawing):
        def __getitem__(self, index: int) -> Any:
            raise OSError("gone")

    with pytest.raises(ConfigError, match=r"data_args.dataset mine: silo 3 cannot be read \(OSError: gone\)"):
        take(DataLoader(Broken(), 4), "mine: silo 3")


@pytest.mark.parametrize(("size", "drop", "smallest"), [(4, False, 3), (4, True, 4), (11, False, 11), (5, False, 1)])
def test_the_smallest_batch_is_known_without_a_pass(size: int, drop: bool, smallest: int) -> None:
    assert smallest_batch(DataLoader(PLAIN, size, drop_last=drop), 11) == smallest


def test_the_smallest_batch_and_one_of_another_silo_are_taken() -> None:
    loaders = {silo: DataLoader(Subset(PLAIN, range(n)), 4) for silo, n in enumerate((8, 5, 0, 7))}
    data = SilosData(loaders, {}, {0: 8, 1: 5, 2: 0, 3: 7}, 3)
    found = two_batches(data, None, "mine")
    assert [(one.place, len(one.batch[0])) for one in found] == [("silo 1", 1), ("silo 0", 4)]
    assert [one.silo for one in two_batches(data, [2, 3], "mine")] == [3]
    assert two_batches(data, [2], "mine") == []
    data.global_test = [(X, Y)]
    assert [one.place for one in two_batches(data, [2], "mine")] == ["the test set"]


# Labels


class Shows(Dataset[Any]):
    def __init__(self, **shown: Any) -> None:
        vars(self).update(shown)

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (PLAIN, Y.tolist()),
        (Subset(PLAIN, [4, 2]), [1, 2]),
        (ConcatDataset([Subset(PLAIN, [4]), PLAIN]), [1, *Y.tolist()]),
        (Shows(targets=[5, 6, 7]), [5, 6, 7]),
        (Shows(labels=np.array([1, 2, 3])), [1, 2, 3]),
        (Subset(Subset(Shows(targets=torch.tensor([5, 6, 7])), [2, 1]), [0]), [7]),
        (Shows(labels=["cat", "dog", "cow"]), None),
        (Shows(targets=[1, 2]), None),
        (TensorDataset(X, X, Y), None),
        (Drawing(), None),
    ],
)
def test_labels_that_a_data_set_shows(dataset: Any, labels: Any) -> None:
    found = shown_labels(DataLoader(dataset, 2), Reading())
    assert (None if found is None else found.tolist()) == labels


def test_labels_of_batches_in_a_list() -> None:
    found = shown_labels([{"x": X, "y": Y}, {"x": X, "y": Y}], Reading())
    assert found is not None and found.tolist() == Y.tolist() * 2


class ByNumber:
    """Batches by their number, as Python iterated before there was __iter__."""

    def __getitem__(self, number: int) -> Any:
        return (torch.zeros(4, 2), torch.zeros(4))[:] if number < 2 else [][number]


def test_batches_by_number_are_taken() -> None:
    assert len(take(ByNumber(), "here")) == 1

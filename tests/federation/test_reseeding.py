"""Loaders with generators, samplers or workers of their own: what a silo sees depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.reseeding import generators, refuse_once, reseed
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.training import LocalTraining

from .weight import Weight, half_square

NUMBERS = TensorDataset(torch.arange(12.0))


def torch_generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


class Noisy(Dataset[Tensor]):
    """Draws from a generator that it holds."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        drawn = self.generator.standard_normal() if hasattr(self.generator, "standard_normal") else None
        return torch.tensor(float(self.generator.random() if drawn is None else drawn))


class Stream(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.generator = torch_generator()

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(6, generator=self.generator)


class Shifted:
    """A transformation with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch_generator()

    def __call__(self, batch: Any) -> Tensor:
        return torch.stack([one[0] for one in batch]) + torch.rand((), generator=self.generator)


class Wrapped:
    """A loader of a user's own, around torch's."""

    def __init__(self) -> None:
        self.inner = DataLoader(NUMBERS, 4, shuffle=True, generator=torch_generator())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


LOADERS: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(NUMBERS, 4, shuffle=True, generator=torch_generator()),
    "sampler": lambda: DataLoader(NUMBERS, 4, sampler=RandomSampler(NUMBERS, generator=torch_generator())),
    "weighted sampler": lambda: DataLoader(
        NUMBERS, 4, sampler=WeightedRandomSampler([1.0] * 12, 12, generator=torch_generator())
    ),
    "batch sampler": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS, generator=torch_generator()), 4, False)
    ),
    "iterable": lambda: DataLoader(Stream(), 3),
    "numpy": lambda: DataLoader(Noisy(np.random.default_rng(1)), 3),
    "old numpy": lambda: DataLoader(Noisy(np.random.RandomState(1)), 3),
    "python": lambda: DataLoader(Subset(Noisy(random.Random(1)), [0, 3, 5]), 3),
    "transformation": lambda: DataLoader(NUMBERS, 4, collate_fn=Shifted()),
    "wrapped": Wrapped,
    "workers": lambda: DataLoader(NUMBERS, 4, shuffle=True, num_workers=1, persistent_workers=True),
}


def passed(loader: Any) -> list[float]:
    """The numbers of a pass, in their order."""
    batches = [batch[0] if isinstance(batch, (list, tuple)) else batch for batch in loader]
    return torch.cat(batches).tolist()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pass_depends_on_the_seed_alone(kind: str) -> None:
    loader, fresh = LOADERS[kind](), LOADERS[kind]()

    def seen(one: Any, seed: int) -> list[float]:
        reseed(one, seed)
        with isolated(0):
            return passed(one)

    first = seen(loader, 1)
    passed(loader)  # whatever happens in between
    again, anew = seen(loader, 1), seen(fresh, 1)
    assert first == again == anew
    if kind != "workers":  # which draw from the global generator
        assert seen(loader, 2) != first


@pytest.mark.parametrize("kind", ["loader", "sampler"])
def test_epochs_of_one_update_differ(kind: str) -> None:
    loader = LOADERS[kind]()
    reseed(loader, 1)
    assert passed(loader) != passed(loader)


def test_generators_of_one_loader_have_seeds_of_their_own() -> None:
    one, other = torch_generator(), torch_generator()
    reseed(DataLoader(NUMBERS, sampler=RandomSampler(NUMBERS, generator=one), generator=other), 1)
    assert one.initial_seed() != other.initial_seed()


def test_generators_are_found_without_a_change() -> None:
    """Behind every attribute only where it is asked for."""

    class Holds:
        def __init__(self) -> None:
            self.generator = torch_generator()

    loader = DataLoader(NUMBERS, 4, generator=torch_generator(), num_workers=1, persistent_workers=True)
    iter(loader)
    kept, held = loader._iterator, Holds()
    samples = TensorDataset(torch.arange(2.0))
    vars(loader)["dataset"] = samples
    vars(samples)["held"] = held
    assert [*generators(loader)] == [loader.generator]
    assert [*generators(loader, everything=True)] == [held.generator, loader.generator]
    assert kept is not None and loader._iterator is kept


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    reseed(DataLoader(NUMBERS, shuffle=True, generator=torch.default_generator), 1)
    assert torch.equal(torch.get_rng_state(), expected)


def test_nothing_is_passed_while_it_is_reseeded() -> None:
    class Passed(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    class Holds:
        def __init__(self) -> None:
            self.parts = [Passed([1]), {"a": Passed([2])}]

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    for loader in (Passed([torch_generator()]), Holds()):
        reseed(loader, 1)


def test_local_update_sees_the_same_order_after_other_passes() -> None:
    def trained(passes: int) -> float:
        pairs = TensorDataset(torch.linspace(0.5, 2, 8).double(), torch.ones(8).double())
        loader = DataLoader(pairs, 1, shuffle=True, generator=torch_generator())
        for _ in range(passes):
            list(loader)
        model = Weight()
        phase = Phase(1, frozenset(Role))
        local_update(model, loader, LocalTraining(), [phase], roles(model), round=0, seed=4, loss=half_square)
        return model.w.item()

    assert trained(0) == trained(3)


def test_without_a_seed_the_loader_is_as_the_host_has_it() -> None:
    generator = torch_generator()
    loader = DataLoader(
        TensorDataset(torch.ones(4).double(), torch.ones(4).double()), shuffle=True, generator=generator
    )
    expected = passed(DataLoader(NUMBERS, shuffle=True, generator=torch_generator()))
    model = Weight()
    nothing = [Phase(0, frozenset(Role))]
    local_update(model, loader, LocalTraining(), nothing, roles(model), round=0, seed=None, loss=half_square)
    assert passed(DataLoader(NUMBERS, shuffle=True, generator=generator)) == expected


@pytest.mark.parametrize("once", [(one for one in [1]), map(int, "1"), zip([1], [2], strict=True), iter([1])])
def test_what_can_be_passed_only_once_is_refused_by_silo(once: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^silo 3: the training data are a \w+, an iterator that can be passed only once"
    ):
        refuse_once(once, 3)


@pytest.mark.parametrize("again", [[], (), DataLoader(NUMBERS), range(3)])
def test_what_begins_anew_is_taken(again: Any) -> None:
    refuse_once(again)

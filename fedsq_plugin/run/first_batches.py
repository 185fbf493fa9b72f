"""A few batches of loaders, taken so that the loaders stay as they were; and the labels that data sets show."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from ..data.silos import SilosData
from ..errors import ConfigError, FedSQError, in_one_line
from ..federation.reading import Reading
from ..federation.seeding import isolated

MOST = 32
"""Samples of a batch that are taken; `batch_size: -1` can mean thousands."""
T = TypeVar("T")


class Taken(NamedTuple):
    """A batch as it came. `silo` is None where it is of no single silo."""

    place: str
    silo: int | None
    batch: Any


def two_batches(data: SilosData, silos: Sequence[int] | None, name: str) -> list[Taken]:
    """At most two batches: the smallest one of these silos, and one of another silo. Where no silo has data in this
    process, one of the test set, or of all silos' data.

    Args:
        silos: those that this process serves; None: all.
        name: of the data set, for errors.

    Raises:
        ConfigError: a data set cannot be read.
    """
    there = [silo for silo in (data.train if silos is None else silos) if _has_data(data, silo)]
    found = []
    if there:
        sizes = {silo: smallest_batch(data.train[silo], data.sizes.get(silo)) for silo in there}
        first = min(there, key=lambda silo: (sizes[silo], silo))
        others = [silo for silo in there if silo != first]
        for silo, smallest in ((first, True), *((silo, False) for silo in others[:1])):
            place = f"silo {silo}"
            found += [Taken(place, silo, one) for one in take(data.train[silo], f"{name}: {place}", smallest)]
    for place, loader in (("the test set", data.global_test), ("the training data", data.global_train)):
        if not found:
            found += [Taken(place, None, one) for one in take(loader, f"{name}: {place}")]
    return found


def _has_data(data: SilosData, silo: int) -> bool:
    return data.train.get(silo) is not None and bool(data.sizes.get(silo))


def smallest_batch(loader: Any, samples: int | None) -> int:
    """The number of samples of a loader's smallest batch, as far as it is known without a pass."""
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "batch_sampler", None)
    with contextlib.suppress(Exception):  # a sampler of others need not have a length
        if sampler is not None and size is None:
            return min((len(one) for one in _shallow(sampler) if len(one)), default=0)
        if isinstance(size, int) and not getattr(loader, "drop_last", False):
            return len(loader.sampler) % size or size
    return size if isinstance(size, int) else samples or 0


def take(loader: Any, place: str, smallest: bool = False) -> list[Any]:
    """The first batch of a loader, or its smallest, of at most `MOST` samples, in a list; empty where there is none.

    Nothing is changed: global generators and those that the loader has of its own are put back, and workers are not
    started where the batch can be made without them.

    Raises:
        ConfigError: the data cannot be read.
    """
    if not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")) or isinstance(loader, Iterator):
        return []
    try:
        with isolated(0), _kept(loader):
            return _take(loader, smallest)
    except FedSQError:
        raise
    except Exception as error:  # whatever a data set of others raises
        raise ConfigError(f"data_args.dataset {place} cannot be read ({in_one_line(error)})") from error


def _take(loader: Any, smallest: bool) -> list[Any]:
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or sampler is None or isinstance(loader.dataset, IterableDataset):
        return [*_first(iter(loader))]
    batches = (list(one) for one in _shallow(sampler))
    chosen = min(filter(None, batches), key=len, default=None) if smallest else next(filter(None, batches), None)
    if chosen is None:
        return []
    return [batch_of(loader, chosen[:MOST])]


def batch_of(loader: Any, indices: Sequence[int]) -> Any:
    """The batch that a loader would make of these samples."""
    samples = _shallow(loader.dataset)
    if hasattr(samples, "__getitems__"):
        return loader.collate_fn(samples.__getitems__(list(indices)))
    return loader.collate_fn([samples[index] for index in indices])


def _first(batches: Iterator[T]) -> Iterator[T]:
    for batch in batches:
        yield batch
        return


def _shallow(thing: T) -> T:
    """A copy whose attributes can be set without a trace; the thing itself where it cannot be copied."""
    try:
        copied = copy.copy(thing)
        if hasattr(copied, "sampler"):
            copied.sampler = copy.copy(copied.sampler)
    except Exception:  # a class of others may refuse
        return thing
    return copied


@contextlib.contextmanager
def _kept(loader: Any) -> Iterator[None]:
    """Put back the states of the generators that a loader, its samplers and its data set have of their own."""
    before = [(one, _state(one)) for one in generators(loader)]
    try:
        yield
    finally:
        for one, state in before:
            _put_back(one, state)


def generators(thing: Any, depth: int = 4, seen: set[int] | None = None) -> Iterator[Any]:
    """The random generators in the attributes of a thing."""
    seen = set() if seen is None else seen
    if id(thing) in seen or not depth:
        return
    seen.add(id(thing))
    if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        yield thing
    elif isinstance(thing, (list, tuple)) and len(thing) <= MOST:
        for part in thing:
            yield from generators(part, depth - 1, seen)
    elif not isinstance(thing, (Tensor, type)):
        for part in list(getattr(thing, "__dict__", {}).values()):
            yield from generators(part, depth - 1, seen)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def shown_labels(loader: Any, reading: Reading) -> Tensor | None:
    """The labels of all of a loader's samples in order, where its data set shows them without reading a sample."""
    if isinstance(loader, (list, tuple)):
        found = [reading.read(batch).labels for batch in loader]
        return torch.cat(found) if found and all(one.dim() for one in found) else None
    with contextlib.suppress(Exception):  # what a class of others calls `targets` may be anything
        return _labels_of(getattr(loader, "dataset", None))
    return None


def _labels_of(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        whole = _labels_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels_of(one) for one in dataset.datasets]
        return None if any(one is None for one in parts) else torch.cat([one for one in parts if one is not None])
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    for name in ("targets", "labels"):
        shown = getattr(dataset, name, None)
        if isinstance(shown, (Tensor, np.ndarray, list)) and len(shown) == len(dataset) and len(shown):
            return torch.as_tensor(shown)
    return None


def loaders_of(data: SilosData, silos: Sequence[int] | None) -> Iterator[tuple[str, Any]]:
    """Every loader that this process may pass, with its place."""
    for what, loaders in (("", data.train), ("the test data of ", data.test)):
        for silo, loader in loaders.items() if isinstance(loaders, Mapping) else ():
            if silos is None or silo in silos:
                yield f"{what}silo {silo}", loader
    yield "the test set", data.global_test

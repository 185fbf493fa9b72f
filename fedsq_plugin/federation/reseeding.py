"""Loaders that draw from generators of their own, keep workers, or can be passed only once.

A silo's data must come in the same order whatever happened before, in other rounds, at other silos or in a run that was
cut off. What is drawn from the global generators is seeded by `seeding.isolated`; here is what a loader has of its own.
What cannot be seen stays the user's: a generator in a closure or behind an object without attributes, and a sampler
that counts its own passes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import ConfigError
from .seeding import derive

_DEPTH = 6
"""A generator lies behind so many attributes at most: a loader's batch sampler's sampler, a data set in subsets."""
_LISTED = 64
"""Longer lists hold samples, not the parts of a loader."""
_GLOBAL = (torch.default_generator, getattr(np.random.mtrand, "_rand", None), getattr(random, "_inst", None))
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_WALKED = (*_GENERATORS, DataLoader, Sampler, Dataset, list, tuple, dict)
"""What is looked into beside the attributes of a loader, and what can be called, as a transformation: a data set may
hold on to anything else."""
_PLAIN = frozenset({str, bytes, int, float, bool, type(None), type, FunctionType, Tensor, np.ndarray})


def reseed(loader: Any, seed: int) -> None:
    """Seed every generator that a loader, its samplers, its data set and their parts hold as attributes, each from
    `seed` and its place in their order; and end workers that were kept from an earlier pass."""
    parts = [*_walk(loader, _DEPTH, set(), everything=False)]
    for one in parts:
        if isinstance(one, DataLoader):
            # Workers that go on have drawn their seed in an earlier pass, and hold their own copy of the data set.
            one._iterator = None
    for number, found in enumerate(one for one in parts if isinstance(one, _GENERATORS)):
        own = derive("generator", seed, number)
        if isinstance(found, torch.Generator):
            found.manual_seed(own)
        elif isinstance(found, np.random.Generator):
            found.bit_generator.state = type(found.bit_generator)(own).state
        else:
            found.seed(own)


def refuse_once(batches: Any, silo: int | None = None) -> None:
    """Raise ConfigError for batches that can be passed only once, as a generator's: a second epoch would find none."""
    if isinstance(batches, Iterator):
        where = "" if silo is None else f"silo {silo}: "
        raise ConfigError(
            f"{where}the training data are a {type(batches).__name__}, an iterator that can be passed only once: give "
            "a loader or a list, which begins anew in every epoch"
        )


def generators(loader: Any, everything: bool = False) -> Iterator[Any]:
    """The random generators that a loader has of its own, in the order of the attributes. Nothing is changed.

    Args:
        everything: look behind every attribute. What is found so may be somebody else's: it may be put back, and not be
            seeded.
    """
    for one in _walk(loader, _DEPTH, set(), everything):
        if isinstance(one, _GENERATORS):
            yield one


def _walk(thing: Any, depth: int, seen: set[int], everything: bool) -> Iterator[Any]:
    """The generators and torch's loaders in a thing, in the order of the attributes."""
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, _GENERATORS):
        if not any(thing is one for one in _GLOBAL):
            yield thing
        return
    is_loader = isinstance(thing, DataLoader)
    if is_loader:
        yield thing
    parts = thing
    if type(thing) is dict:
        parts = thing.values()
    elif type(thing) not in (list, tuple):  # a subclass of these may be a loader, which is not to be passed here
        # What is in the iterator of a pass is the loader's own.
        parts = [part for key, part in getattr(thing, "__dict__", {}).items() if not (is_loader and key == "_iterator")]
    if len(parts) > _LISTED:
        return
    for part in list(parts):
        if type(part) in _PLAIN or isinstance(part, (type, ModuleType)):
            continue
        if everything or is_loader or isinstance(part, _WALKED) or callable(part):
            yield from _walk(part, depth - 1, seen, everything)

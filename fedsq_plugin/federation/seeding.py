"""Seeds: one for each purpose, derived from the recipe's, so that the order of silos changes nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*keys: int | str) -> int:
    """A seed in [0, 2**32) that depends on all keys and their order, the same on every machine."""
    text = "/".join(f"{'str' if isinstance(key, str) else 'int'}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed python's, numpy's and torch's global generators, and put their states back afterwards.

    Third-party code (data loaders, transforms, dropout) draws from the global generators. Within this block its draws
    depend on `seed` alone, and nothing outside depends on the block.
    """
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Reading the states initialises all GPUs, so a process that used none leaves them alone.
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def sample_clients(total: int, per_round: int, round: int, seed: int) -> list[int]:
    """The silos of a round, ascending: all of them, or `per_round` drawn without replacement."""
    if per_round >= total:
        return list(range(total))
    generator = np.random.default_rng(derive("clients", seed, round))
    return sorted(int(client) for client in generator.choice(total, per_round, replace=False))

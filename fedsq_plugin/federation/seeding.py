"""Seeds: one for each purpose, derived from the recipe's, so that the order of silos changes nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from .options import Options, option, runs_rounds


def hosts_own_data(dataset: str, data_of: str) -> str | None:
    """An idle rule for what the plugin's own data sets alone read."""
    return f"{dataset} is {data_of} own data set" if data_of else None


class Seeds(Options):
    """The seeds of a run."""

    random_seed: int = option(0, "common_args", "seed of everything that has no seed of its own", agree=True, ge=0)
    data_seed: int | None = option(
        None, "fedsq_args", "seed of splits and partition", agree=True, idle=hosts_own_data, ge=0
    )
    model_seed: int | None = option(
        None,
        "fedsq_args",
        "seed of initial weights and warm start",
        differs="silos begin with the server's weights",
        ge=0,
    )
    sampling_seed: int | None = option(
        None, "fedsq_args", "seed of the choice of silos per round", agree=True, idle=runs_rounds, ge=0
    )

    def seed(self, purpose: Literal["data", "model", "sampling"]) -> int:
        """The seed for a purpose: its own, or `random_seed`."""
        own: int | None = getattr(self, f"{purpose}_seed")
        return self.random_seed if own is None else own


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

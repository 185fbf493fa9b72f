"""The states of the random generators around a forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = tuple[Any, Any, Any, dict[torch.device, Any]]


def get_states(devices: Iterable[torch.device]) -> States:
    """Return the states of the global generators of Python, numpy and torch."""
    on_devices = {device: torch.cuda.get_rng_state(device) for device in devices}
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def set_states(states: States) -> None:
    """Set what `get_states` returned."""
    python, numpy, cpu, on_devices = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, state in on_devices.items():
        torch.cuda.set_rng_state(state, device)


def _as_value(states: States) -> object:
    """Return the states of Python and numpy as a value that can be compared."""
    return states[0], states[1][1].tobytes(), states[1][2:]  # numpy's second entry is its array of words


@contextmanager
def keep_random_states(devices: Iterable[torch.device], seed: int | None) -> Iterator[Callable[[], object]]:
    """Restore the global random generators afterwards. Give a function that returns the final states of Python's
    and numpy's, or None if they did not move.

    Args:
        seed: where the generators start; None: where they are.
    """
    before = get_states(devices)
    final: list[object] = [None]
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
    start = _as_value(get_states(()))
    try:
        yield lambda: final[0]
    finally:
        end = _as_value(get_states(()))
        final[0] = None if end == start else end
        set_states(before)

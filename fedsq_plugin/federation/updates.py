"""What a client sends after its local update, and the reasons to refuse it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .roles import check_finite


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round. `samples` is its weight in the mean."""

    client: int
    samples: float
    state: Mapping[str, Tensor]


def problem(update: Update, template: Mapping[str, Tensor]) -> str | None:
    """Why `update` must not reach the average, in a few words; None when it may.

    `template` is the server's state: same keys, shapes and dtypes are expected, and finite values.
    """
    if not 0 < update.samples < float("inf"):
        return f"its sample count is {update.samples}"
    missing, unknown = template.keys() - update.state.keys(), update.state.keys() - template.keys()
    if missing or unknown:
        which = "lacks" if missing else "has the unknown key"
        return f"it {which} {sorted(missing or unknown)[0]}"
    for key, expected in template.items():
        value = update.state[key]
        if value.shape != expected.shape:
            return f"{key} has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
        if value.dtype != expected.dtype:
            return f"{key} is {value.dtype} instead of {expected.dtype}"
        if value.is_floating_point() and not check_finite(value):
            return f"{key} has NaN or infinite values"
    return None

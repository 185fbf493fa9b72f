"""Why an update, or a count, or a test result that a silo sent is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .evaluate import Metrics
from .messages import Update
from .state import no_less_finite

MAX_SAMPLES = 10**9
"""The largest sample count of one silo. A larger one would make that silo the whole mean."""


def problem(update: Update, template: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None) -> str | None:
    """Why an update must not reach the mean, in a few words; None when it may.

    Args:
        template: a state with the keys, shapes and dtypes that the update's state must have: what the silo was sent.
        sums: the same for its sums.

    An entry may be infinite or NaN only where the template's entry is the same.
    """
    if not 0 < update.samples <= MAX_SAMPLES:
        return f"its sample count is {update.samples}"
    return _misfit(update.state, template) or _misfit(update.sums, sums or {})


def counts_problem(counts: Any, silos: Collection[int], before: Mapping[int, int] | None = None) -> str | None:
    """Why these are not the sample counts of `silos`. A count may be 0, but may not differ from the one that the silo
    announced `before`."""
    if not isinstance(counts, dict):
        return "it sent no sample counts"
    if counts.keys() != set(silos):
        said, wanted = (", ".join(map(brief, list(one)[:10])) or "none" for one in (counts, silos))
        return f"it announced the silos {said} instead of {wanted}"
    for silo, count in counts.items():
        if not _is_count(count):
            return f"silo {silo} has the sample count {brief(count)}"
        if before and before.get(silo, count) != count:
            return f"silo {silo} has {count} samples, and had {before[silo]} before"
    return None


def changed_count(samples: Any, announced: int) -> str | None:
    """Why the sample count of an update is not the one that the silo announced."""
    if _is_count(samples) and samples == announced:
        return None
    return f"its sample count is {brief(samples)}, and it announced {announced}"


def metrics_problem(metrics: Any, lowest: float = 0.0) -> str | None:
    """Why this cannot be the result of a silo's test: loss, accuracy from `lowest` to 1, sample count. The loss of a
    model that diverged is infinite or NaN; without a sample, loss and accuracy are NaN."""
    if not isinstance(metrics, (list, tuple)) or len(metrics) != 3:
        return "it is no loss, accuracy and sample count"
    loss, accuracy, samples = metrics
    if not _is_count(samples):
        return f"its sample count is {brief(samples)}"
    if not isinstance(loss, float):
        return f"its loss is {brief(loss)}"
    # A metric may have no value at a silo, as one that needs two classes.
    if not isinstance(accuracy, float) or not (lowest <= accuracy <= 1 or math.isnan(accuracy)):
        return f"its accuracy is {brief(accuracy)}"
    return None


def metrics_of(value: Any) -> Metrics:
    """Metrics from a value that `metrics_problem` accepts."""
    loss, accuracy, samples = value
    return Metrics(loss, accuracy, samples)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SAMPLES


def brief(value: Any, most: int = 80) -> str:
    """A value that another process sent, made short and printable for a line."""
    if isinstance(value, (int, float, str)) or value is None:
        words = " ".join(str(value)[: 2 * most].split())
        return "".join(letter if letter.isprintable() else "?" for letter in words)[:most]
    return f"a {type(value).__name__}"


def _misfit(state: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> str | None:
    missing, unknown = template.keys() - state.keys(), state.keys() - template.keys()
    if missing or unknown:
        which = "lacks" if missing else "has the unknown key"
        return f"it {which} {brief(sorted(missing or unknown)[0], 200)}"
    for key, expected in template.items():
        value = state[key]
        if value.shape != expected.shape:
            return f"{key} has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
        if value.dtype != expected.dtype:
            return f"{key} is {value.dtype} instead of {expected.dtype}"
        if not no_less_finite(value, expected):
            return f"{key} has NaN or infinite values"
    return None

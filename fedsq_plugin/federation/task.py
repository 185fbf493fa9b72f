"""The task of a data set: the loss that is trained, and the metric of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import Reading

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (N, …), targets (N, …)) -> mean loss of the batch."""
Batches = Iterable[Any]
"""The batches of a data set, anew in every pass, in a form that `Reading` takes apart."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.long())


class Metric(Protocol):
    """A metric of a model's outputs on a data set, in [0, 1]; higher is better. NaN where it is undefined."""

    @property
    def name(self) -> str:
        """Its name in tables and logs."""

    def size(self, targets: Tensor) -> int:
        """The weight of a batch in means over batches and over silos."""

    def of_batch(self, outputs: Tensor, targets: Tensor) -> Any:
        """What is kept of a batch to compute the metric at the end."""

    def of_all(self, kept: Sequence[Any], sizes: Sequence[int]) -> float:
        """The metric, from what was kept of all batches, of which there is at least one."""


class Accuracy:
    """The share of labels (N, …) at which the logits (N, classes, …) are largest."""

    name = "accuracy"

    def size(self, targets: Tensor) -> int:
        return targets.numel()

    def of_batch(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).sum()

    def of_all(self, kept: Sequence[Tensor], sizes: Sequence[int]) -> float:
        # Once for all batches: reading a number waits for the GPU.
        return int(torch.stack(list(kept)).sum()) / sum(sizes)


@dataclass(frozen=True)
class _OfFunction:
    name: str
    function: Callable[[Any, Any], Any]
    """(targets, outputs) -> the metric."""

    def size(self, targets: Tensor) -> int:
        return len(targets)


class OfPredictions(_OfFunction):
    """A function of all predictions of a data set together, as arrays, such as AUC or the concordance index."""

    def of_batch(self, outputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
        return targets.cpu().numpy(), outputs.float().cpu().numpy()

    def of_all(self, kept: Sequence[tuple[Any, Any]], sizes: Sequence[int]) -> float:
        targets, outputs = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        if not np.isfinite(outputs).all():
            return float("nan")  # scikit-learn and lifelines raise, on a run that has diverged
        try:
            return float(self.function(targets, outputs))
        except ZeroDivisionError:  # no two samples that could be compared
            return float("nan")


class MeanOverBatches(_OfFunction):
    """The plain mean of a function over batches, as tensors. Predictions, which may be large volumes, are not kept."""

    def of_batch(self, outputs: Tensor, targets: Tensor) -> float:
        return float(self.function(targets.cpu(), outputs.float().cpu()))

    def of_all(self, kept: Sequence[float], sizes: Sequence[int]) -> float:
        return float(np.mean(kept))


class Task(NamedTuple):
    """The task of one data set, by default a classification, and how its batches and the model's outputs are read."""

    loss: Loss = cross_entropy
    metric: Metric = Accuracy()
    reading: Reading = Reading()


CLASSIFICATION = Task()

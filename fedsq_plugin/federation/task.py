"""The task of a data set: the loss that is trained, and the metric of the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import first_line
from .reading import DataError, Reading, describe

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (N, …), targets (N, …)) -> mean loss of the batch."""
Batches = Iterable[Any]
"""The batches of a data set, anew in every pass, in a form that `Reading` takes apart."""


class LabelError(DataError):
    """Labels do not fit the model's outputs, or the task."""


def is_dense(outputs: Tensor, labels: Tensor) -> bool:
    """Whether labels have a value for every one of several outputs."""
    return labels.dim() == outputs.dim() > 1 and labels.shape[1:] == outputs.shape[1:] and outputs.shape[1] > 1


def is_of_outputs_shape(outputs: Tensor, labels: Tensor) -> bool:
    """Whether there is a label for every output; one column may be left out on either side."""
    return _squeezed(outputs) == _squeezed(labels)


def _squeezed(values: Tensor) -> tuple[int, ...]:
    """The shape of a sample, without a column that is the only one."""
    shape = tuple(values.shape[1:])
    return shape[1:] if shape[:1] == (1,) else shape


def without_column(outputs: Tensor, labels: Tensor) -> Tensor:
    """Class numbers (N, …) of labels that may be a column of them, (N, 1, …)."""
    column = labels.dim() == outputs.dim() and labels.shape[1] == 1
    return labels.squeeze(1) if column else labels


def counts(labels: Tensor, ignored: int) -> Tensor:
    """Which labels count: those that are not `ignored`."""
    # In a small integer type, as that of masks, the label -100 would be 156.
    return (labels if labels.is_floating_point() else labels.long()) != ignored


def _refuse_shapes(outputs: Tensor, labels: Tensor, error: Exception) -> LabelError:
    line = f"the labels of a batch are {describe(labels)} beside outputs {describe(outputs)}"
    return LabelError(f"{line} ({first_line(error)})")


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of logits (N, classes, …) over labels (N, …), over a column (N, 1, …) of them, or over
    class probabilities of the logits' shape, as torch computes it. The label `ignored` counts nowhere: of such labels
    alone, the loss is 0 and has no gradient."""

    ignored: int = -100

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if is_dense(logits, labels):
            return F.cross_entropy(logits, labels.to(logits.dtype))
        labels = without_column(logits, labels).long()
        try:
            if not labels.numel():
                return F.cross_entropy(logits, labels)
            if not labels.is_cuda:
                if labels.flatten()[0] == self.ignored and bool((labels == self.ignored).all()):
                    return (logits * 0).sum()
                return F.cross_entropy(logits, labels, ignore_index=self.ignored)
            # Without a wait for the GPU: another label stands in, and its loss is multiplied by 0.
            nothing = (labels == self.ignored).all()
            labels = labels.masked_fill(nothing, int(self.ignored == 0))
            return F.cross_entropy(logits, labels, ignore_index=self.ignored) * ~nothing
        except (IndexError, ValueError) as error:
            raise _refuse_shapes(logits, labels, error) from None
        except RuntimeError as error:
            if labels.shape == logits.shape[:1] + logits.shape[2:]:
                raise
            raise _refuse_shapes(logits, labels, error) from None


cross_entropy = CrossEntropy()


def _matched(outputs: Tensor, labels: Tensor) -> Tensor:
    """Labels in the outputs' shape and dtype; never broadcast."""
    if len(labels) != len(outputs) or not is_of_outputs_shape(outputs, labels):
        raise LabelError(f"the labels of a batch are {describe(labels)} beside outputs {describe(outputs)}")
    return labels.reshape(outputs.shape).to(outputs.dtype)


@dataclass(frozen=True)
class MultiLabel:
    """The mean binary cross-entropy of logits over labels 0 and 1 of their shape. The label `ignored` counts
    nowhere."""

    ignored: int = -100

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = _matched(logits, labels)
        counted = counts(labels, self.ignored)
        each = F.binary_cross_entropy_with_logits(logits, labels * counted, reduction="none") * counted
        return each.sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class SquaredError:
    """The mean squared error over all values."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, _matched(outputs, labels))


class Metric(Protocol):
    """A metric of a model's outputs on a data set; 1 is the best. NaN where it is undefined."""

    @property
    def name(self) -> str:
        """Its name in tables and logs."""

    @property
    def lowest(self) -> float:
        """Its smallest value; it may be minus infinity."""

    def size(self, targets: Tensor) -> int:
        """The weight of a batch in means over batches and over silos."""

    def of_batch(self, outputs: Tensor, targets: Tensor) -> Any:
        """What is kept of a batch to compute the metric at the end."""

    def of_all(self, kept: Sequence[Any], sizes: Sequence[int]) -> float:
        """The metric, from what was kept of all batches, of which there is at least one."""


@dataclass(frozen=True)
class Accuracy:
    """The share of labels (N, …) at which the logits (N, classes, …) are largest. The label `ignored` counts
    nowhere."""

    ignored: int = -100
    dense: bool = False
    """Whether labels are probabilities of the logits' shape: then the largest one is the label."""
    name: ClassVar[str] = "accuracy"
    lowest: ClassVar[float] = 0.0

    def size(self, targets: Tensor) -> int:
        if self.dense:
            return targets.numel() // max(targets.shape[1], 1)
        return int(counts(targets, self.ignored).sum())

    def of_batch(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.dense:
            numbers = targets.int() if targets.dtype == torch.bool else targets  # torch finds no largest truth value
            return (outputs.argmax(1) == numbers.argmax(1)).sum()
        labels = without_column(outputs, targets)
        return ((outputs.argmax(1) == labels) & counts(labels, self.ignored)).sum()

    def of_all(self, kept: Sequence[Tensor], sizes: Sequence[int]) -> float:
        # Once for all batches: reading a number waits for the GPU.
        return int(torch.stack(list(kept)).sum()) / sum(sizes)


@dataclass(frozen=True)
class RightDecisions:
    """The share of labels 0 and 1 on whose side of 0 the logit is. The label `ignored` counts nowhere."""

    ignored: int = -100
    name: ClassVar[str] = "right decisions"
    lowest: ClassVar[float] = 0.0

    def size(self, targets: Tensor) -> int:
        return int(counts(targets, self.ignored).sum())

    def of_batch(self, outputs: Tensor, targets: Tensor) -> Tensor:
        labels = targets.reshape(outputs.shape)
        return (((outputs > 0) == (labels > 0.5)) & counts(labels, self.ignored)).sum()

    def of_all(self, kept: Sequence[Tensor], sizes: Sequence[int]) -> float:
        return int(torch.stack(list(kept)).sum()) / sum(sizes)


@dataclass(frozen=True)
class R2:
    """The coefficient of determination: 1 - the sum of squared errors / that of the targets around their means, which
    are taken per output. It is 0 for the means, and may be negative. NaN where the targets do not vary."""

    name: ClassVar[str] = "R2"
    lowest: ClassVar[float] = -math.inf

    def size(self, targets: Tensor) -> int:
        return len(targets)

    def of_batch(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        targets = targets.reshape(outputs.shape).double()
        errors = (outputs.double() - targets).square().sum()
        return errors, targets.flatten(1) if targets.dim() > 1 else targets[:, None]

    def of_all(self, kept: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> float:
        errors = torch.stack([one for one, _ in kept]).sum()
        targets = torch.cat([targets for _, targets in kept])
        around = (targets - targets.mean(0)).square().sum()
        return float(1 - errors / around) if around > 0 else math.nan


@dataclass(frozen=True)
class _OfFunction:
    name: str
    function: Callable[[Any, Any], Any]
    """(targets, outputs) -> the metric."""
    lowest: ClassVar[float] = 0.0

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

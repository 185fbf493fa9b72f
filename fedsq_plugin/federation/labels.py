"""The task of a data set, told from its labels beside the model's outputs; and the labels that do not fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import Word
from .options import option, runs_rounds
from .reading import ReadingOptions, columns, describe
from .task import (
    R2,
    Accuracy,
    CrossEntropy,
    LabelError,
    MultiLabel,
    RightDecisions,
    SquaredError,
    Task,
    counts,
    is_dense,
    is_of_outputs_shape,
    without_column,
)

Kind = Literal["classification", "multi_label", "regression"]
SUM = 1e-3
"""How far a row of class probabilities may be from a sum of 1: labels may be in half precision."""


def _own_task(dataset: str, centres: bool) -> str | None:
    return f"{dataset} has FLamby's own loss and metric" if centres else None


class TaskOptions(ReadingOptions):
    """What labels mean."""

    task: Literal["auto", "classification", "multi_label", "regression"] = option(
        "auto",
        "fedsq_args",
        "loss and metric: cross-entropy and accuracy; binary cross-entropy and the share of right decisions; squared "
        "error and R²; auto: told from labels and outputs before the first round",
        agree=True,
        idle=(runs_rounds, _own_task),
    )
    ignore_index: int = option(
        -100,
        "fedsq_args",
        "the label that counts nowhere, neither in loss nor in metric",
        agree=True,
        idle=(runs_rounds, _own_task),
    )


def tell(outputs: Tensor, labels: Tensor, asked: str, ignored: int, others: Sequence[Tensor] = ()) -> tuple[Kind, Task]:
    """The task that labels are for.

    Args:
        outputs: the model's prediction for a batch (N, …).
        labels: of the same batch.
        asked: the option `task`.
        ignored: the option `ignore_index`.
        others: more labels of the same data. They help where a batch has only some of the values.

    Raises:
        LabelError: no task fits, or several do.
    """
    if labels.is_complex():
        raise LabelError(f"the labels are {describe(labels)}, which no task takes")
    refuse_other_length(outputs, labels)
    every = torch.cat([labels, *(one.to(labels.dtype) for one in others if one.shape[1:] == labels.shape[1:])])
    kind: Kind = _told(outputs, labels, every, ignored) if asked == "auto" else asked  # type: ignore[assignment]
    dense = kind == "classification" and is_dense(outputs, labels)
    task = {
        "classification": lambda: Task(CrossEntropy(ignored), Accuracy(ignored, dense)),
        "multi_label": lambda: Task(MultiLabel(ignored), RightDecisions(ignored)),
        "regression": lambda: Task(SquaredError(), R2()),
    }[kind]()
    if (line := misfit(kind, outputs, labels, ignored)) is not None:
        raise line
    return kind, task


def refuse_other_length(outputs: Tensor, labels: Tensor) -> None:
    """Raise LabelError where a batch has not a label for every output of the model."""
    if not labels.dim():
        raise LabelError(
            f"the labels are {describe(labels)}, which no task takes: a batch has a label for every sample (N, …); a "
            "data set alone, or a loader without a batch_size, gives samples and no batches"
        )
    if not outputs.dim() or len(labels) != len(outputs):
        raise LabelError(
            f"a batch has labels {describe(labels)} beside outputs {describe(outputs)}: they are not as many"
        )


def _told(outputs: Tensor, labels: Tensor, every: Tensor, ignored: int) -> Kind:
    width = columns(outputs)
    if not is_of_outputs_shape(outputs, labels):
        return "classification"  # or nothing that fits, as `misfit` says
    counted = every[counts(every, ignored)]
    binary = bool(((counted == 0) | (counted == 1)).all())
    real = every.is_floating_point()
    if width > 1 and is_dense(outputs, labels):
        if _are_probabilities(every):
            return "classification"
        if binary:
            return "multi_label"
    if real and not binary:
        return "regression"
    if width == 1 and binary:
        raise LabelError(
            "the labels are 0 and 1 beside one output, which may be a decision or a value: set ", Word("task"),
            " to multi_label or regression",
        )  # fmt: skip
    if width == 1:
        raise LabelError(
            f"the label {_shown(counted.max())}, and the model has one output: give it one for every class, or set ",
            Word("task"), ": regression",
        )  # fmt: skip
    raise LabelError(
        f"the labels are whole numbers ({_shown(counted.min())} to {_shown(counted.max())}), one for each of {width} "
        "outputs, which fit several tasks: set ", Word("task"),
    )  # fmt: skip


def misfit(kind: Kind, outputs: Tensor, labels: Tensor, ignored: int) -> LabelError | None:
    """Why labels do not fit a task beside the model's outputs, which may be of other samples; None where they do."""
    width = columns(outputs)
    if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
        return LabelError("the labels have NaN or infinite values: leave these samples out")
    if kind == "classification":
        return _no_classes(outputs, labels, width, ignored)
    if not is_of_outputs_shape(outputs, labels):
        return LabelError(
            f"the labels of a batch are {describe(labels)} beside outputs {describe(outputs)}: a {kind} needs a label "
            "for every output"
        )
    if kind == "multi_label":
        counted = labels[counts(labels, ignored)]
        if not bool(((counted >= 0) & (counted <= 1)).all()):
            wrong = counted[(counted < 0) | (counted > 1)][0]
            return _outside(wrong, "decisions are 0 or 1", Word("ignore_index"), f": {_shown(wrong)}")
    return None


def _no_classes(outputs: Tensor, labels: Tensor, width: int, ignored: int) -> LabelError | None:
    if width == 1:
        return LabelError(
            "the model has one output, which tells no classes apart: give it one for every class, or set ",
            Word("task"), ": multi_label or regression",
        )  # fmt: skip
    if is_dense(outputs, labels):
        if _are_probabilities(labels):
            return None
        return LabelError(
            f"the labels of a batch are {describe(labels)} whose rows are no class probabilities: they do not sum to "
            "1; set ", Word("task"), ": multi_label or regression",
        )  # fmt: skip
    numbers = without_column(outputs, labels)
    if numbers.dim() != outputs.dim() - 1 or numbers.shape[1:] != outputs.shape[2:]:
        return LabelError(
            f"the labels of a batch are {describe(labels)} beside outputs {describe(outputs)}, which fits no task: "
            f"class numbers (N, …) beside outputs (N, classes, …), or a label for every output"
        )
    if numbers.is_floating_point() and not torch.equal(numbers, numbers.round()):
        value = numbers[numbers != numbers.round()][0]
        return LabelError(
            f"the label {_shown(value)} is no class number, and the model has {width} outputs: for real values give "
            "it one output for every value, and set ", Word("task"), ": regression",
        )  # fmt: skip
    outside = ((numbers < 0) | (numbers >= width)) & counts(numbers, ignored)
    if bool(outside.any()):
        wrong = numbers[outside][0]
        return _outside(wrong, f"the model has {width} outputs, for labels 0 to {width - 1}",
                        Word("ignore_index"), f": {_shown(wrong)}")  # fmt: skip
    return None


def _outside(label: Tensor, why: str, *remedy: Any) -> LabelError:
    return LabelError(f"the label {_shown(label)} is outside: {why}; mend the labels or the model, or set ", *remedy,
                      " where it marks what shall count nowhere")  # fmt: skip


def _are_probabilities(labels: Tensor) -> bool:
    """Whether labels (N, classes, …) are probabilities, or one 1 in a row of zeros."""
    values = labels.double()
    if not labels.is_floating_point() and not bool(((values == 0) | (values == 1)).all()):
        return False
    inside = bool(((values >= 0) & (values <= 1)).all())
    return inside and bool(((values.sum(1) - 1).abs() <= SUM).all())


def _shown(value: Tensor) -> str:
    number = value.item()
    return f"{number:g}" if isinstance(number, float) else str(int(number))

"""How a batch is taken apart, and which of a model's outputs is the prediction: the one place that knows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from ..dualcopy.precision import to_device
from ..errors import ConfigError, FedSQError, Word, in_one_line
from .options import Options, option, runs_rounds

Key = str | int
"""A key of a mapping, the name of a field, or a position."""
LABELS = ("label", "labels", "y", "target", "targets")
"""The keys of a batch that are taken for its labels."""
LOGITS = ("logits", "out")
"""The entries of a model's output that are taken for its prediction, as torchvision and transformers name them."""


class DataError(ConfigError):
    """A batch, its labels or what a model returns for it cannot be used."""


class Arguments(NamedTuple):
    """Inputs that are several arguments of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Batch(NamedTuple):
    """One batch. `inputs` is what the model is called with: one argument, which may be nested, or `Arguments`."""

    inputs: Any
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, whatever is nested in it too."""
        return Batch(move(self.inputs, device), to_device(self.labels, device))


def call(model: Any, inputs: Any) -> Any:
    """What a model, or what is called like one, gives for the inputs of a batch."""
    return model(*inputs.args, **inputs.kwargs) if isinstance(inputs, Arguments) else model(inputs)


def move(value: Any, device: torch.device | str) -> Any:
    """The value with all tensors in it on a device. Containers keep their class; what is no tensor stays as it is."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if hasattr(value, "to") and callable(value.to):  # a packed sequence, a batch of another package
        return value.to(device)
    if isinstance(value, Mapping):
        moved: Any = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key, one in value.items():
            moved[key] = move(one, device)
        return moved
    if isinstance(value, (tuple, list)):
        parts = [move(one, device) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class ReadingOptions(Options):
    """How batches and outputs are read, where that cannot be told from themselves."""

    batch: dict[str, Any] | None = option(
        None,
        "fedsq_args",
        "where a batch has its parts, as {inputs: image, labels: class}: keys or positions, several inputs as a list; "
        "null: a pair, or two entries of which one is called label, labels, y, target or targets",
        agree=True,
        idle=runs_rounds,
    )
    output: str | int | None = option(
        None,
        "fedsq_args",
        "which entry of what the model returns is the prediction; null: a tensor, logits or out, or the one with a "
        "column for every class",
        agree=True,
        idle=runs_rounds,
    )

    @field_validator("batch")
    @classmethod
    def _both(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        inputs = value.get("inputs")
        single = [*inputs] if isinstance(inputs, (list, tuple)) and inputs else [inputs]
        keys = [*single, value.get("labels")]
        if set(value) != {"inputs", "labels"} or not all(
            isinstance(key, (str, int)) and not isinstance(key, bool) for key in keys
        ):
            raise PydanticCustomError(
                "batch", "Give {inputs: …, labels: …}, each a key or a position; inputs may be a list"
            )
        return value

    def reading(self, classes: Any = None) -> Reading:
        """What the options say. `classes` is the number of the data set's classes, where it is known."""
        parts = self.batch or {"inputs": None, "labels": None}
        inputs = parts["inputs"]
        known = classes if isinstance(classes, int) and not isinstance(classes, bool) else None
        return Reading(
            tuple(inputs) if isinstance(inputs, (list, tuple)) else inputs, parts["labels"], self.output, known
        )


@dataclass(frozen=True)
class Reading:
    """How batches and outputs are read in a run. What is None is told by the rules below.

    A batch that is a pair is (inputs, labels). A mapping, or a tuple with names, that has one entry called as in
    `LABELS` and one other is that. Everything else needs `inputs` and `labels`.

    An output that is a tensor is the prediction. Otherwise it is the entry that `output` names; else one called as in
    `LOGITS`; else the one tensor that has a column (dimension 1) for every class; else the only tensor.
    """

    inputs: Key | tuple[Key, ...] | None = None
    """Where a batch has the inputs. Several are several arguments: by keyword where the batch has names."""
    labels: Key | None = None
    """Where a batch has the labels."""
    output: Key | None = None
    """Which entry of a model's output is the prediction."""
    classes: int | None = None
    """The number of columns of a prediction; None: unknown."""

    def read(self, batch: Any) -> Batch:
        """Take a batch apart. Raises DataError where that is not clear."""
        inputs, labels = self._parts(batch)
        if isinstance(labels, (np.ndarray, list)):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                labels = torch.as_tensor(labels)
        if not isinstance(labels, Tensor):
            raise self._unclear(batch, f"{describe(labels)} in the place of the labels is no tensor")
        return Batch(torch.as_tensor(inputs) if isinstance(inputs, np.ndarray) else inputs, labels)

    def read_all(self, batches: Iterable[Any]) -> Iterator[Batch]:
        """Take all batches of a pass apart."""
        return map(self.read, _passed(batches))

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        if self.labels is not None and self.inputs is not None:
            labels = self._entry(batch, self.labels)
            if not isinstance(self.inputs, tuple):
                return self._entry(batch, self.inputs), labels
            found = {key: self._entry(batch, key) for key in self.inputs}
            if all(isinstance(key, str) for key in found):
                return Arguments((), {str(key): value for key, value in found.items()}), labels
            return Arguments(tuple(found.values())), labels
        named = entries(batch) if isinstance(batch, Mapping) or hasattr(batch, "_fields") else {}
        told = [key for key in named if str(key).lower() in LABELS]
        if len(named) == 2 and len(told) == 1:
            return next(value for key, value in named.items() if key != told[0]), named[told[0]]
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise self._unclear(batch, "which are inputs and which are labels is not clear")
        return batch[0], batch[1]

    def _entry(self, batch: Any, key: Key) -> Any:
        try:
            return entry(batch, key)
        except (KeyError, IndexError, AttributeError, TypeError):
            raise self._unclear(batch, f"there is no {key!r} in it") from None

    def _unclear(self, batch: Any, why: str) -> DataError:
        line = f"a batch is {describe(batch)}, and {why}; set "
        return DataError(line, Word("batch"), ": {inputs: …, labels: …} to their keys or positions")

    def prediction(self, output: Any) -> Tensor:
        """The prediction in what a model returned. Raises DataError where that is not clear."""
        if isinstance(output, Tensor):
            return output
        key = self.find(output)
        if key is None:
            width = f", of {self.classes} columns," if self.classes else ""
            raise DataError(
                f"the model returns {describe(output)}, and which of them is the prediction{width} is not clear; set ",
                Word("output"),
                " to its key or position",
            )
        return Reading(classes=self.classes).prediction(entry(output, key))

    def find(self, output: Any) -> Key | None:
        """The entry of an output that is the prediction; None where that is not clear."""
        if self.output is not None:
            return self.output if _has(output, self.output) else None
        named = entries(output)
        for key in LOGITS:
            if key in named:
                return key
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        tensors = {key: value for key, value in tensors.items() if value.is_floating_point() and value.dim()}
        fitting = [key for key, value in tensors.items() if value.dim() > 1 and value.shape[1] == self.classes]
        candidates = fitting or list(tensors)
        if not tensors:
            candidates = [key for key, value in named.items() if any(name in entries(value) for name in LOGITS)]
        return candidates[0] if len(candidates) == 1 else None


def _passed(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a pass. Raises DataError where the data cannot be read, whatever a data set of others raises."""
    try:
        yield from batches
    except FedSQError:
        raise
    except Exception as error:
        raise DataError(f"the data cannot be read ({in_one_line(error)})") from error


def entries(value: Any) -> dict[Any, Any]:
    """The entries of a container by key, name of the field or position; none of anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def entry(value: Any, key: Key) -> Any:
    """An entry of a container: by key, by name, or by position. Raises KeyError, IndexError or AttributeError."""
    if isinstance(value, Mapping):
        return value[key] if key in value or isinstance(key, str) else list(value.values())[key]
    if isinstance(key, str):
        return getattr(value, key)
    return value[key] if isinstance(value, (tuple, list)) else list(entries(value).values())[key]


def _has(value: Any, key: Key) -> bool:
    """Whether `entry` would find one."""
    try:
        entry(value, key)
    except (KeyError, IndexError, AttributeError, TypeError):
        return False
    return True


MOST = 6
"""Entries of a container that a line shows."""


def describe(value: Any, depth: int = 3) -> str:
    """What a value is made of, for a line: shapes, dtypes, keys."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{'x'.join(map(str, value.shape)) or 'one'} {str(value.dtype).removeprefix('torch.')}"
    named = entries(value)
    if named and depth:
        positions = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
        parts = [
            f"{'' if positions else f'{key}: '}{describe(one, depth - 1)}" for key, one in list(named.items())[:MOST]
        ]
        parts += [f"and {len(named) - MOST} more"] if len(named) > MOST else []
        opening, closing = "[]" if isinstance(value, list) else "()" if positions else "{}"
        return f"{opening}{', '.join(parts)}{closing}"
    return "None" if value is None else type(value).__name__


def columns(prediction: Tensor) -> int:
    """The number of columns of a prediction: its classes, where it is one of classes."""
    return prediction.shape[1] if prediction.dim() > 1 else 1

"""Run a few samples through the model before the first round, so that an error comes before the training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..data.registry import OURS
from ..data.silos import SilosData
from ..dualcopy.copies import copy_model
from ..errors import ConfigError, FedSQError, first_line, worded
from ..federation.reading import Reading
from ..federation.seeding import isolated
from ..federation.task import CLASSIFICATION
from .plan import RECIPE, Plan

SAMPLES = 2


class SampleError(ConfigError):
    """A model does not run on samples, or does not train on them. Every host words it by the fields.

    `reason` is what torch says, `shape` is that of one sample, `count` the number of samples.
    """

    def __init__(self, reason: str, shape: tuple[int, ...], count: int, training: bool) -> None:
        self.reason, self.shape, self.count, self.training = reason, shape, count, training
        what = f"does not train on a batch of {count}" if training else "does not run on a sample"
        super().__init__(f"the model {what} ({reason})")


def run_samples(
    model: nn.Module, samples: Tensor, training: bool = False, reading: Reading = CLASSIFICATION.reading
) -> Tensor:
    """The outputs of a copy of the model for a few samples (N, ...), in evaluation or in training mode. The model
    and the random generators stay as they are.

    Raises:
        GateError: the model is a DualCopy, and has an activation that cannot be gated, or no gate.
        SampleError: it does not take such samples.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with isolated(0), torch.no_grad():
            return reading.prediction(copy_model(model).train(training)(samples.to(device)))
    except FedSQError:
        raise
    except (RuntimeError, ValueError) as error:
        raise SampleError(first_line(error), tuple(samples.shape[1:]), len(samples), training) from error


def dry_run(model: nn.Module, plan: Plan, data: SilosData) -> list[str]:
    """Run the model on two samples of the test data, and compare the data with what they say of themselves.

    Returns:
        A line for everything that does not go together, but still runs.

    Raises:
        GateError: the model cannot be gated.
        ConfigError: it does not run on such samples.
    """
    config = plan.config
    notes = list(_miscounted(config.dataset, data))
    reading = plan.task.reading
    with worded(RECIPE):
        samples = _samples(data.global_test, reading)
    if samples is None:
        notes.append("the test set gives no batch: accuracies will be nan; lower train_args.batch_size")
        samples = _samples(data.global_train, reading)
    if samples is None:
        return notes
    try:
        with worded(RECIPE):
            outputs = run_samples(model, samples, reading=reading)
    except SampleError as error:
        ours = config.model in models.names() or config.dataset in OURS
        remedy = "; try fedsq_args.small_images or image_size" if ours else ""
        raise ConfigError(
            f"model {config.model} does not run on samples of {config.dataset}, of shape "
            f"{'x'.join(map(str, error.shape))}: {error.reason}{remedy}"
        ) from error
    return notes + list(_other_outputs(config.model, outputs, data.outputs))


def _samples(batches: Any, reading: Reading) -> Tensor | None:
    with isolated(0):
        batch = next(iter(batches if isinstance(batches, Iterable) else ()), None)
    inputs = None if batch is None else reading.read(batch).inputs
    return inputs[:SAMPLES] if isinstance(inputs, Tensor) else None


def _other_outputs(model: str, outputs: Tensor, classes: Any) -> Iterable[str]:
    width = outputs.shape[1] if outputs.dim() > 1 else 1
    if isinstance(classes, int) and width != classes:
        yield (
            f"model {model} has {width} outputs for {classes} classes: an untrained one has a loss of about "
            f"ln {width} = {math.log(width):.1f}"
        )


def _miscounted(name: str, data: SilosData) -> Iterable[str]:
    """A line for the first silo whose size is not the number of its samples: updates are weighted by it."""
    for silo, size in data.sizes.items():
        held = getattr(data.train.get(silo), "dataset", None)
        if isinstance(held, Sized) and size != len(held):
            yield (
                f"data set {name} says that silo {silo} has {size} samples, its loader has {len(held)}: "
                "updates are weighted by what the data set says"
            )
            return

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
from ..dualcopy import DualCopy
from ..dualcopy.tracing import detached_copy
from ..dualcopy.validation import refuse, validate
from ..errors import ConfigError, FedSQError, first_line, worded
from ..federation.evaluate import main_output
from ..federation.seeding import isolated
from .plan import RECIPE, Plan

SAMPLES = 2


def dry_run(model: nn.Module, plan: Plan, data: SilosData) -> list[str]:
    """Run a copy of the model, in evaluation mode, on two samples of the test data.

    Returns:
        A line for everything that does not go together, but still runs.

    Raises:
        GateError: the model cannot be gated.
        ConfigError: it does not run on such samples.
    """
    config = plan.config
    notes = list(_miscounted(config.dataset, data))
    samples = _samples(data.global_test)
    if samples is None:
        notes.append("the test set gives no batch: accuracies will be nan; lower train_args.batch_size")
        samples = _samples(data.global_train)
    if samples is None:
        return notes
    plain = model.quantitative if isinstance(model, DualCopy) else model
    device = next((parameter.device for parameter in plain.parameters()), torch.device("cpu"))
    samples = samples.to(device)
    try:
        with worded(RECIPE), isolated(0), torch.no_grad():
            if isinstance(model, DualCopy):
                refuse(validate(plain, samples, plan.options.gate_accept, config.gate_pooling))
            outputs = main_output(detached_copy(plain).eval()(samples))
    except FedSQError:
        raise
    except (RuntimeError, ValueError) as error:
        ours = config.model in models.names() or config.dataset in OURS
        remedy = "; try fedsq_args.small_images or image_size" if ours else ""
        raise ConfigError(
            f"model {config.model} does not run on samples of {config.dataset}, of shape "
            f"{'x'.join(map(str, samples.shape[1:]))}: {first_line(error)}{remedy}"
        ) from error
    return notes + list(_other_outputs(config.model, outputs, data.outputs))


def _samples(batches: Any) -> Tensor | None:
    with isolated(0):
        batch = next(iter(batches if isinstance(batches, Iterable) else ()), None)
    return batch[0][:SAMPLES] if batch is not None and isinstance(batch[0], Tensor) else None


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

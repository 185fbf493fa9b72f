"""Loss and metric of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .reading import Reading, call
from .task import CLASSIFICATION, Batches, Loss, Metric


class Metrics(NamedTuple):
    loss: float
    """Mean over samples."""
    accuracy: float
    """The task's own metric where it is not a classification; at most 1."""
    samples: int


def pooled(parts: Iterable[Metrics]) -> Metrics:
    """Metrics over all samples of several data sets."""
    known = [part for part in parts if part.samples]
    samples = sum(part.samples for part in known)
    if not samples:
        return Metrics(float("nan"), float("nan"), 0)
    loss = sum(part.loss * part.samples for part in known) / samples
    return Metrics(loss, sum(part.accuracy * part.samples for part in known) / samples, samples)


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model on a device and in evaluation mode; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.to(device).eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    loss: Loss = CLASSIFICATION.loss,
    metric: Metric = CLASSIFICATION.metric,
    reading: Reading = CLASSIFICATION.reading,
) -> Metrics:
    """Evaluate a model in evaluation mode and in the precision of its weights, whatever it was trained in. Every
    module's mode is put back. Without any sample the metrics are NaN."""
    losses: list[Tensor] = []
    kept: list[Any] = []
    sizes: list[int] = []
    with evaluating(model, device):
        for batch in reading.read_all(batches):
            sizes.append(metric.size(batch.labels))  # on the CPU, where it is no wait for the GPU
            x, labels = batch.to(device)
            output = reading.prediction(call(model, x))
            losses.append(loss(output, labels))
            kept.append(metric.of_batch(output, labels))
    samples = sum(sizes)
    if not samples:
        return Metrics(float("nan"), float("nan"), 0)
    # Once for all batches: reading a number waits for the GPU.
    total = sum(mean * size for mean, size in zip(torch.stack(losses).tolist(), sizes, strict=True))
    return Metrics(total / samples, metric.of_all(kept, sizes), samples)

"""Real samples through a copy of a model, before anything is trained: what the dry runs of all hosts share."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..dualcopy.copies import copy_model
from ..errors import ConfigError, FedSQError, first_line, in_one_line
from ..federation.client import Client
from ..federation.local import BatchError, Part, Phase
from ..federation.reading import Batch, Reading, call
from ..federation.seeding import isolated
from ..federation.task import CLASSIFICATION
from ..federation.training import LocalTraining
from .first_batches import Taken

LEAVE_OUT = "; let the loader leave a last batch of one sample out (drop_last=True), or use another batch_size"
BROKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model raises on inputs that it does not take."""


class SampleError(ConfigError):
    """A model does not run on samples, or does not train on them.

    `reason` is what torch says, `shape` is that of one sample, `count` the number of samples. For inputs that are not
    one tensor, the shape is empty.
    """

    def __init__(self, error: BaseException, inputs: Any, count: int, training: bool) -> None:
        self.reason = first_line(error) if isinstance(error, (RuntimeError, ValueError)) else in_one_line(error)
        self.shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
        self.count, self.training = count, training
        what = f"does not train on a batch of {count}" if training else "does not run on a sample"
        super().__init__(f"the model {what} ({self.reason})")


def run_samples(
    model: nn.Module, inputs: Any, training: bool = False, reading: Reading = CLASSIFICATION.reading
) -> Tensor:
    """The prediction of a copy of the model for the inputs of a batch, in evaluation or in training mode. The model and
    the random generators stay as they are.

    Raises:
        GateError: the model is a DualCopy, and has an activation that cannot be gated, or no gate.
        SampleError: it does not take such samples.
        ConfigError: which of its outputs is the prediction is not clear.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with isolated(0), torch.no_grad():
            copied = copy_model(model).train(training)
            return reading.prediction(call(copied, Batch(inputs, torch.zeros(0)).to(device).inputs))
    except FedSQError:
        raise
    except BROKEN as error:
        raise SampleError(error, inputs, len(inputs) if isinstance(inputs, Sized) else 1, training) from error


class _WithoutSteps:
    """An optimizer that was made as it should be, and takes no step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

    def step(self, *_: Any, **__: Any) -> None:
        """Nothing is trained before the first round."""


class _Untrained:
    """Local training up to the gradients."""

    def __init__(self, training: LocalTraining) -> None:
        self._training = training

    def __getattr__(self, name: str) -> Any:
        return getattr(self._training, name)

    def build(self, *given: Any) -> _WithoutSteps:
        return _WithoutSteps(self._training.build(*given))


class OneEpoch(Client):
    """Tries batches on a copy of the model: forward, loss and gradients. Every part of a round takes one epoch at most,
    and no optimizer takes a step."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.training = cast(LocalTraining, _Untrained(self.training))

    def parts(self, round: int) -> Sequence[Part]:
        parts = super().parts(round)
        return [part._replace(epochs=min(part.epochs, 1)) if isinstance(part, Phase) else part for part in parts]

    def try_batch(self, taken: Taken, batch: Batch, rounds: int, device: torch.device | str) -> None:
        """One local update on a batch by the algorithm's own parts: those of the first round, and those of the last
        where they differ.

        Args:
            batch: what `taken` was read as.
            rounds: of the run, 1 or more.

        Raises:
            SampleError: the model does not train on it.
            FedSQError: something else does not fit, such as the labels.
        """
        numbers = dict.fromkeys((0, rounds - 1))
        if len(numbers) > 1 and self.parts(0) == self.parts(rounds - 1):
            numbers.popitem()
        for round in numbers:
            failed: BaseException
            try:
                self.train(taken.silo or 0, [taken.batch], round, device)
            except FedSQError as error:
                if not isinstance(error, BatchError):
                    raise
                failed = error.__cause__ or error
            except BROKEN as error:
                failed = error
            else:
                continue
            raise SampleError(failed, batch.inputs, len(batch.labels), training=True) from failed

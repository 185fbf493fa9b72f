"""The dry run in front of a strategy's first round: two real batches pass a copy of the model, as they will in a round.

What does not go together is one line, with its silo. FLamby's figures stay as they are: loaders, generators, models and
optimizers are those of before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...algorithms import Algorithm
from ...errors import ConfigError, FedSQError
from ...federation.reading import DataError, Reading, describe
from ...federation.seeding import isolated
from ...federation.task import Loss
from ...federation.training import LocalTraining
from ...run.first_batches import Taken, of_two_silos
from ...run.samples import BROKEN, LEAVE_OUT, OneEpoch, SampleError, run_samples


def two_batches(name: str, loaders: Sequence[Any], updates: Sequence[int] | None = None) -> list[Taken]:
    """At most two batches of the loaders, which stay as they are.

    Args:
        name: of the algorithm, for the error.
        updates: how many batches every silo trains on in the whole run; None: not known, which is taken for all.

    Raises:
        ConfigError: a silo's data cannot be read, or no loader gives a batch.
    """
    by_silo: Mapping[int, Any] = dict(enumerate(loaders))
    parts = [] if updates is None else [silo for silo in by_silo if updates[silo] < _length(by_silo[silo])]
    found = of_two_silos(by_silo, {silo: _size(loader) for silo, loader in by_silo.items()}, parts=parts)
    if not found:
        raise ConfigError(
            f"{name}: no silo of training_dataloaders gives a batch: lower the batch_size, or let the loaders keep "
            "their last batch (drop_last=False)"
        )
    return found


def dry_run(
    view: nn.Module,
    algorithm: Algorithm,
    options: Any,
    training: LocalTraining,
    loss: Loss,
    reading: Reading,
    taken: Sequence[Taken],
    rounds: int,
    device: torch.device,
) -> None:
    """Let batches pass the model and the loss, by the algorithm's own parts.

    Args:
        view: a copy of the model as the algorithm trains it. It is trained here, and is of no use afterwards.
        loss: the user's own; a copy of it is called.
        rounds: of the run, 1 or more.

    Raises:
        FedSQError: training would fail.
    """
    with isolated(0):
        client = OneEpoch(
            view.to(device),
            algorithm,
            options,
            training,
            seed=None,
            keep_gates=getattr(options, "keep_gates", False),
            loss=functools.partial(_fitting, copy.deepcopy(loss)),
            reading=reading,
        )
        for one in taken:
            try:
                batch = reading.read(one.batch)
                run_samples(view, batch.inputs, reading=reading)
            except SampleError as error:
                raise ConfigError(f"{one.place}: {_line(error, one)}") from error.__cause__
            except DataError as error:
                raise error.after(f"{one.place}: ") from None
            try:
                client.try_batch(one, batch, rounds, device)
            except SampleError as error:
                raise ConfigError(f"{one.place}: {_line(error, one)}") from error.__cause__


def _line(error: SampleError, taken: Taken) -> str:
    shape = "x".join(map(str, (error.count, *error.shape)))
    what = f"a batch of the shape {shape}" if error.shape else f"a batch of {describe(taken.batch)}"
    does = "train" if error.training else "run"
    remedy = "; give a model that takes such batches, or loaders whose batches it takes"
    if error.training and error.count == 1:
        remedy = LEAVE_OUT
    return f"the model does not {does} on {what}: {error.reason}{remedy}"


def _fitting(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss; where it does not fit, the error says so."""
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        if outputs.is_cuda and isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
            # On a GPU, a label that is outside would end the process.
            copy.deepcopy(loss).cpu()(outputs.detach().cpu(), labels.cpu())
        value = loss(outputs, labels)
    except FedSQError:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        given = f"outputs {describe(outputs)} with labels {describe(labels)}"
        raise DataError(
            f"the loss {name} does not take {given} ({reason}); give a loss that does, or labels that fit it"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(f"the loss {name} gives {describe(value)}, not one number: let it give the mean of the batch")
    if not value.requires_grad:
        raise DataError(f"the loss {name} has no gradient, so that nothing is trained: let it be made by torch alone")
    return value


def _length(loader: Any) -> float:
    """The number of batches of a pass; not known: none that is ever reached."""
    try:
        return len(loader)
    except TypeError:
        return float("inf")


def _size(loader: Any) -> int:
    return len(loader.dataset)

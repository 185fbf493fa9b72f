"""The one dry run: two real batches pass a copy of the model before anything is trained, on every host.

They pass as they will in a round: read, evaluated, scored, trained by the algorithm's own parts. What does not go
together is one line, with its place. The model, the loaders and all generators stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..data.registry import OURS
from ..data.silos import SilosData
from ..dualcopy import DualCopy
from ..dualcopy.copies import copy_model, find_tensors
from ..errors import ConfigError, FedSQError, first_line, in_one_line, worded
from ..federation.client import Client
from ..federation.labels import misfit, refuse_other_length, tell
from ..federation.local import BatchError, Part, Phase
from ..federation.reading import Arguments, Batch, DataError, Reading, call, columns, describe
from ..federation.seeding import isolated
from ..federation.task import CLASSIFICATION
from .first_batches import Taken, batch_of, loaders_of, shown_labels, two_batches
from .plan import RECIPE, Plan, build_view
from .reluise import replace_smooth

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


def dry_run(
    model: nn.Module,
    plan: Plan,
    data: SilosData,
    silos: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Plan, list[str]]:
    """Pass two batches through a copy of the model, before the warm start.

    Args:
        model: as the user made it; a copy of it is viewed as the algorithm trains it.
        silos: those that this process serves; None: all that have data here.

    Returns:
        The plan with what was told from the data: the task, and what had to be given up; and a line for everything that
        does not go together, but still runs.

    Raises:
        FedSQError: the run would fail, or do something else than what is meant.
    """
    config, notes = plan.config, [*_miscounted(plan.config.dataset, data), *_untested(plan, data)]
    with worded(RECIPE):
        taken = two_batches(data, silos, config.dataset)
        if not taken:
            line = f"{config.dataset} gives no batch in this process: nothing was tried before the first round"
            return plan, [*notes, line]
        batches = [_read(plan.task.reading, one) for one in taken]
        with isolated(0):
            view = _viewed(model, plan).to(device)
            outputs = [_placed(taken[n], plan, run_samples, view, batch.inputs, reading=plan.task.reading)
                       for n, batch in enumerate(batches)]  # fmt: skip
            plan = _with_task(plan, data, taken, batches, outputs, silos)
            if not all(isinstance(batch.inputs, Tensor) for batch in batches):
                plan, given_up = _without_tensors(plan, batches[0], gated=isinstance(view, DualCopy))
                notes += given_up
            if data.task is CLASSIFICATION:
                for one, batch, found in zip(taken, batches, outputs, strict=True):
                    notes += _undefined(one, plan, batch, found)
                    plan.task.metric.of_batch(found, batch.labels.to(found.device))
            _train(view, plan, taken, batches, device)
    return plan, notes + list(_other_outputs(config.model, outputs[0], data.outputs, plan.config.task))


def _viewed(model: nn.Module, plan: Plan) -> nn.Module:
    copied = copy_model(model)
    if plan.config.relu_ise:
        replace_smooth(copied)
    return build_view(copied, plan)


def _read(reading: Reading, taken: Taken) -> Batch:
    try:
        return reading.read(taken.batch)
    except FedSQError as error:
        raise error.after(f"{taken.place}: ") from None


def _placed(taken: Taken, plan: Plan, function: Any, *given: Any, **named: Any) -> Any:
    """Call a function; its errors say whose batch it was."""
    try:
        return function(*given, **named)
    except SampleError as error:
        raise ConfigError(_line(error, plan, taken)) from error
    except DataError as error:
        raise error.after(f"{taken.place}: ") from None


def _line(error: SampleError, plan: Plan, taken: Taken) -> str:
    """What is wrong with a model for samples, in a recipe's words."""
    config, shape = plan.config, error.shape
    if len(shape) == 3:
        samples = f"{'x'.join(map(str, reversed(shape[1:])))} images"
    else:
        samples = f"samples of shape {'x'.join(map(str, shape))}" if shape else "such samples"
    ours = config.model in models.names() or config.dataset in OURS
    if not error.training:
        what = samples if len(shape) == 3 else "samples"
        of = "" if len(shape) == 3 or not shape else f", of shape {'x'.join(map(str, shape))}"
        remedy = "; set fedsq_args.small_images: true, or a larger fedsq_args.image_size" if ours else ""
        return f"model_args.model {config.model} does not run on {what} of {config.dataset}{of}: {error.reason}{remedy}"
    remedy = "; set fedsq_args.image_size" if ours else ""
    if error.count == 1 and config.batch_size == 1:
        remedy = "; raise train_args.batch_size"
    elif error.count == 1 and not ours:
        remedy = "; let the loader leave a last batch of one sample out (drop_last=True), or use another batch_size"
    elif error.count == 1:
        remedy = f"; {taken.place} has a batch of one sample: raise fedsq_args.min_client_samples to 2"
    place = f"{taken.place}: " if taken.silo is not None else ""
    what = f"does not train on a batch of {error.count} {samples}"
    return f"{place}model_args.model {config.model} {what}: {error.reason}{remedy}"


def _with_task(
    plan: Plan, data: SilosData, taken: Sequence[Taken], batches: Sequence[Batch], outputs: Sequence[Tensor],
    silos: Sequence[int] | None,
) -> Plan:  # fmt: skip
    """The plan with the task that the labels tell. What a data set brings of its own stays."""
    if data.task is not CLASSIFICATION:
        return plan
    config, reading = plan.config, plan.task.reading
    shown = {place: labels for place, loader in loaders_of(data, silos)
             if (labels := shown_labels(loader, reading)) is not None}  # fmt: skip
    others = [batch.labels for batch in batches[1:]] + list(shown.values())
    kind, task = _placed(taken[0], plan, tell, outputs[0], batches[0].labels, config.task, config.ignore_index, others)
    for one, batch, found in zip(taken, batches, outputs, strict=True):
        _placed(one, plan, refuse_other_length, found, batch.labels)
        if (error := misfit(kind, found, batch.labels, config.ignore_index)) is not None:
            raise error.after(f"{one.place}: ")
    for place, loader in loaders_of(data, silos):
        if place in shown:
            error = misfit(kind, outputs[0], shown[place], config.ignore_index)
            if error is not None and _is_real(loader, shown[place], reading, kind, outputs[0], config.ignore_index):
                raise error.after(f"{place}: ")
    told = {"task": kind}
    options = plan.options.model_copy(update=told) if hasattr(plan.options, "model_copy") else plan.options
    return replace(plan, config=config.model_copy(update=told), options=options, task=task._replace(reading=reading))


def _undefined(taken: Taken, plan: Plan, batch: Batch, outputs: Tensor) -> Iterator[str]:
    """A line for inputs whose NaN or infinite values reach the loss."""
    labels = batch.labels.to(outputs.device)
    broken = any(not torch.isfinite(x).all() for x in find_tensors(batch.inputs) if x.is_floating_point())
    if broken and plan.task.metric.size(labels) and not torch.isfinite(plan.task.loss(outputs, labels)):
        yield (
            f"{taken.place}: the inputs of a batch have NaN or infinite values, and so has the loss: its update will "
            "be refused; mend the data, or leave these samples out"
        )


def _is_real(loader: Any, labels: Tensor, reading: Reading, kind: Any, outputs: Tensor, ignored: int) -> bool:
    """Whether a label that a data set shows comes out of its loader: it may be changed on the way."""
    if isinstance(loader, (list, tuple)):
        return True
    wrong = next(n for n in range(len(labels)) if misfit(kind, outputs, labels[n : n + 1], ignored) is not None)
    try:
        found = reading.read(batch_of(loader, [wrong])).labels
    except Exception:  # then it says so when its batch comes
        return False
    return misfit(kind, outputs, found, ignored) is not None


def _without_tensors(plan: Plan, batch: Batch, gated: bool) -> tuple[Plan, list[str]]:
    """What needs inputs that are one tensor is refused, or given up with a line."""
    form = describe(batch.inputs._asdict() if isinstance(batch.inputs, Arguments) else batch.inputs)
    if plan.config.augmentation:
        raise ConfigError(f"fedsq_args.augmentation is for images (N, C, H, W), not for {form}; set it to []")
    if plan.config.compile:
        raise ConfigError(f"fedsq_args.compile is for inputs that are one tensor, not for {form}; set it to false")
    if not plan.config.keep_gates or not gated:
        return plan, []
    line = f"fedsq_args.keep_gates is given up: gates are kept for inputs that are one tensor, not for {form}"
    return replace(plan, config=plan.config.model_copy(update={"keep_gates": False})), [line]


class _Once(Client):
    """Trains every part of a round for one epoch."""

    def parts(self, round: int) -> Sequence[Part]:
        parts = super().parts(round)
        return [part._replace(epochs=min(part.epochs, 1)) if isinstance(part, Phase) else part for part in parts]


def _train(
    view: nn.Module, plan: Plan, taken: Sequence[Taken], batches: Sequence[Batch], device: torch.device | str
) -> None:
    """One local update of a copy on the batches, by the algorithm's own parts."""
    config, task = plan.config, plan.task
    client = _Once(view, plan.algorithm, plan.options, plan.training, 0, config.keep_gates, loss=task.loss,
                   reading=task.reading)  # fmt: skip
    rounds = dict.fromkeys((0, config.comm_round - 1))
    if len(rounds) > 1 and client.parts(0) == client.parts(config.comm_round - 1):
        rounds.popitem()
    for one, batch in zip(taken, batches, strict=True):
        for round in rounds:
            failed: BaseException
            try:
                client.train(one.silo or 0, [one.batch], round, device)
            except FedSQError as error:
                if not isinstance(error, BatchError):
                    raise
                failed = error.__cause__ or error
            except BROKEN as error:
                failed = error
            else:
                continue
            line = _line(SampleError(failed, batch.inputs, len(batch.labels), training=True), plan, one)
            raise ConfigError(line) from failed


def _untested(plan: Plan, data: SilosData) -> Iterator[str]:
    """What there is no test data for. Raises ConfigError where an option asks for figures that there cannot be."""
    config = plan.config
    if not data.test or not any(_may_have_batches(loader) for loader in data.test.values()):
        if config.silo_evaluation or config.finetune_epochs:
            what = "silo_evaluation" if config.silo_evaluation else "finetune_epochs"
            raise ConfigError(f"fedsq_args.{what}: no silo of {config.dataset} has test data; leave it out")
        if plan.silo_evaluation or plan.finetune_epochs:
            yield f"no silo of {config.dataset} has test data: the silos' own models are not tested"
    if not _may_have_batches(data.global_test):
        yield "the test set gives no batch: accuracies will be nan; give test data, or lower train_args.batch_size"


def _may_have_batches(loader: Any) -> bool:
    try:
        return loader is not None and (not isinstance(loader, Sized) or len(loader) > 0)
    except TypeError:  # a loader of a stream has no length
        return True


def _other_outputs(model: str, outputs: Tensor, classes: Any, task: str) -> Iterable[str]:
    width = columns(outputs)
    if isinstance(classes, int) and width != classes and task in ("classification", "auto"):
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

"""The training of one silo in one round."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dualcopy.precision import HALF
from ..errors import ConfigError, FedSQError, RunError, first_line
from .augment import augment
from .labels import misfit
from .reading import Batch, Reading, call
from .reseeding import reseed
from .roles import NORMALISATION, Role
from .seeding import derive, isolated
from .state import State
from .task import CLASSIFICATION, Batches, CrossEntropy, Loss
from .ties import tied_keys
from .training import SCALE, LocalTraining

Optimizers = MutableMapping[tuple[str, ...], torch.optim.Optimizer]
"""Optimizers that go on from round to round, by the names of the parameters that they train."""

Term = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(trained parameters, their values at the start of the round) -> what is added to the loss."""


class Phase(NamedTuple):
    """A part of a round's local training: so many epochs on the parameters with these roles.

    What a phase does not train stays as it is, statistics included: a normalisation layer runs in evaluation mode
    where the phase trains none of its parameters.
    """

    epochs: int
    trains: frozenset[Role]
    frozen: tuple[str, ...] = ()
    """Paths (or glob patterns) of modules that are left out, whatever their role."""


class Statistics(NamedTuple):
    """A part of a round in which nothing is trained: silos send sums over their data, and the server
    computes something from the totals."""

    collect: Callable[[nn.Module, Iterable[Batch], torch.device | str], dict[str, Tensor]]
    """(model, batches, each taken apart as a `Batch`, device) -> sums by name, to be added up over the silos."""
    apply: Callable[[State, Mapping[str, Tensor]], State]
    """(server's model, totals) -> server's next model."""
    expected: Callable[[State], dict[str, Tensor]]
    """(server's model) -> sums of the shapes and dtypes that a silo must send."""


Part = Phase | Statistics


def trains(parts: Sequence[Part]) -> bool:
    """Whether a round of these parts changes weights."""
    return any(not isinstance(part, Statistics) for part in parts)


class BatchError(RunError, ValueError):
    """A batch on which a model does not train; the cause is what torch raised."""

    def __init__(self, error: Exception, inputs: object) -> None:
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else None
        what = "a batch" if shape is None else f"a batch of the shape {'x'.join(map(str, shape)) or 'of a number'}"
        lonely = shape is not None and shape[:1] == (1,) and "more than 1 value per channel" in str(error)
        remedy = (
            "; a batch of one sample has no variance for batch normalisation: let the loader leave it out "
            "(drop_last=True), or use another batch_size"
        )
        super().__init__(f"the model does not train on {what}: {first_line(error)}{remedy if lonely else ''}")


class LocalResult(NamedTuple):
    steps: int
    """Number of batches, those included whose step was lost."""
    loss: float
    """Mean over all steps, without the objective's term; NaN without a step."""
    sums: dict[str, Tensor]
    """What Statistics collected."""
    lost: int = 0
    """Steps that were not taken because a gradient overflowed in fp16."""


def local_update(
    model: nn.Module,
    batches: Batches,
    training: LocalTraining,
    phases: Sequence[Part],
    roles: Mapping[str, Role],
    *,
    round: int,
    seed: int | None,
    objective: Term | None = None,
    loss: Loss = CLASSIFICATION.loss,
    reading: Reading = CLASSIFICATION.reading,
    device: torch.device | str = "cpu",
    forward: Callable[[Tensor], object] | None = None,
    factors: Mapping[str, float] | None = None,
    data: Batches | None = None,
    optimizers: Optimizers | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> LocalResult:
    """Train `model` in place, in training mode.

    Args:
        batches: iterated once per epoch; `reading` takes them apart.
        round: 0-based, for the learning rate.
        seed: all randomness of the update (order of the data, augmentation, dropout) comes from it, so that neither
            other silos nor their order matter; see `reseeding`. None: it is as the host has it.
        forward: what inputs of one tensor pass in place of the model, where gates are kept or the model is compiled.
        factors: of the learning rate, by parameter name; 1 where absent.
        data: all of the silo's data once, for statistics; None: `batches` is that.
        optimizers: where the silo's optimizers are kept between rounds; None: every phase has a new one.
        on_step: called with the loss after every step.

    Raises:
        ConfigError: a phase has no parameter to train; a batch or an output cannot be read.
        BatchError: torch cannot train the model on a batch.
    """
    model.to(device).train()
    named = dict(model.named_parameters())
    required = {name: p.requires_grad for name, p in named.items()}
    first = {name: p.detach().clone() for name, p in named.items()} if objective else {}
    steps = _Steps(model, forward or model, training, loss, reading, objective, device, on_step)
    sums: dict[str, Tensor] = {}
    try:
        with _seeded(batches, seed):
            for phase in phases:
                if isinstance(phase, Statistics):
                    sums.update(phase.collect(model, reading.read_all(batches if data is None else data), device))
                    continue
                trained = _freeze(model, named, required, roles, phase)
                optimizer = _optimizer(trained, training, round, factors or {}, optimizers)
                values, start = list(trained.values()), [first[name] for name in trained if objective]
                for _ in range(phase.epochs):
                    for batch in reading.read_all(batches):
                        steps.take(optimizer, values, start, batch)
    finally:
        for name, p in named.items():
            p.requires_grad_(required[name])
            p.grad = None
        model.train()
    return steps.result(sums)


@contextmanager
def _seeded(batches: Batches, seed: int | None) -> Iterator[None]:
    """Let everything that is drawn come from a seed, whether from the global generators or from the loader's own."""
    if seed is None:
        yield
        return
    reseed(batches, derive("loader", seed))
    with isolated(seed):
        yield


@contextmanager
def _naming(inputs: object) -> Iterator[None]:
    """Let what torch raises name the batch."""
    try:
        yield
    except FedSQError:
        raise
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise BatchError(error, inputs) from error


class _Steps:
    """Takes the steps of one local update, and keeps their losses."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], object],
        training: LocalTraining,
        loss: Loss,
        reading: Reading,
        objective: Term | None,
        device: torch.device | str,
        on_step: Callable[[Tensor], None] | None,
    ) -> None:
        self._model, self._forward, self._training = model, forward, training
        self._loss, self._reading = loss, reading
        self._objective, self._device, self._on_step = objective, device, on_step
        self._scaler = training.scaler(device)
        self.losses: list[Tensor] = []

    def take(
        self, optimizer: torch.optim.Optimizer, values: Sequence[Tensor], start: Sequence[Tensor], batch: Batch
    ) -> None:
        """Take one step. Raises BatchError where torch cannot."""
        with _naming(batch.inputs):
            self._take(optimizer, values, start, batch)

    def _take(
        self, optimizer: torch.optim.Optimizer, values: Sequence[Tensor], start: Sequence[Tensor], batch: Batch
    ) -> None:
        training, scaler = self._training, self._scaler
        x, labels = batch.to(self._device)
        x = augment(x, training.augmentation)
        optimizer.zero_grad()
        with training.forward(self._device):
            output = self._reading.prediction(call(self._forward if isinstance(x, Tensor) else self._model, x))
        if isinstance(self._loss, CrossEntropy) and output.is_cuda and not batch.labels.is_cuda:
            # On a GPU, a label that is outside would end the process.
            error = misfit("classification", output, batch.labels, self._loss.ignored)
            if error is not None:
                raise error
        value = self._loss(output.float() if output.dtype in HALF.values() else output, labels)
        self.losses.append(value.detach())
        total = value + self._objective(values, start) if self._objective else value
        torch.autograd.backward(scaler.scale(total))
        if training.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(values, training.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if self._on_step is not None:
            self._on_step(self.losses[-1])

    def result(self, sums: dict[str, Tensor]) -> LocalResult:
        loss = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        # An overflow halves the scale, and nothing raises it.
        lost = int(math.log2(SCALE / self._scaler.get_scale())) if self._scaler.is_enabled() else 0
        return LocalResult(len(self.losses), loss, sums, lost)


def _optimizer(
    trained: Mapping[str, Tensor],
    training: LocalTraining,
    round: int,
    factors: Mapping[str, float],
    kept: Optimizers | None,
) -> torch.optim.Optimizer:
    """A new optimizer of these parameters, or the one that was kept for them."""
    found = None if kept is None else kept.get(tuple(trained))
    if found is None:
        found = training.build(list(trained.values()), round, [factors.get(name, 1) for name in trained])
    if kept is not None:
        kept[tuple(trained)] = found
    return found


def frozen_keys(keys: Iterable[str], frozen: Sequence[str]) -> set[str]:
    """The keys of the modules that `frozen` names, by path or by glob pattern."""
    found = set()
    for key in keys:
        around = accumulate(key.split("."), lambda path, part: f"{path}.{part}")  # the paths up to the key's own
        if any(fnmatch.fnmatchcase(path, pattern) for path in around for pattern in frozen):
            found.add(key)
    return found


def _frozen_parameters(model: nn.Module, frozen: Sequence[str]) -> set[str]:
    """The names of the parameters of frozen modules, and of those that share a tensor with one."""
    if not frozen:
        return set()
    every, tied = [name for name, _ in model.named_parameters(remove_duplicate=False)], tied_keys(model)
    kept = {tied.get(name, name) for name in frozen_keys(every, frozen)}
    return {name for name in every if tied.get(name, name) in kept}


def _freeze(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    required: Mapping[str, bool],
    roles: Mapping[str, Role],
    phase: Phase,
) -> dict[str, nn.Parameter]:
    """Freeze what a phase does not train. Returns the parameters that it trains; raises ConfigError for none.

    What the model's own `train()` leaves in evaluation mode stays there: training is only taken away.
    """
    kept = _frozen_parameters(model, phase.frozen)
    for name, p in named.items():
        p.requires_grad_(required[name] and roles[name] in phase.trains and name not in kept)
    model.train()
    paths = model.named_modules(remove_duplicate=False)
    left_out = {module for path, module in paths if frozen_keys([path], phase.frozen)} if phase.frozen else set()
    for module in model.modules():
        if not isinstance(module, NORMALISATION):
            continue
        own = list(module.parameters(recurse=False))
        moves = any(p.requires_grad for p in own) if own else Role.NORM_BUFFER in phase.trains
        module.training = module.training and moves and module not in left_out
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        roles_named = " and ".join(sorted(role.value for role in phase.trains)) or "nothing"
        raise ConfigError(f"a phase that trains {roles_named} finds no such parameter")
    return trained

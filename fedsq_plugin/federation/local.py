"""One client's training in one round."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor, nn

from ..dualcopy.precision import HALF, Precision, to_device
from ..errors import ConfigError
from .augment import augment
from .evaluate import main_output
from .options import Options, option, runs_rounds
from .roles import NORMALISATION, Role
from .seeding import isolated
from .state import State
from .task import CLASSIFICATION, Loss

OptimizerClass = Callable[..., torch.optim.Optimizer]
"""A class of torch.optim, or what is called like one: (parameters or groups, lr=learning rate)."""

Optimizers = MutableMapping[tuple[str, ...], torch.optim.Optimizer]
"""Optimizers that go on from round to round, by the names of the parameters that they train."""

Term = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(trained parameters, their values at the start of the round) -> what is added to the loss."""


class Phase(NamedTuple):
    """A part of a round's local training: so many epochs on the parameters with these roles.

    What a phase does not train stays as it is, statistics included: a normalisation layer none of whose
    parameters it trains runs in evaluation mode.
    """

    epochs: int
    trains: frozenset[Role]
    frozen: tuple[str, ...] = ()
    """Paths (or glob patterns) of modules that are left out, whatever their role."""


class Statistics(NamedTuple):
    """A part of a round in which nothing is trained: clients send sums over their data, and the server
    makes something of the totals."""

    collect: Callable[[nn.Module, Iterable[tuple[Tensor, Tensor]], torch.device | str], dict[str, Tensor]]
    """(model, batches, device) -> sums by name, to be added up over clients."""
    apply: Callable[[State, Mapping[str, Tensor]], State]
    """(server's model, totals) -> server's next model."""
    expected: Callable[[State], dict[str, Tensor]]
    """(server's model) -> sums of the shapes and dtypes that a client must send."""


Part = Phase | Statistics


def trains(parts: Sequence[Part]) -> bool:
    """Whether a round of these parts changes weights."""
    return any(not isinstance(part, Statistics) for part in parts)


def _plain_sgd(native: str | None, client_optimizer: str) -> str | None:
    return f"{native} trains by plain SGD" if native and client_optimizer == "sgd" else None


def _no_momentum(native: str | None, client_optimizer: str) -> str | None:
    return f"{client_optimizer} has none" if not native and client_optimizer != "sgd" else None


def _other_trainer(native: str | None, warm_start: str) -> str | None:
    return f"{native} trains" if native and warm_start != "public" else None


def _no_steps(lr_schedule: str) -> str | None:
    return f"lr_schedule is '{lr_schedule}'" if lr_schedule != "step" else None


class LocalTraining(Options):
    """The steps of a local update. The learning rate is per step, clip_norm bounds the global gradient norm.

    The schedule is over rounds (0-based round r of R): constant; cosine, lr·(1+cos(πr/R))/2; step,
    lr·lr_decay^⌊r/lr_decay_rounds⌋.
    """

    comm_round: int = option(1, "train_args", "number of rounds", required=True, agree=True, ge=1)
    client_optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "train_args", "client's optimizer", agree=True)
    learning_rate: float = option(0.01, "train_args", "client's learning rate", agree=True, gt=0)
    momentum: float = option(
        0.0, "train_args", "momentum of sgd", agree=True, idle=(_plain_sgd, _no_momentum), ge=0, lt=1
    )
    weight_decay: float = option(
        0.0, "train_args", "L2 penalty of sgd and adam, decay of adamw", agree=True, idle=_plain_sgd, ge=0
    )
    precision: Precision = option(
        "fp32",
        "fedsq_args",
        "what silos train in, by autocast, fp16 with a scaled loss; what travels and what is tested is fp32",
        differs="what travels and what decides gates is fp32",
        idle=runs_rounds,
    )
    nesterov: bool = option(False, "fedsq_args", "Nesterov momentum (sgd)", agree=True, idle=runs_rounds)
    clip_norm: float | None = option(
        None, "fedsq_args", "bound on the norm of a step's gradient", agree=True, idle=runs_rounds, gt=0
    )
    lr_schedule: Literal["constant", "cosine", "step"] = option(
        "constant", "fedsq_args", "learning rate over rounds", agree=True, idle=runs_rounds
    )
    lr_decay: float = option(
        0.1,
        "fedsq_args",
        "factor of the step schedule",
        agree=True,
        idle=(runs_rounds, _no_steps),
        gt=0,
    )
    lr_decay_rounds: int = option(
        10,
        "fedsq_args",
        "rounds between two steps of the step schedule",
        agree=True,
        idle=(runs_rounds, _no_steps),
        ge=1,
    )
    augmentation: tuple[Literal["crop", "flip"], ...] = option(
        (),
        "fedsq_args",
        "augmentation of training images, in order",
        agree=True,
        idle=_other_trainer,
    )

    @field_validator("client_optimizer", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    def rate(self, round: int) -> float:
        """Learning rate of a round."""
        if self.lr_schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * round / self.comm_round)) / 2
        if self.lr_schedule == "step":
            return self.learning_rate * self.lr_decay ** (round // self.lr_decay_rounds)
        return self.learning_rate

    def build(self, parameters: Sequence[Tensor], round: int, factors: Sequence[float] = ()) -> torch.optim.Optimizer:
        """A fresh optimizer for one phase of one round.

        Args:
            factors: of the learning rate, for each parameter; none: 1. Where it is not 1, there is no
                weight decay either.
        """
        rate = self.rate(round)
        groups: Any = parameters
        if any(factor != 1 for factor in factors):
            groups = [
                {"params": [p], "lr": rate * factor, **({} if factor == 1 else {"weight_decay": 0.0})}
                for p, factor in zip(parameters, factors, strict=True)
            ]
        # On a GPU: one kernel for all parameters, and fp16's test for overflow without a wait.
        fused = True if all(p.is_cuda for p in parameters) else None
        return self._optimizer(groups, rate, fused)

    def _optimizer(self, groups: Any, rate: float, fused: bool | None) -> torch.optim.Optimizer:
        decay = self.weight_decay
        if self.client_optimizer == "sgd":
            return torch.optim.SGD(groups, rate, self.momentum, 0.0, decay, nesterov=self.nesterov, fused=fused)
        cls = torch.optim.Adam if self.client_optimizer == "adam" else torch.optim.AdamW
        return cls(groups, rate, weight_decay=decay, fused=fused)

    def forward(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """What surrounds a forward."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(device).type, HALF[self.precision])

    def scaler(self, device: torch.device | str) -> torch.amp.GradScaler:
        """Of the loss, for fp16; does nothing in other precisions. Every client of a round begins anew, so
        that their order changes nothing, and takes too few steps for a scale that grows."""
        return torch.amp.GradScaler(
            torch.device(device).type, SCALE, growth_interval=2**30, enabled=self.precision == "fp16"
        )


class OptimizerTraining(LocalTraining):
    """Local training by an optimizer of the caller's, which is called with the learning rate alone: everything else
    is its own default."""

    optimizer: OptimizerClass

    def _optimizer(self, groups: Any, rate: float, fused: bool | None) -> torch.optim.Optimizer:
        return self.optimizer(groups, lr=rate)


SCALE = 2.0**10
"""Of the loss in fp16, at the start of a client's round. Small, because a step that overflows is lost."""


class LocalResult(NamedTuple):
    steps: int
    """Batches, those included whose step was lost."""
    loss: float
    """Mean over all steps, without the objective's term; NaN without a step."""
    sums: dict[str, Tensor]
    """What Statistics collected."""
    lost: int = 0
    """Steps that were not taken because a gradient overflowed in fp16."""


def local_update(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    training: LocalTraining,
    phases: Sequence[Part],
    roles: Mapping[str, Role],
    *,
    round: int,
    seed: int | None,
    objective: Term | None = None,
    loss: Loss = CLASSIFICATION.loss,
    device: torch.device | str = "cpu",
    forward: Callable[[Tensor], object] | None = None,
    factors: Mapping[str, float] | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    optimizers: Optimizers | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> LocalResult:
    """Train `model` in place, in training mode.

    Args:
        batches: iterated once per epoch; (inputs, labels).
        round: 0-based, for the learning rate.
        seed: all randomness of the update (order of the data, augmentation, dropout) comes from it,
            so that neither other clients nor their order matter. None: from the process's generators, as
            the host has them.
        forward: the model's forward, where it is another than calling it (gates kept).
        factors: of the learning rate, by parameter name; 1 where absent.
        data: all of the client's data once, for statistics, where `batches` is something else.
        optimizers: where this client's optimizers are kept between rounds; None: every phase has a new one.
        on_step: called with the loss after every step.

    Raises:
        ConfigError: a phase has no parameter to train.
    """
    model.to(device).train()
    named = dict(model.named_parameters())
    required = {name: p.requires_grad for name, p in named.items()}
    first = {name: p.detach().clone() for name, p in named.items()} if objective else {}
    steps = _Steps(forward or model, training, loss, objective, device, on_step)
    sums: dict[str, Tensor] = {}
    try:
        with nullcontext() if seed is None else isolated(seed):
            for phase in phases:
                if isinstance(phase, Statistics):
                    sums.update(phase.collect(model, batches if data is None else data, device))
                    continue
                _freeze(model, named, required, roles, phase)
                trained = {name: p for name, p in named.items() if p.requires_grad}
                if not trained:
                    raise ConfigError(f"a phase that trains {_said(phase.trains)} finds no such parameter")
                optimizer = _optimizer(trained, training, round, factors or {}, optimizers)
                values, start = list(trained.values()), [first[name] for name in trained if objective]
                for _ in range(phase.epochs):
                    for x, labels in batches:
                        steps.take(optimizer, values, start, x, labels)
    finally:
        for name, p in named.items():
            p.requires_grad_(required[name])
            p.grad = None
        model.train()
    return LocalResult(len(steps.losses), steps.mean_loss, sums, steps.lost)


class _Steps:
    """Takes the steps of one local update, and keeps their losses."""

    def __init__(
        self,
        forward: Callable[[Tensor], object],
        training: LocalTraining,
        loss: Loss,
        objective: Term | None,
        device: torch.device | str,
        on_step: Callable[[Tensor], None] | None,
    ) -> None:
        self._forward, self._training, self._loss = forward, training, loss
        self._objective, self._device, self._on_step = objective, device, on_step
        self._scaler = training.scaler(device)
        self.losses: list[Tensor] = []

    def take(
        self,
        optimizer: torch.optim.Optimizer,
        values: Sequence[Tensor],
        start: Sequence[Tensor],
        x: Tensor,
        labels: Tensor,
    ) -> None:
        training, scaler = self._training, self._scaler
        x, labels = to_device(x, self._device), to_device(labels, self._device)
        x = augment(x, training.augmentation)
        optimizer.zero_grad()
        with training.forward(self._device):
            output = main_output(self._forward(x))
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

    @property
    def mean_loss(self) -> float:
        return float(torch.stack(self.losses).mean()) if self.losses else float("nan")

    @property
    def lost(self) -> int:
        """Steps that were not taken because a gradient overflowed in fp16."""
        return int(math.log2(SCALE / self._scaler.get_scale())) if self._scaler.is_enabled() else 0


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
    return {
        key for key in keys for pattern in frozen if any(fnmatch.fnmatchcase(part, pattern) for part in _owners(key))
    }


def _owners(key: str) -> list[str]:
    """A key's own path, and those of the modules around it."""
    parts = key.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _freeze(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    required: Mapping[str, bool],
    roles: Mapping[str, Role],
    phase: Phase,
) -> None:
    kept = frozen_keys(named, phase.frozen)
    for name, p in named.items():
        p.requires_grad_(required[name] and roles[name] in phase.trains and name not in kept)
    model.train()
    for path, module in model.named_modules():
        if not isinstance(module, NORMALISATION):
            continue
        own = list(module.parameters(recurse=False))
        moves = any(p.requires_grad for p in own) if own else Role.NORM_BUFFER in phase.trains
        module.training = moves and not frozen_keys([path], phase.frozen)


def _said(trains: frozenset[Role]) -> str:
    return " and ".join(sorted(role.value for role in trains)) or "nothing"

"""How a silo trains: optimizer, learning rate over the rounds, augmentation and precision, declared as options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from ..dualcopy.precision import HALF, Precision
from .options import Options, option, runs_rounds

OptimizerClass = Callable[..., torch.optim.Optimizer]
"""A class of torch.optim, or what is called like one: (parameters or groups, lr=learning rate)."""


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
        0.1, "fedsq_args", "factor of the step schedule", agree=True, idle=(runs_rounds, _no_steps), gt=0
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
        (), "fedsq_args", "augmentation of training images, in order", agree=True, idle=_other_trainer
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
        """A new optimizer for one phase of one round.

        Args:
            factors: by which the learning rate of each parameter is multiplied; empty: 1. A parameter whose factor is
                not 1 has no weight decay.
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
        """The context in which a forward runs: autocast, or none in fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(device).type, HALF[self.precision])

    def scaler(self, device: torch.device | str) -> torch.amp.GradScaler:
        """The scaler of the loss for fp16; in other precisions it does nothing. Every silo begins a round with a new
        one, so that their order changes nothing. A round has too few steps for a scale that grows."""
        return torch.amp.GradScaler(
            torch.device(device).type, SCALE, growth_interval=2**30, enabled=self.precision == "fp16"
        )


class OptimizerTraining(LocalTraining):
    """Local training by the caller's own optimizer class. It is called with the learning rate alone; everything else is
    the class's default."""

    optimizer: OptimizerClass

    def _optimizer(self, groups: Any, rate: float, fused: bool | None) -> torch.optim.Optimizer:
        return self.optimizer(groups, lr=rate)


SCALE = 2.0**10
"""Scale of the loss in fp16 at the start of a silo's round. It is small, because a step that overflows is lost."""

"""One client's training in one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .augment import augment
from .evaluate import Loss, cross_entropy, main_output
from .roles import Role
from .seeding import isolated

Objective = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(trained parameters, their values at the start of the round) -> what is added to the loss."""


class Phase(NamedTuple):
    """A part of a round's local training: so many epochs on the parameters with these roles."""

    epochs: int
    trains: frozenset[Role]


@dataclass(frozen=True)
class LocalTraining:
    """The optimizer of a local update. Learning rate per step; clip_norm on the global gradient norm.

    The schedule is over rounds (0-based round r of R): constant; cosine, lr·(1+cos(πr/R))/2; step,
    lr·lr_decay^⌊r/lr_decay_rounds⌋.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    lr_decay: float = 0.1
    lr_decay_rounds: int = 10
    rounds: int = 1
    augmentation: tuple[str, ...] = ()

    def rate(self, round: int) -> float:
        """Learning rate of a round."""
        if self.lr_schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * round / self.rounds)) / 2
        if self.lr_schedule == "step":
            return self.learning_rate * self.lr_decay ** (round // self.lr_decay_rounds)
        return self.learning_rate

    def build(self, parameters: Sequence[Tensor], round: int) -> torch.optim.Optimizer:
        """A fresh optimizer for one phase of one round."""
        rate, decay = self.rate(round), self.weight_decay
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, rate, self.momentum, 0.0, decay, self.nesterov)
        cls = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return cls(parameters, rate, weight_decay=decay)


class LocalResult(NamedTuple):
    steps: int
    loss: float
    """Mean over all steps, without the objective's term; NaN without a step."""


def local_update(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    training: LocalTraining,
    phases: Sequence[Phase],
    roles: Mapping[str, Role],
    *,
    round: int,
    seed: int,
    objective: Objective | None = None,
    loss: Loss = cross_entropy,
    device: torch.device | str = "cpu",
    forward: Callable[[Tensor], object] | None = None,
) -> LocalResult:
    """Train `model` in place, in training mode.

    Args:
        batches: iterated once per epoch; (inputs, labels).
        round: 0-based, for the learning rate.
        seed: all randomness of the update (order of the data, augmentation, dropout) comes from it,
            so that neither other clients nor their order matter.
        forward: the model's forward, where it is another than calling it (gates kept).
    """
    model.to(device).train()
    named = dict(model.named_parameters())
    required = {name: p.requires_grad for name, p in named.items()}
    first = {name: p.detach().clone() for name, p in named.items()} if objective else {}
    losses: list[Tensor] = []
    try:
        with isolated(seed):
            for phase in phases:
                for name, p in named.items():
                    p.requires_grad_(required[name] and roles[name] in phase.trains)
                trained = [p for p in named.values() if p.requires_grad]
                optimizer = training.build(trained, round)
                start = [first[name] for name, p in named.items() if p.requires_grad] if objective else []
                for _ in range(phase.epochs):
                    for x, labels in batches:
                        x, labels = x.to(device), labels.to(device)
                        x = augment(x, training.augmentation)
                        optimizer.zero_grad()
                        value = loss(main_output((forward or model)(x)), labels)
                        losses.append(value.detach())
                        total = value + objective(trained, start) if objective else value
                        torch.autograd.backward(total)
                        if training.clip_norm is not None:
                            nn.utils.clip_grad_norm_(trained, training.clip_norm)
                        optimizer.step()
    finally:
        for name, p in named.items():
            p.requires_grad_(required[name])
            p.grad = None
    return LocalResult(len(losses), float(torch.stack(losses).mean()) if losses else float("nan"))

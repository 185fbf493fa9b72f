"""Differential privacy as in FLamby's strategies: opacus clips every client's gradients and adds noise to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...federation.algorithm import ALL_PARTS, NOTHING, Algorithm
from ...federation.training import OptimizerClass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Privacy:
    """The target (epsilon, delta) and the largest L2 norm of a sample's gradient."""

    epsilon: float
    delta: float
    max_grad_norm: float

    @classmethod
    def of(cls, epsilon: float | None, delta: float | None, max_grad_norm: float | None) -> Privacy | None:
        """The privacy of these arguments; None where none of the three is given.

        Raises:
            ConfigError: only some are given; FLamby's own strategies would then train without privacy.
        """
        if epsilon is None and delta is None and max_grad_norm is None:
            return None
        if epsilon is None or delta is None or max_grad_norm is None:
            raise ConfigError(
                "differential privacy needs dp_target_epsilon, dp_target_delta and dp_max_grad_norm together"
            )
        return cls(epsilon, delta, max_grad_norm)

    def refuse(self, algorithm: Algorithm, fine_tuning_steps: int) -> None:
        """Raise ConfigError for training to which opacus would add no noise, or noise that it does not count."""
        why = None
        if algorithm.objective is not NOTHING:
            why = "opacus puts its own gradients in place of those of the term that is added to the loss"
        elif algorithm.phases is not ALL_PARTS:
            why = "it trains the model in parts, and opacus has one optimizer for all of it"
        elif fine_tuning_steps:
            why = "opacus does not count the fine-tuning at the end: set num_fine_tuning_steps to 0"
        if why:
            raise ConfigError(f"{algorithm.name} cannot train with differential privacy (dp_…): {why}")

    def refuse_model(self, algorithm: Algorithm, model: nn.Module) -> None:
        """Raise ConfigError for layers for which opacus has no gradients by sample, such as BatchNorm."""
        from opacus.validators import ModuleValidator

        if found := ModuleValidator.validate(model.train(), strict=False):
            raise ConfigError(f"{algorithm.name}: differential privacy: {' '.join(str(found[0]).split())}")

    def warn(self, loaders: Sequence[Any], updates: int) -> None:
        """Warn where FLamby's way of counting, which is followed here, promises too much."""
        if any(updates > len(loader) for loader in loaders):
            log.warning(
                "differential privacy: FLamby counts a round as one pass over a client's data; %d updates "
                "are more than that at some client, so that it spends more than dp_target_epsilon",
                updates,
            )

    def optimizer(
        self,
        model: nn.Module,
        optimizer_class: OptimizerClass,
        learning_rate: float,
        loader: Any,
        rounds: int,
        seed: int,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """An optimizer that adds noise to a client's gradients. The model's modules get opacus' hooks."""
        from opacus import PrivacyEngine

        model.to(device).train()
        plain = optimizer_class(model.parameters(), lr=learning_rate)
        try:
            _, optimizer, _ = PrivacyEngine().make_private_with_epsilon(
                module=model,
                optimizer=plain,
                data_loader=loader,
                epochs=rounds,
                target_epsilon=self.epsilon,
                target_delta=self.delta,
                max_grad_norm=self.max_grad_norm,
                noise_generator=torch.Generator(device).manual_seed(seed),
            )
        except ValueError as error:
            raise ConfigError(f"differential privacy: {' '.join(str(error).split())}") from None
        made: torch.optim.Optimizer = optimizer
        return made

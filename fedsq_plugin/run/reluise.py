"""ReLU-isation: the server turns a smooth backbone into one with ReLU, which FedSQ can gate.

Its activations become λ-activations (arXiv 2603.21991), whose λ is first learned with the weights, then
hardened step by step toward a target while the weights go on learning, and which are then replaced by ReLU.
The protocol is reconstructed: the paper publishes neither schedule, nor target, nor learning-rate factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dualcopy.reluise import lambdas, replace_by_lambda, replace_by_relu
from ..dualcopy.smooth import target_lambda
from ..errors import ConfigError
from ..federation.local import Phase, local_update
from ..federation.roles import Role, roles
from ..federation.seeding import derive
from ..federation.state import State, no_less_finite, state_of, tensors_of
from ..federation.task import CLASSIFICATION, Batches, Task
from ..federation.training import LocalTraining
from ..settings.warm_start import Hardening

EVERYTHING = (Phase(1, frozenset(Role)),)


def lambda_at(hardening: Hardening, epoch: int, learned: float, target: float) -> float:
    """λ of a hardening epoch, counted from 0; with p = (epoch + 1)/relu_ise_harden_epochs,

    linear: learned + (target − learned)·p; geometric: learned·(target/learned)^p; cosine: the linear one
    with (1 − cos(πp))/2 for p. At the last epoch, target.
    """
    p = (epoch + 1) / hardening.relu_ise_harden_epochs
    if p == 1:
        return target
    if hardening.relu_ise_schedule == "geometric":
        return learned * math.pow(target / learned, p)
    if hardening.relu_ise_schedule == "cosine":
        p = (1 - math.cos(math.pi * p)) / 2
    return learned + (target - learned) * p


@dataclass(frozen=True)
class Reluised:
    """What ReLU-isation did. Accuracies are whatever `evaluate` gave; paths are of λ-activations."""

    original: float
    """Accuracy of the smooth model, before anything."""
    hardened: float
    """At the target λ, after the last epoch."""
    relu: float
    """Accuracy of the same weights with ReLU."""
    history: list[dict[str, float]]
    """λ by path: at the start, then after each epoch."""
    learned: dict[str, float]
    target: dict[str, float]
    """λ at the replacement: λ*, or the learned λ where that is above it already."""

    @property
    def drop(self) -> float:
        """What the replacement itself cost: hardened − relu."""
        return self.hardened - self.relu


def relu_ise(
    model: nn.Module,
    batches: Batches,
    training: LocalTraining,
    hardening: Hardening,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    task: Task = CLASSIFICATION,
    evaluate: Callable[[nn.Module], float],
) -> Reluised:
    """Turn `model` in place, on public data, into one with nn.ReLU for every smooth activation module.

    Every epoch has a fresh optimizer. `model` ends in training mode, on the device it came on, with the
    state-dict keys it came with.

    Args:
        batches: iterated once per epoch; (inputs, labels).
        training: its schedule over rounds is one over the epochs here, learning and hardening together.
        seed: all randomness of the training comes from it.
        device: to train on.
        task: of the data: the loss that is trained.
        evaluate: accuracy, on data that was not trained on; has to see to evaluation mode and device itself.
            Called three times: on the smooth model, at the target λ, on the model with ReLU.

    Raises:
        ConfigError: there is no activation to replace, no batch in an epoch, or the training diverged.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    original = evaluate(model)
    layers = replace_by_lambda(model, hardening.relu_ise_initial, hardening.relu_ise_temperature)
    known = roles(model)
    factors = {f"{path}.s": hardening.relu_ise_lr_factor for path in layers}
    history = [lambdas(model)]

    def train(epoch: int) -> None:
        own, before = derive("relu-ise", seed, epoch), state_of(model)
        about: dict[str, Any] = {"device": device, "factors": factors, "loss": task.loss, "reading": task.reading}
        result = local_update(model, batches, training, EVERYTHING, known, round=epoch, seed=own, **about)
        _check(model, before, result.steps, epoch)
        history.append(lambdas(model))

    for epoch in range(hardening.relu_ise_learn_epochs):
        train(epoch)
    learned = history[-1]
    target = {
        path: max(target_lambda(layer.kind, hardening.relu_ise_tolerance), learned[path])
        for path, layer in layers.items()
    }
    for layer in layers.values():
        layer.s.requires_grad_(False)
    for epoch in range(hardening.relu_ise_harden_epochs):
        for path, layer in layers.items():
            layer.set_lambda(lambda_at(hardening, epoch, learned[path], target[path]))
        train(hardening.relu_ise_learn_epochs + epoch)
    hardened = evaluate(model)
    replace_by_relu(model)
    relu = evaluate(model)
    model.to(home)
    return Reluised(original, hardened, relu, history, learned, target)


def replace_smooth(model: nn.Module) -> None:
    """Put nn.ReLU in the place of every smooth activation, in place, for weights that have gone through ReLU-isation
    already. Raises ConfigError where there is none."""
    replace_by_lambda(model)
    replace_by_relu(model)


def _check(model: nn.Module, before: State, steps: int, epoch: int) -> None:
    if not steps:
        raise ConfigError(f"ReLU-isation found no batch in epoch {epoch}; batches must be there again in every epoch")
    if not all(no_less_finite(value, before[key]) for key, value in tensors_of(model).items()):
        raise ConfigError(f"ReLU-isation diverged: weights are not finite after epoch {epoch}; lower the learning rate")

"""From FedML's flat arguments to what the core needs: the plan of one run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import models
from ...algorithms import Algorithm, algorithm
from ...algorithms.options import Options
from ...algorithms.view import VIEWS
from ...config import OPTIONS, Config, parse
from ...dualcopy import DualCopy
from ...errors import ConfigError
from ...federation.local import LocalTraining
from ...federation.seeding import derive, isolated
from ...federation.warm_start import public_warm_start
from ...recipe import problems, read_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that a run of one algorithm needs, the model and the data excepted."""

    config: Config
    algorithm: Algorithm
    options: Options
    training: LocalTraining
    head: str | None


def config_of(args: Any) -> Config:
    """The checked options in FedML's arguments; values are put back as checked (`1e-3` is text to
    FedML's YAML reader, a number here).

    Raises:
        ConfigError: with everything that is wrong, unknown keys in our families included.
    """
    found = []
    for path in getattr(args, "yaml_paths", []):
        if path and Path(path).is_file():
            found += [line for line in problems(read_yaml(path))[1] if "is unknown" in line]
    config, wrong = parse(vars(args))
    if config is None or found:
        raise ConfigError(" | ".join(dict.fromkeys(found + wrong)))
    for key in OPTIONS.keys() & vars(args).keys():
        setattr(args, key, getattr(config, key))
    return config


def plan_of(config: Config, model: nn.Module) -> Plan:
    """The plan for training `model` by the algorithm that `federated_optimizer` names."""
    options = Options(
        epochs=config.epochs,
        fedprox_mu=config.fedprox_mu,
        gate_accept=config.gate_accept,
        gate_pooling=config.gate_pooling,
        buffers=config.buffers,
    )
    return Plan(
        config, algorithm(config.federated_optimizer), options, _training(config), head_of(config, model)
    )


def head_of(config: Config, model: nn.Module) -> str | None:
    """The head's module path: as given, or that of our own backbones. A script may train another model
    than the recipe names; its head is unknown unless given."""
    if config.head is None and config.model in models.names():
        known = models.head(config.model)
        return known if known in dict(model.named_modules()) else None
    return config.head


def _training(config: Config) -> LocalTraining:
    return LocalTraining(
        optimizer=config.client_optimizer,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        lr_schedule=config.lr_schedule,
        lr_decay=config.lr_decay,
        lr_decay_rounds=config.lr_decay_rounds,
        rounds=config.comm_round,
        augmentation=config.augmentation,
    )


def warm_start(model: nn.Module, config: Config, dataset: Any, device: torch.device) -> None:
    """Give the model its pretrained weights, in place. A DualCopy's structural copy is taken anew."""
    if config.warm_start == "none":
        return
    plain = model.quantitative if isinstance(model, DualCopy) else model
    if config.warm_start == "public":
        _public(plain, config, dataset, device)
    else:
        head = head_of(config, plain)
        weights = config.warm_start_file or "imagenet"
        state = models.pretrained_state(weights, config.model, config.small_images)
        for line in models.load_weights(plain, state, head):
            log.info("warm start: %s", line)
    if isinstance(model, DualCopy):
        model.refresh()


def _public(model: nn.Module, config: Config, dataset: Any, device: torch.device) -> None:
    public = getattr(dataset, "public", None)
    if public is None:
        raise ConfigError(
            f"warm_start is 'public', but {config.dataset} has no public split; "
            "use the data sets digits or image_folder, or warm_start: file"
        )
    training = LocalTraining(
        learning_rate=config.warm_start_learning_rate,
        momentum=config.warm_start_momentum,
        augmentation=config.augmentation,
    )
    seed = derive("warm start", config.seed("model"))
    cached = public_warm_start(
        model,
        public,
        f"{dataset.public_content}/{config.warm_start_batch_size}",
        training,
        config.warm_start_epochs,
        seed,
        config.cache_dir,
        device,
    )
    how = "read from the cache" if cached else f"trained for {config.warm_start_epochs} epochs"
    log.info("warm start on %d public samples: %s", len(public.dataset), how)


def viewed(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as the algorithm trains it. The structural copy is taken here."""
    return VIEWS[plan.algorithm.view](model, plan.options)


def created(config: Config, classes: int) -> nn.Module:
    """One of our backbones, initialised from the model seed."""
    with isolated(derive("model", config.seed("model"))):
        return models.create(config.model, classes, small_images=config.small_images)

"""From FedML's flat arguments to what the core needs: the plan of one run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import models
from ...algorithms import Algorithm, algorithm
from ...algorithms.options import Options
from ...algorithms.view import VIEWS
from ...config import OPTIONS, Config, Finding, Kind, parse
from ...dualcopy import DualCopy
from ...errors import ConfigError, GateError, WeightsError
from ...federation.local import LocalTraining
from ...federation.seeding import derive, isolated
from ...federation.warm_start import public_warm_start
from ...models.backbones import PREFIX
from .data import DATASETS

log = logging.getLogger(__name__)

FINDINGS = "fedsq_findings"
"""Attribute of FedML's args: what is wrong with the keys of its YAML files."""
FATAL: frozenset[Kind] = frozenset({"repeated", "unknown", "family"})
"""Findings about keys that end a run of ours; others are FedML's business."""


class HostName(str):
    """What `federated_optimizer` reads for FedML while one of our algorithms runs. A name that a script
    sets afterwards is none, so that it counts again."""


def algorithm_of(args: Any) -> str:
    """The algorithm that FedML's arguments ask for, also where a run before has put a HostName there."""
    name = args.federated_optimizer
    return str(args.fedsq_algorithm) if isinstance(name, HostName) else name


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
    findings: list[Finding] = getattr(args, FINDINGS, [])
    config, wrong = parse({**vars(args), "federated_optimizer": algorithm_of(args)})
    found = [finding for finding in findings if finding.kind in FATAL]
    if config is None or found:
        raise ConfigError(" | ".join(dict.fromkeys(map(str, found + wrong))))
    for key in OPTIONS.keys() & vars(args).keys() - {"federated_optimizer"}:
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
    refuse_warm_start(config)
    if config.warm_start == "public":
        _public(plain, config, dataset, device)
    else:
        load_pretrained(plain, config)
    if isinstance(model, DualCopy):
        model.refresh()


def refuse_warm_start(config: Config) -> None:
    """Raise ConfigError when the recipe's warm start cannot be had for its model or data set, as far as
    their names tell."""
    if config.warm_start == "public" and config.dataset not in DATASETS:
        raise ConfigError(
            f"warm_start_args.warm_start 'public': {config.dataset} has no public split; "
            f"use the data sets {' or '.join(DATASETS)}, or warm_start: file"
        )
    if config.warm_start == "imagenet" and config.model not in models.names():
        raise ConfigError(
            f"warm_start_args.warm_start 'imagenet': there are no such weights for {config.model}; "
            f"use {', '.join(n for n in models.names() if not n.startswith(PREFIX))}, or warm_start: file"
        )
    if config.warm_start == "imagenet" and config.small_images:
        raise ConfigError(
            "warm_start_args.warm_start 'imagenet': ImageNet's weights have torchvision's own stem; "
            "set fedsq_args.small_images: false (and image_size for small images), or use warm_start: public"
        )


def load_pretrained(model: nn.Module, config: Config) -> None:
    """ImageNet's weights, or a file's, into a plain model."""
    weights = config.warm_start_file or "imagenet"
    with in_recipe_terms():
        state = models.pretrained_state(weights, config.model, config.small_images)
        try:
            lines = models.load_weights(model, state, head_of(config, model))
        except WeightsError as error:
            raise WeightsError(f"warm start from {weights}: {error}") from None
    for line in lines:
        log.info("warm start: %s", line)


def _public(model: nn.Module, config: Config, dataset: Any, device: torch.device) -> None:
    public = public_split(dataset, config)
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


def public_split(dataset: Any, config: Config) -> Any:
    """The batches of the public split. Raises ConfigError where it is too small to train on."""
    public = getattr(dataset, "public", None)
    size = 0 if public is None else len(public.dataset)
    if size < 2:
        raise ConfigError(
            f"warm_start_args.warm_start_public {config.warm_start_public} leaves {size} of the training "
            "samples public, at least 2 are needed; raise it"
        )
    return public


def viewed(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as the algorithm trains it. The structural copy is taken here."""
    with in_recipe_terms():
        return VIEWS[plan.algorithm.view](model, plan.options)


def created(config: Config, classes: int) -> nn.Module:
    """One of our backbones, initialised from the model seed; a DualCopy with the recipe's gate options."""
    name = config.model.removeprefix(PREFIX)
    with isolated(derive("model", config.seed("model"))):
        model = models.create(name, classes, small_images=config.small_images)
    if name == config.model:
        return model
    with in_recipe_terms():
        return DualCopy(model, accept=config.gate_accept, pooling=config.gate_pooling)


_TERMS = {
    "accept it ungated by name: accept=[": "accept it ungated by name: fedsq_args.gate_accept: [",
    "give 'imagenet' or a file (": "warm_start_args.warm_start_file must name a file (",
    "fetch that file elsewhere and give its path as weights": (
        "fetch that file elsewhere and set warm_start: file and warm_start_file to its path"
    ),
    "this file needs small_images: ": "this file needs fedsq_args.small_images: ",
    " and in_channels: ": " and images of another number of channels: ",
    "the model has no head '": "fedsq_args.head: the model has no module '",
    "this file needs in_channels: ": "this file needs images of another number of channels: ",
}


@contextmanager
def in_recipe_terms() -> Iterator[None]:
    """Let errors that advise arguments of Python functions advise the recipe's keys."""
    try:
        yield
    except (GateError, WeightsError) as error:
        line = str(error)
        for python, recipe in _TERMS.items():
            line = line.replace(python, recipe)
        raise type(error)(line) from None

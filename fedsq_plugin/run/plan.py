"""From FedML's flat arguments to what the core needs: the plan of one run."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import models
from ..algorithms import Algorithm, algorithm, find
from ..data.flamby import backbones as flamby
from ..data.flamby.package import is_flamby
from ..data.ours import DATASETS, VALIDATION
from ..dualcopy import DualCopy
from ..errors import ConfigError, WeightsError, in_terms, nearest
from ..federation.local import LocalTraining, frozen_keys
from ..federation.seeding import derive, isolated
from ..federation.task import CLASSIFICATION, Task
from ..hosts.fedml.names import SETS_CLIENT_NUMBER
from ..models.backbones import PREFIX
from ..settings.config import OPTIONS, Config, Finding, Kind, parse
from .reluise import Hardening, Reluised
from .warm_start import public_relu_ise, public_warm_start

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
    options: Any
    """What the algorithm reads: the config, with what is known of the model filled in."""
    training: LocalTraining
    head: str | None
    silo_evaluation: bool
    finetune_epochs: int
    task: Task = CLASSIFICATION

    @property
    def fatal(self) -> str | None:
        """The option that makes a refused update end the run; None where it does not."""
        return "fedsq_args.nonfinite: fail" if self.config.nonfinite == "fail" else None


def config_of(args: Any) -> Config:
    """The checked options in FedML's arguments; values are put back as checked (`1e-3` is text to
    FedML's YAML reader, a number here).

    Raises:
        ConfigError: with everything that is wrong, unknown keys in our families included.
    """
    findings: list[Finding] = getattr(args, FINDINGS, [])
    config, wrong = parse({**vars(args), "federated_optimizer": algorithm_of(args)}, SETS_CLIENT_NUMBER)
    found = [finding for finding in findings if finding.kind in FATAL]
    if config is None or found:
        raise ConfigError(" | ".join(dict.fromkeys(map(str, found + wrong))))
    for key in OPTIONS.keys() & vars(args).keys() - {"federated_optimizer"}:
        setattr(args, key, getattr(config, key))
    return config


def plan_of(config: Config, model: nn.Module, task: Task = CLASSIFICATION) -> Plan:
    """The plan for training `model` on `task` by the algorithm that `federated_optimizer` names."""
    row, head = algorithm(config.federated_optimizer), head_of(config, model)
    if row.needs_head and head is None:
        raise ConfigError(
            f"{row.name} treats the head apart from the body: set fedsq_args.head to the module path of the "
            "model's last layer"
        )
    finetune_epochs = row.finetune_epochs if config.finetune_epochs is None else config.finetune_epochs
    if finetune_epochs and config.finetune_part == "head" and head is None:
        raise ConfigError(
            "finetune_part is 'head': set fedsq_args.head to the module path of the model's last layer"
        )
    volumes = next((p for p, module in model.named_modules() if isinstance(module, nn.Conv3d)), None)
    if config.channels_last and volumes is not None:
        raise ConfigError(
            f"fedsq_args.channels_last is for images, and {volumes} convolves volumes; set it to false"
        )
    frozen = config.frozen_modules
    if "frozen_modules" in row.option_names:
        frozen = _frozen_modules(config, model)
    special = {"head": head, "frozen_modules": frozen, "gate_accept": accepted(config)}
    options = config.model_copy(update=special)
    row.refuse_misfit(model, options)
    return Plan(
        config,
        row,
        options,
        config,
        head,
        row.personal if config.silo_evaluation is None else config.silo_evaluation,
        finetune_epochs,
        task,
    )


def task_of(config: Config, dataset: Any) -> Task:
    """What the data set asks of a model: what it brings, classification where it brings nothing.

    Raises:
        ConfigError: a script took apart what `fedml.data.load` gave it of FLamby's.
    """
    task: Task | None = getattr(dataset, "task", None)
    if task is None and is_flamby(config.dataset):
        raise ConfigError(
            f"the loss and the metric of {config.dataset} are lost: hand the data set to FedMLRunner as "
            "fedml.data.load gave it"
        )
    return task or CLASSIFICATION


def _frozen_modules(config: Config, model: nn.Module) -> tuple[str, ...]:
    """The modules that stay frozen: as given, or the early ones of our own backbones. A script may train
    another model than the recipe names.

    Raises:
        ConfigError: one of them matches nothing in the model, or none is known.
    """
    named = [name for name, _ in model.named_parameters()]
    own = models.early(config.model) if config.model in models.names() else ()
    unmatched = [path for path in config.frozen_modules or own if not frozen_keys(named, (path,))]
    if config.frozen_modules and unmatched:
        paths = [path for path, _ in model.named_modules() if path]
        raise ConfigError(
            f"fedsq_args.frozen_modules: the model has no '{unmatched[0]}'{nearest(unmatched[0], paths)}"
        )
    if unmatched or not (config.frozen_modules or own):
        raise ConfigError(
            "fedsq_args.frozen_modules: name the early modules of this model, as [conv1, layer1]"
        )
    return config.frozen_modules or own


def head_of(config: Config, model: nn.Module) -> str | None:
    """The head's module path: as given, or that of our own backbones. A script may train another model
    than the recipe names; its head is unknown unless given."""
    own = models.head if config.model in models.names() else None
    if config.model in flamby.MODELS:
        own = partial(flamby.head, dataset=config.dataset)
    if config.head is None and own is not None:
        known = own(config.model)
        return known if known in dict(model.named_modules()) else None
    return config.head


def accepted(config: Config) -> tuple[str, ...]:
    """What may stay ungated: as given, and what has no gate in our own backbone even after ReLU-isation."""
    own = models.ungated(config.model) if config.model in models.names() else ()
    if config.model in flamby.MODELS:
        own = flamby.ungated(config.model, config.dataset)
    return (*config.gate_accept, *own)


def warm_start(model: nn.Module, config: Config, dataset: Any, device: torch.device) -> Reluised | None:
    """Give the model its pretrained weights, and ReLUs for its smooth activations where that is asked for,
    in place. A DualCopy's structural copy is taken anew.

    Returns:
        What ReLU-isation did.
    """
    plain = model.quantitative if isinstance(model, DualCopy) else model
    refuse_warm_start(config)
    if config.warm_start == "public":
        _public(plain, config, dataset, device)
    elif config.warm_start != "none":
        load_pretrained(plain, config)
    done = _relu_ised(plain, config, dataset, device) if config.relu_ise else None
    if isinstance(model, DualCopy):
        model.refresh()
    return done


def refuse_warm_start(config: Config) -> None:
    """Raise ConfigError when the recipe's warm start cannot be had for its model or data set, as far as
    their names tell."""
    if config.has_public_split and config.dataset not in DATASETS:
        what = "relu_ise" if config.relu_ise else "warm_start 'public'"
        raise ConfigError(
            f"warm_start_args.{what}: {config.dataset} has no public split; "
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


def _relu_ised(model: nn.Module, config: Config, dataset: Any, device: torch.device) -> Reluised:
    public = public_split(dataset, config)
    training = LocalTraining(
        learning_rate=config.relu_ise_learning_rate or config.warm_start_learning_rate,
        momentum=config.warm_start_momentum,
        augmentation=config.augmentation,
    )
    hardening = Hardening(
        config.relu_ise_tolerance,
        config.relu_ise_schedule,
        config.relu_ise_learn_epochs,
        config.relu_ise_harden_epochs,
        config.relu_ise_lr_factor,
        config.relu_ise_initial,
        config.relu_ise_temperature,
    )
    done, cached = public_relu_ise(
        model,
        public,
        dataset.validation,
        f"{dataset.public_content}/{config.warm_start_batch_size}",
        training,
        hardening,
        derive("relu-ise", config.seed("model")),
        config.cache_dir,
        device,
    )
    log.info(
        "ReLU-isation of %d activations%s: accuracy on %d public samples %.1f %% smooth, %.1f %% at the "
        "target lambda, %.1f %% with ReLU (drop %.1f points)",
        len(done.target), " (read from the cache)" if cached else "", len(dataset.validation.dataset),
        100 * done.original, 100 * done.hardened, 100 * done.relu, 100 * done.drop,
    )  # fmt: skip
    return done


def public_split(dataset: Any, config: Config) -> Any:
    """The batches of the public split. Raises ConfigError where it is too small to train on."""
    public = getattr(dataset, "public", None)
    size = 0 if public is None else len(public.dataset)
    if size < 2 or (config.relu_ise and dataset.validation is None):
        raise ConfigError(
            f"warm_start_args.warm_start_public {config.warm_start_public} leaves {size} of the training "
            f"samples public, at least {VALIDATION if config.relu_ise else 2} are needed; raise it"
        )
    return public


def viewed(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as the algorithm trains it. The structural copy is taken here."""
    with in_recipe_terms():
        view = plan.algorithm.view.make(model, plan.options)
    if plan.config.channels_last:
        # Convolutions follow their weights: inputs need not be touched.
        view.to(memory_format=torch.channels_last)
    return view


def created(config: Config, classes: int) -> nn.Module:
    """One of our backbones, initialised from the model seed; a DualCopy with the recipe's gate options."""
    if config.model in flamby.MODELS:
        row = find(getattr(config, "federated_optimizer", ""))
        if row is not None and row.gated:
            line = flamby.without_gates(config.model, config.dataset)
            if line is not None:
                raise ConfigError(f"model_args.model {config.model} under {row.name}: {line}")
        return flamby.create(config.model, config.dataset, classes, derive("model", config.seed("model")))
    name = config.model.removeprefix(PREFIX)
    with isolated(derive("model", config.seed("model"))):
        model = models.create(name, classes, small_images=config.small_images)
    if name == config.model:
        return model
    with in_recipe_terms():
        return DualCopy(
            model,
            accept=accepted(config),
            pooling=config.gate_pooling,
            structural_precision=config.structural_precision,
        )


_TERMS = {
    "(or turn the backbone into a ReLU one first)": "or set warm_start_args.relu_ise: true",
    "accept it ungated by name: accept=[": "accept it ungated by name: fedsq_args.gate_accept: [",
    "all of them: accept=[": "all of them: fedsq_args.gate_accept: [",
    "give 'imagenet' or a file (": "warm_start_args.warm_start_file must name a file (",
    "fetch that file elsewhere and give its path as weights": (
        "fetch that file elsewhere and set warm_start: file and warm_start_file to its path"
    ),
    "this file needs small_images: ": "this file needs fedsq_args.small_images: ",
    " and in_channels: ": " and images of another number of channels: ",
    "the model has no head '": "fedsq_args.head: the model has no module '",
    "this file needs in_channels: ": "this file needs images of another number of channels: ",
}


def in_recipe_terms() -> AbstractContextManager[None]:
    """Let errors that advise arguments of Python functions advise the recipe's keys."""
    return in_terms(_TERMS)

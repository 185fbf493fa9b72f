"""The plan of one run: a recipe's options as the core takes them, checked against the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import models
from ..algorithms import Algorithm, algorithm, find
from ..data.flamby import backbones as flamby
from ..dualcopy import DualCopy
from ..errors import ConfigError, Vocabulary, worded
from ..federation.local import frozen_keys
from ..federation.seeding import derive, isolated
from ..federation.task import CLASSIFICATION, Accuracy, CrossEntropy, Task
from ..federation.training import LocalTraining
from ..models.backbones import PREFIX
from ..settings.config import Config

log = logging.getLogger(__name__)

RECIPE: Vocabulary = {
    "gate_accept": "fedsq_args.gate_accept: {}",
    "relu_ise": " or set warm_start_args.relu_ise: true",
    "weights": "warm_start_args.warm_start_file must name a file",
    "path of weights": "set warm_start: file and warm_start_file to its path",
    "small_images": "fedsq_args.small_images: {}",
    "in_channels": "images of another number of channels: {}",
    "no head": "fedsq_args.head: the model has no module '{}'",
    "head": "fedsq_args.head",
    "frozen_modules": "fedsq_args.frozen_modules",
    "batch": "fedsq_args.batch",
    "output": "fedsq_args.output",
    "task": "fedsq_args.task",
    "ignore_index": "fedsq_args.ignore_index",
}
"""What errors say to somebody who writes a recipe."""


@dataclass(frozen=True)
class Plan:
    """What a run of one algorithm needs, except the model and the data."""

    config: Config
    algorithm: Algorithm
    options: Any
    """What the algorithm reads: the config, with what is known of the model filled in."""
    training: LocalTraining
    silo_evaluation: bool
    """Whether every silo's own model is tested on its own test data."""
    finetune_epochs: int
    """Epochs of every silo's fine-tuning after the last round; 0: none."""
    task: Task = CLASSIFICATION
    notes: list[str] = field(default_factory=list, compare=False)
    """Lines for the user that were said before the first round."""

    def note(self, line: str) -> None:
        """Say a line to the user."""
        log.warning(line)
        self.notes.append(line)

    @property
    def head(self) -> str | None:
        """Module path of the head; None: unknown."""
        found: str | None = self.options.head
        return found

    @property
    def fatal(self) -> str | None:
        """The option that makes a refused update end the run; None where it does not."""
        return "fedsq_args.nonfinite: fail" if self.config.nonfinite == "fail" else None


def plan_of(config: Config, model: nn.Module, task: Task = CLASSIFICATION, outputs: Any = None) -> Plan:
    """The plan for training `model` on `task` by the algorithm that `federated_optimizer` names.

    Args:
        task: that the data set brings; CLASSIFICATION: none, and it is a classification until labels tell more.
        outputs: the number of the data set's classes; no number: unknown.

    Raises:
        ConfigError: the algorithm or an option does not go with the model.
    """
    chosen, head = algorithm(config.federated_optimizer), head_of(config, model)
    frozen = config.frozen_modules or _own_early_modules(chosen, config, model)
    special = {"head": head, "frozen_modules": frozen, "gate_accept": accepted(config)}
    options = config.model_copy(update=special)
    with worded(RECIPE):
        chosen.refuse_misfit(model, options)
    finetune_epochs = chosen.finetune_epochs if config.finetune_epochs is None else config.finetune_epochs
    if finetune_epochs and config.finetune_part == "head" and head is None:
        raise ConfigError("finetune_part is 'head': set fedsq_args.head to the module path of the model's last layer")
    volumes = next((p for p, module in model.named_modules() if isinstance(module, nn.Conv3d)), None)
    if config.channels_last and volumes is not None:
        raise ConfigError(f"fedsq_args.channels_last is for images, and {volumes} convolves volumes; set it to false")
    if task is CLASSIFICATION:
        task = Task(CrossEntropy(config.ignore_index), Accuracy(config.ignore_index))
    return Plan(
        config,
        chosen,
        options,
        config,
        chosen.personal if config.silo_evaluation is None else config.silo_evaluation,
        finetune_epochs,
        task._replace(reading=config.reading(outputs)),
    )


def _own_early_modules(chosen: Algorithm, config: Config, model: nn.Module) -> tuple[str, ...]:
    """The early modules of our own backbone, for an algorithm that freezes them; none where a script trains
    another model than the recipe names."""
    if "frozen_modules" not in chosen.option_names or config.model not in models.names():
        return ()
    early, named = models.find_backbone(config.model).early, [name for name, _ in model.named_parameters()]
    return early if all(frozen_keys(named, (path,)) for path in early) else ()


def head_of(config: Config, model: nn.Module) -> str | None:
    """The head's module path: as given, or that of our own backbone. Where a script trains another model than
    the recipe names, it is None unless given."""
    if config.head is not None:
        return config.head
    known = None
    if config.model in flamby.MODELS:
        known = flamby.head(config.model, config.dataset)
    elif config.model in models.names():
        known = models.find_backbone(config.model).head
    return known if known in dict(model.named_modules()) else None


def accepted(config: Config) -> tuple[str, ...]:
    """Patterns of modules that may stay ungated: those given, and those of our own backbone that have no gate
    even after ReLU-isation."""
    own = models.find_backbone(config.model).ungated if config.model in models.names() else ()
    if config.model in flamby.MODELS:
        own = flamby.ungated(config.model, config.dataset)
    return (*config.gate_accept, *own)


def build_view(model: nn.Module, plan: Plan) -> nn.Module:
    """Make the model that the algorithm trains. A structural copy is taken now."""
    with worded(RECIPE):
        view = plan.algorithm.view.make(model, plan.options)
    if plan.config.channels_last:
        # A convolution follows the format of its weights, whatever its inputs have.
        view.to(memory_format=torch.channels_last)
    return view


def create_model(config: Config, outputs: int) -> nn.Module:
    """Make one of our backbones, initialised from the model seed. A model called `dualcopy_…` is a DualCopy with the
    recipe's gate options.

    Raises:
        ConfigError: there is no such model for the data set, or it has no gate and the algorithm needs gates.
    """
    if config.model in flamby.MODELS:
        chosen = find(getattr(config, "federated_optimizer", ""))
        if chosen is not None and chosen.gated and (line := flamby.without_gates(config.model, config.dataset)):
            raise ConfigError(f"model_args.model {config.model} under {chosen.name}: {line}")
        return flamby.create(config.model, config.dataset, outputs, derive("model", config.seed("model")))
    name = config.model.removeprefix(PREFIX)
    with isolated(derive("model", config.seed("model"))):
        model = models.create(name, outputs, small_images=config.small_images)
    if name == config.model:
        return model
    with worded(RECIPE):
        return DualCopy(
            model,
            accept=accepted(config),
            pooling=config.gate_pooling,
            structural_precision=config.structural_precision,
        )

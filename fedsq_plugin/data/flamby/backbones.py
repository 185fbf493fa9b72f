"""Models for FLamby's data sets: FLamby's own baselines, and MLPs for data sets of vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from ... import models
from ...errors import ConfigError
from ...federation.seeding import isolated
from ...models.backbones import PREFIX
from ...models.mlp import MLP as Perceptron
from .catalogue import BASELINE, CATALOGUE, MLP, MODELS, NORMED, FlambyData
from .package import FlambyPackage

log = logging.getLogger(__name__)


def create(model: str, dataset: str, outputs: int, seed: int) -> nn.Module:
    """Make one of MODELS for a data set, both by their names in a recipe, initialised from a seed.

    Raises:
        ConfigError: the data set is not FLamby's, or has no vectors for an MLP.
    """
    about = _find(model, dataset)
    if model != BASELINE and about.features is None:
        flat = ", ".join(other.key for other in CATALOGUE.values() if other.features is not None)
        other = about.instead if about.colour_images else f"the model {BASELINE}"
        raise ConfigError(f"model_args.model {model} takes vectors, as {flat} have them; use {other}")
    with isolated(seed):
        return _build(model, about, outputs, lambda: FlambyPackage(dataset).baseline())


def head(model: str, dataset: str) -> str:
    """The module path of the last layer."""
    return _find(model, dataset).head if model == BASELINE else "fc"


def ungated(model: str, dataset: str) -> tuple[str, ...]:
    """Patterns of the modules that have no gate and stay as they are."""
    return _find(model, dataset).ungated if model == BASELINE else ()


def downloads_weights(model: str, dataset: str) -> bool:
    """Whether the model downloads its weights when it is made."""
    return model == BASELINE and dataset in CATALOGUE and CATALOGUE[dataset].downloads


def without_gates(model: str, dataset: str) -> str | None:
    """One line that says what to use in place of a baseline that has no gate; None: it has gates."""
    if model != BASELINE or (about := _find(model, dataset)).instead is None:
        return None
    return f"FLamby's own for {about.name} is {about.baseline}, without a gate; use {about.instead}"


def factory(
    about: FlambyData, backbone: str, weights: str | None, baseline: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """A function that makes the model of a data set. FLamby's benchmark calls it in place of `Baseline`.

    Args:
        backbone: `baseline`, `mlp`, `mlp_bn`, or one of ours by name.
        weights: a file, or "imagenet" for a backbone of ours; None: newly initialised.
        baseline: the data set's own `Baseline`.

    Raises:
        ConfigError: no such backbone for this data set.
    """
    ours = [name for name in models.names() if not name.startswith(PREFIX)] if about.colour_images else []
    known = ["baseline", *((MLP, NORMED) if about.features else ()), *ours]
    if backbone not in known:
        raise ConfigError(f"--backbone {backbone}: {about.name} can have {', '.join(known)}")
    if weights == "imagenet" and backbone not in ours:
        raise ConfigError(f"--weights imagenet: there are none for {backbone}; give a file")

    def make(*arguments: Any) -> nn.Module:
        if backbone in ours:
            return models.create(backbone, about.outputs, weights)
        name = BASELINE if backbone == "baseline" else backbone
        model = _build(name, about, about.outputs, lambda: baseline(*arguments))
        if weights is not None:
            for line in models.load_weights(model, models.open_weights(weights), head=None):
                log.warning("weights %s: %s", weights, line)
        return model

    return make


def _build(model: str, about: FlambyData, outputs: int, baseline: Callable[[], nn.Module]) -> nn.Module:
    if model == BASELINE:
        return baseline()
    assert about.features is not None
    return Perceptron(about.features, outputs, sigmoid=about.probability, norm=model == NORMED)


def _find(model: str, dataset: str) -> FlambyData:
    if dataset not in CATALOGUE:
        raise ConfigError(
            f"model_args.model {model} is made for one of FLamby's data sets ({', '.join(CATALOGUE)}), "
            f"and data_args.dataset is {dataset}"
        )
    return CATALOGUE[dataset]


__all__ = ["BASELINE", "MODELS", "create", "downloads_weights", "factory", "head", "ungated", "without_gates"]

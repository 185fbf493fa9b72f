"""What is trained on FLamby's data sets beside the backbones for images."""

from __future__ import annotations

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


def create(model: str, dataset: str, outputs: int, seed: int) -> nn.Module:
    """One of MODELS for a data set, both as a recipe names them, initialised from a seed.

    Raises:
        ConfigError: the data set is not FLamby's, or has no vectors for an MLP.
    """
    about = _row(model, dataset)
    if model != BASELINE and about.features is None:
        flat = ", ".join(other.key for other in CATALOGUE.values() if other.features is not None)
        other = about.instead if about.colour_images else f"the model {BASELINE}"
        raise ConfigError(f"model_args.model {model} takes vectors, as {flat} have them; use {other}")
    with isolated(seed):
        return _built(model, about, outputs, lambda: FlambyPackage(dataset).baseline())


def head(model: str, dataset: str) -> str:
    """Module path of the last layer."""
    return _row(model, dataset).head if model == BASELINE else "fc"


def ungated(model: str, dataset: str) -> tuple[str, ...]:
    """Patterns of what has no gate and is accepted as it is."""
    return _row(model, dataset).ungated if model == BASELINE else ()


def fetched(model: str, dataset: str) -> bool:
    """Whether making the model fetches its weights from the internet."""
    return model == BASELINE and dataset in CATALOGUE and CATALOGUE[dataset].downloads


def without_gates(model: str, dataset: str) -> str | None:
    """What to use in place of a baseline that has no gate, in a line; None: it has."""
    if model != BASELINE or (about := _row(model, dataset)).instead is None:
        return None
    return f"FLamby's own for {about.name} is {about.baseline}, without a gate; use {about.instead}"


def factory(
    about: FlambyData, backbone: str, weights: str | None, baseline: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """What makes the model of a data set, as FLamby's benchmark calls its `Baseline`.

    Args:
        backbone: `baseline`, `mlp`, `mlp_bn`, or one of ours by name.
        weights: a file, or "imagenet" for a backbone of ours; None: newly initialised.
        baseline: the data set's own.

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
        model = _built(name, about, about.outputs, lambda: baseline(*arguments))
        if weights is not None:
            models.load_weights(model, models.read_state(weights), head=None)
        return model

    return make


def _built(model: str, about: FlambyData, outputs: int, baseline: Callable[[], nn.Module]) -> nn.Module:
    if model == BASELINE:
        return baseline()
    assert about.features is not None
    return Perceptron(about.features, outputs, sigmoid=about.probability, norm=model == NORMED)


def _row(model: str, dataset: str) -> FlambyData:
    if dataset not in CATALOGUE:
        raise ConfigError(
            f"model_args.model {model} is made for one of FLamby's data sets ({', '.join(CATALOGUE)}), "
            f"and data_args.dataset is {dataset}"
        )
    return CATALOGUE[dataset]


__all__ = ["BASELINE", "MODELS", "create", "factory", "fetched", "head", "ungated", "without_gates"]

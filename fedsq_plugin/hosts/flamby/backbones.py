"""What a recipe may train on FLamby's data sets beside the backbones for images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ... import models
from ...errors import ConfigError
from ...federation.seeding import isolated
from ...models.backbones import PREFIX
from ...models.mlp import MLP as Perceptron
from .catalogue import BASELINE, CATALOGUE, MLP, MODELS, FlambyData
from .catalogue import PREFIX as FLAMBY
from .package import FlambyPackage


def create(model: str, dataset: str, outputs: int, seed: int) -> nn.Module:
    """One of MODELS for a data set, initialised from a seed.

    Raises:
        ConfigError: the data set is not FLamby's, or has no vectors for an MLP.
    """
    row = _row(model, dataset)
    if model == MLP:
        if row.features is None:
            flat = ", ".join(other.key for other in CATALOGUE.values() if other.features is not None)
            other = f"use model: {BASELINE}" if row.instead is None else f"use {row.instead}"
            raise ConfigError(f"model_args.model {MLP} takes vectors, as {flat} have them; {other}")
        with isolated(seed):
            return Perceptron(row.features, outputs, sigmoid=row.probability)
    package = FlambyPackage(dataset)
    with isolated(seed):
        built: nn.Module = package.baseline()
    return built


def head(model: str, dataset: str) -> str:
    """Module path of the last layer."""
    return "fc" if model == MLP else _row(model, dataset).head


def ungated(model: str, dataset: str) -> tuple[str, ...]:
    """Patterns of what has no gate and is accepted as it is."""
    return () if model == MLP else _row(model, dataset).ungated


def refuse_ungateable(model: str, dataset: str, algorithm: str) -> None:
    """Raise ConfigError where a row with gates is to train a baseline that has none."""
    if model == BASELINE and (instead := _row(model, dataset).instead) is not None:
        row = CATALOGUE[dataset]
        raise ConfigError(
            f"model_args.model {BASELINE}: FLamby's own for {row.name} is {row.baseline}, without a gate "
            f"that {algorithm} could keep; use {instead}"
        )


NORMED = "mlp_bn"
"""In FLamby's benchmark, the MLP with BatchNorm."""


def factory(dataset: str, backbone: str, weights: str | None, own: Any) -> Callable[..., nn.Module]:
    """What makes the model of a data set, as FLamby's benchmark calls its `Baseline`.

    Args:
        dataset: FLamby's own name.
        backbone: `baseline`, `mlp`, `mlp_bn` (with BatchNorm), or one of ours by name.
        weights: a file, or "imagenet" for a backbone of ours; None: newly initialised.
        own: the data set's own `Baseline`.

    Raises:
        ConfigError: no such backbone for this data set.
    """
    row = CATALOGUE[f"{FLAMBY}{dataset}"]
    ours = [name for name in models.names() if not name.startswith(PREFIX)] if row.colour_images else []
    known = ["baseline", *((MLP, NORMED) if row.features else ()), *ours]
    if backbone not in known:
        raise ConfigError(f"--backbone {backbone}: {dataset} can have {', '.join(known)}")
    if weights == "imagenet" and backbone not in ours:
        raise ConfigError(f"--weights imagenet: there are none for {backbone}; give a file")

    def make(*arguments: Any) -> nn.Module:
        if backbone in ours:
            return models.create(backbone, row.outputs, weights)
        if row.features is not None and backbone != "baseline":
            norm = backbone == NORMED
            model: nn.Module = Perceptron(row.features, row.outputs, sigmoid=row.probability, norm=norm)
        else:
            model = own(*arguments)
        if weights is not None:
            models.load_weights(model, models.read_state(weights), head=None)
        return model

    return make


def _row(model: str, dataset: str) -> FlambyData:
    if dataset not in CATALOGUE:
        raise ConfigError(
            f"model_args.model {model} is made for one of FLamby's data sets ({', '.join(CATALOGUE)}), "
            f"and data_args.dataset is {dataset}"
        )
    return CATALOGUE[dataset]


__all__ = ["BASELINE", "MODELS", "create", "factory", "head", "refuse_ungateable", "ungated"]

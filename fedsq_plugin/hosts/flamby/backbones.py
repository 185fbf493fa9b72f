"""What a recipe may train on FLamby's data sets beside the backbones for images."""

from __future__ import annotations

from torch import nn

from ...errors import ConfigError
from ...federation.seeding import isolated
from ...models.mlp import Mlp
from .catalogue import BASELINE, CATALOGUE, MLP, MODELS, FlambyData
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
            return Mlp(row.features, outputs, probability=row.probability)
    package = FlambyPackage(dataset)
    with isolated(seed):
        built: nn.Module = package.baseline()
    return built


def head(model: str, dataset: str) -> str:
    """Module path of the last layer."""
    return "head" if model == MLP else _row(model, dataset).head


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


def _row(model: str, dataset: str) -> FlambyData:
    if dataset not in CATALOGUE:
        raise ConfigError(
            f"model_args.model {model} is made for one of FLamby's data sets ({', '.join(CATALOGUE)}), "
            f"and data_args.dataset is {dataset}"
        )
    return CATALOGUE[dataset]


__all__ = ["BASELINE", "MODELS", "create", "head", "refuse_ungateable", "ungated"]

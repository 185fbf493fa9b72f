"""Ablations: a part of the model stays frozen at the warm start. They tell fixed gates from fewer moving weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError, Word, nearest
from ..federation.algorithm import EVERYTHING, Algorithm, FederationOptions, Phases
from ..federation.local import Part, Phase, frozen_keys
from ..federation.options import Options, option
from ..federation.roles import Role, refuse_without_norm

NORM = frozenset({Role.NORM_PARAMETER, Role.HEAD_NORM_PARAMETER, Role.NORM_BUFFER})


class FrozenEarlyOptions(Options):
    frozen_modules: tuple[str, ...] = option(
        (), "fedsq_args", "modules that FrozenEarly leaves frozen; known for our own backbones", agree=True
    )


class FrozenModules(FrozenEarlyOptions, FederationOptions):
    """What FrozenEarly's phases read."""


def without_norm(options: FederationOptions, round: int) -> Sequence[Part]:
    """Normalisation layers stay at the warm start, parameters and statistics."""
    return (Phase(options.epochs, EVERYTHING - NORM),)


def without_early(options: FrozenModules, round: int) -> Sequence[Part]:
    """The modules of the option `frozen_modules` stay at the warm start."""
    if not options.frozen_modules:
        raise ConfigError(
            Word("frozen_modules"), " is empty: name the early modules that stay frozen, as [conv1, layer1]"
        )
    return (Phase(options.epochs, EVERYTHING, options.frozen_modules),)


def fits_frozen_norm(algorithm: Algorithm, model: nn.Module, options: Any) -> None:
    """Raise ConfigError where there is no normalisation layer to freeze."""
    refuse_without_norm(algorithm.name, model)


def fits_frozen_modules(algorithm: Algorithm, model: nn.Module, options: FrozenModules) -> None:
    """Raise ConfigError where `frozen_modules` names nothing, or something that the model has not."""
    keys = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    paths = [path for path, _ in model.named_modules() if path]
    if not options.frozen_modules:
        option = Word("frozen_modules")
        raise ConfigError(f"{algorithm.name}: set ", option, " to the early modules that stay frozen")
    for path in options.frozen_modules:
        if not frozen_keys(keys, (path,)):
            raise ConfigError(Word("frozen_modules"), f": the model has no '{path}'{nearest(path, paths)}")


FROZEN_BN = Algorithm(
    "FrozenBN",
    "ablation: normalisation layers frozen",
    phases=Phases("without norm layers", without_norm, fits=fits_frozen_norm),
)
FROZEN_EARLY = Algorithm(
    "FrozenEarly",
    "ablation: early layers frozen",
    phases=Phases("without early layers", without_early, fits=fits_frozen_modules),
    options=FrozenEarlyOptions,
)

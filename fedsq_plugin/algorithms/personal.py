"""Algorithms that leave a part of the model with each silo: FedBN, FedBABU and FedRep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..federation.algorithm import BODY, HEAD, Algorithm, Exchange, FederationOptions, Phases
from ..federation.local import Part, Phase
from ..federation.options import Options, option
from ..federation.roles import Role, refuse_without_norm


class FedRepOptions(Options):
    head_epochs: int = option(1, "fedsq_args", "FedRep's local epochs on the head", agree=True, ge=0)


class HeadEpochs(FedRepOptions, FederationOptions):
    """What FedRep's phases read."""


def head_then_body(options: HeadEpochs, round: int) -> Sequence[Part]:
    """The head is trained on the body as it came, then the body under that head (arXiv 2102.07078, alg. 1)."""
    return (Phase(options.head_epochs, HEAD), Phase(options.epochs, BODY))


def body_only(options: FederationOptions, round: int) -> Sequence[Part]:
    """The head stays as it was at the start (arXiv 2106.06042, section 4)."""
    return (Phase(options.epochs, BODY),)


def fits_local_norm(algorithm: Algorithm, model: nn.Module, options: Any) -> None:
    """Raise ConfigError where no layer would stay with the silos, or the structural copy would follow them."""
    refuse_without_norm(algorithm.name, model)
    if algorithm.gated and options.structural_copy in ("refresh", "ema"):
        raise ConfigError(
            f"{algorithm.name} with structural_copy '{options.structural_copy}': it would follow a model whose "
            "normalisation layers no silo has; set structural_copy: fixed or unfreeze"
        )


FEDBN = Algorithm(
    "FedBN",
    "Li et al. 2021, arXiv 2102.07623",
    # Normalisation layers stay with the silo: parameters, statistics and counters.
    exchange=Exchange("without norm layers", frozenset({Role.BODY, Role.HEAD}), fits=fits_local_norm),
)
BODY_TRAVELS = Exchange("body only", BODY)
FEDBABU = Algorithm(
    "FedBABU",
    "Oh et al. 2022, arXiv 2106.06042",
    phases=Phases("body only", body_only, needs_head=True, finetune_epochs=5),
    exchange=BODY_TRAVELS,
)
FEDREP = Algorithm(
    "FedRep",
    "Collins et al. 2021, arXiv 2102.07078",
    phases=Phases("head then body", head_then_body, needs_head=True),
    exchange=BODY_TRAVELS,
    options=FedRepOptions,
)

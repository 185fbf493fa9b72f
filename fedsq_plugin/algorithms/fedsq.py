"""FedSQ (arXiv 2604.02990): silos train the quantitative copy under the gates of a structural copy.

The paper keeps the structural copy fixed. The other values of `structural_copy` are ours: they answer what happens
when the gates are dropped after some rounds, or follow the global model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ..dualcopy import DualCopy
from ..dualcopy.precision import Precision
from ..federation.algorithm import Algorithm, View
from ..federation.options import Options, option, runs_rounds
from ..federation.state import State


def _no_gates(ungated: str | None) -> str | None:
    return f"{ungated} trains the plain model, without gates" if ungated else None


def _never_reached(structural_rounds: int, comm_round: int) -> str | None:
    return f"the run ends after {comm_round} rounds" if structural_rounds >= comm_round else None


def _never_changes(structural_copy: str) -> str | None:
    return "structural_copy is 'fixed'" if structural_copy == "fixed" else None


def _no_average(structural_copy: str) -> str | None:
    return f"structural_copy is '{structural_copy}'" if structural_copy != "ema" else None


class FedSQOptions(Options):
    structural_copy: Literal["fixed", "refresh", "ema", "unfreeze"] = option(
        "fixed",
        "fedsq_args",
        "structural copy over the rounds: fixed; refreshed from the global model every structural_rounds; "
        "an average with it every structural_rounds; given up after structural_rounds",
        differs="the server makes the structural copy",
        idle=(runs_rounds, _no_gates, _never_reached),
    )
    structural_rounds: int = option(
        1, "fedsq_args", "rounds that structural_copy counts", idle=(_no_gates, _never_changes), ge=1
    )
    structural_decay: float = option(
        0.9,
        "fedsq_args",
        "share of itself that the structural copy keeps (ema)",
        idle=(_no_gates, _no_average),
        ge=0,
        le=1,
    )
    keep_gates: bool = option(
        False,
        "fedsq_args",
        "keep the gates of training images, which then pass the structural copy once",
        differs="the figures are the same",
        idle=(runs_rounds, _no_gates),
    )
    gate_pooling: Literal["structural", "own"] = option(
        "structural",
        "fedsq_args",
        "who chooses in max-pooling: the structural copy, or each copy itself",
        agree=True,
        idle=_no_gates,
    )
    gate_accept: tuple[str, ...] = option(
        (), "fedsq_args", "paths of activations that cannot be gated and may stay ungated", agree=True, idle=_no_gates
    )
    structural_precision: Precision = option(
        "fp32",
        "fedsq_args",
        "what gates are computed in, whatever precision is, in training and tests; fp32 without TF32",
        agree=True,
        idle=_no_gates,
    )


def dualcopy(model: nn.Module, options: FedSQOptions) -> nn.Module:
    """The model under the gates of a structural copy that is taken now. Of a DualCopy only the quantitative copy is
    taken: its structural copy is from before the warm start."""
    network = model.quantitative if isinstance(model, DualCopy) else model
    return DualCopy(
        network,
        accept=options.gate_accept,
        pooling=options.gate_pooling,
        structural_precision=options.structural_precision,
    )


def next_structural(structural: State, model: Mapping[str, Tensor], round: int, options: FedSQOptions) -> State | None:
    """The structural copy of a round, from the one of the round before and the global model.

    Args:
        round: 0-based; so many rounds are finished.

    Returns:
        `structural` itself where it does not change; None from the round on in which it is dropped and each copy
        uses its own gates.
    """
    if options.structural_copy == "unfreeze":
        return None if round >= options.structural_rounds else structural
    if options.structural_copy == "fixed" or not round or round % options.structural_rounds:
        return structural
    if options.structural_copy == "refresh":
        return OrderedDict(model)
    decay = options.structural_decay
    return OrderedDict(
        (key, decay * old + (1 - decay) * model[key] if old.is_floating_point() else model[key])
        for key, old in structural.items()
    )


FEDSQ = Algorithm(
    "FedSQ",
    "arXiv 2604.02990",
    view=View("dualcopy", dualcopy, gated=True, next_structural=next_structural),
    options=FedSQOptions,
)

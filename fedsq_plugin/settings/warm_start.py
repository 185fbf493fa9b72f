"""The options of what happens to the model before the first round, at the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..data.options import PublicSplit, no_public_split
from ..federation.options import Options, option


def _no_training(warm_start: str) -> str | None:
    return f"warm_start is '{warm_start}'" if warm_start != "public" else None


def _no_relu_ise(relu_ise: bool) -> str | None:
    return None if relu_ise else "relu_ise is false"


class Hardening(Options):
    """How λ is learned, and raised to its target. Every default is a choice: none of them is published.

    At the learning-rate factor 1, λ's parameter has the weight decay of the others, too. The tolerance is below the
    smallest area of a gate, so that every target is above 1.
    """

    relu_ise_learn_epochs: int = option(
        2, "warm_start_args", "epochs in which λ is learned with the weights", idle=_no_relu_ise, ge=0
    )
    relu_ise_harden_epochs: int = option(
        4, "warm_start_args", "epochs in which λ is raised to its target", idle=_no_relu_ise, ge=1
    )
    relu_ise_schedule: Literal["linear", "geometric", "cosine"] = option(
        "geometric", "warm_start_args", "how λ is raised", idle=_no_relu_ise
    )
    relu_ise_tolerance: float = option(
        0.01, "warm_start_args", "ε of the target λ* = √(2/π)/ε (GELU)", idle=_no_relu_ise, gt=0, lt=0.79
    )
    relu_ise_learning_rate: float | None = option(
        None, "warm_start_args", "its learning rate; null: warm_start_learning_rate", idle=_no_relu_ise, gt=0
    )
    relu_ise_lr_factor: float = option(10.0, "warm_start_args", "factor of that for λ", idle=_no_relu_ise, ge=0)
    relu_ise_initial: float = option(1.01, "warm_start_args", "λ at the start", idle=_no_relu_ise, gt=1)
    relu_ise_temperature: float = option(0.1, "warm_start_args", "t of λ = 1 + softplus(s/t)", idle=_no_relu_ise, gt=0)


class WarmStartOptions(PublicSplit):
    """Where the weights come from."""

    warm_start_file: str | None = option(
        None, "warm_start_args", "weights: .safetensors, .pt or .ckpt; also what a run saved", may_change=True
    )
    warm_start_epochs: int = option(10, "warm_start_args", "epochs on the public split", idle=_no_training, ge=1)
    warm_start_learning_rate: float = option(
        0.05, "warm_start_args", "its learning rate (sgd)", idle=no_public_split, gt=0
    )
    warm_start_momentum: float = option(0.9, "warm_start_args", "its momentum", idle=no_public_split, ge=0, lt=1)
    warm_start_cache_dir: str = option(
        "~/.cache/fedsq",
        "warm_start_args",
        "where trained warm starts are kept, by content",
        may_change=True,
        idle=no_public_split,
    )

    @property
    def cache_dir(self) -> Path:
        return Path(os.path.expanduser(self.warm_start_cache_dir))

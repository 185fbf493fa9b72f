"""Objective: what is added to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..federation.local import Objective
from .options import Options


def nothing(options: Options) -> None:
    """The loss as it is."""
    return None


def proximal(options: Options) -> Objective:
    """μ/2·‖w − w_global‖² (FedProx, Li et al. 2020, arXiv 1812.06127, eq. 2)."""
    mu = options.fedprox_mu

    def term(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
        squares = [(p - s).square().sum() for p, s in zip(parameters, start, strict=True)]
        return mu / 2 * torch.stack(squares).sum()

    return term


OBJECTIVES: dict[str, Callable[[Options], Objective | None]] = {"none": nothing, "proximal": proximal}

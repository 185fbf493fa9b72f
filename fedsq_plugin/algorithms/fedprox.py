"""FedProx (Li et al. 2020, arXiv 1812.06127): a proximal term holds silos near the global model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..federation.algorithm import Algorithm, Objective
from ..federation.local import Term
from ..federation.options import Options, option


class FedProxOptions(Options):
    fedprox_mu: float = option(0.01, "train_args", "μ of FedProx's proximal term", agree=True, ge=0)


def proximal(options: FedProxOptions) -> Term:
    """μ/2·‖w − w_global‖² (eq. 2)."""
    mu = options.fedprox_mu

    def term(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
        squares = [(p - s).square().sum() for p, s in zip(parameters, start, strict=True)]
        return mu / 2 * torch.stack(squares).sum()

    return term


FEDPROX = Algorithm(
    "FedProx", "Li et al. 2020, arXiv 1812.06127", objective=Objective("proximal", proximal), options=FedProxOptions
)

"""A model of one number, whose steps can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]


class Weight(nn.Module):
    """One parameter w, 1 at the start; the output is w·x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean() / 2


# With x = 1 and target 3 the loss is (w - 3)²/2 and its gradient w - 3.
ONE: Batches = [(torch.ones(1, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64))]
